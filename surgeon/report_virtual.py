"""What a work folder's virtual tokens are: how many at which sites, and how large beside what stands there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgeon.fold import Fold, rest, value_of
from surgeon.graph import Graph
from surgeon.sites import EMBEDDING, sites


@dataclass(frozen=True)
class VirtualSite:
    """Virtual tokens at one attention or embedding.

    Attributes:
        path: of the module.
        kind: of the site.
        method: id of the pass.
        tokens: how many.
        shape: of one of them: `[h_kv, d]` at an attention, `[hidden]` at an embedding.
        numbers: that are stored here.
        norm: mean length of a key column over all heads, or of a row.
        beside: mean length of a value column, or of the rows of the vocabulary.
    """

    path: str
    kind: str
    method: str
    tokens: int
    shape: tuple[int, ...]
    numbers: int
    norm: float
    beside: float


def virtual_sites(graph: Graph) -> tuple[VirtualSite, ...]:
    """The virtual tokens of a graph with values, in the order of the model."""
    place = {site.path: number for number, site in enumerate(sites(graph))}
    return tuple(_described(graph, item) for item in sorted(rest(graph), key=lambda item: place[item.site.path]))


@torch.no_grad()
def _described(graph: Graph, item: Fold) -> VirtualSite:
    site = item.site
    if site.kind == EMBEDDING:
        rows, table = item.rows().float(), value_of(graph, site.weight).float()
        lengths = rows.norm(dim=1).mean(), table.norm(dim=1).mean()
        return VirtualSite(
            site.path, site.kind, item.owner, len(rows), (rows.shape[1],), rows.numel(), *map(float, lengths)
        )
    columns = item.columns()
    heads, count, size = columns.k.shape
    lengths = tuple(tensor.float().transpose(0, 1).flatten(1).norm(dim=1).mean() for tensor in (columns.k, columns.v))
    numbers = columns.k.numel() + columns.v.numel()
    return VirtualSite(
        site.path, site.kind, item.owner, count, (heads, size), numbers, float(lengths[0]), float(lengths[1])
    )
