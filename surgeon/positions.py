"""Where a graph numbers its tokens, how far it can count, and how to make it start later."""

from __future__ import annotations

from typing import Any

import torch

from surgeon import lengths
from surgeon.edit import Edit
from surgeon.graph import Graph, copied
from surgeon.sites import Site

aten = torch.ops.aten
INPUT = "position_ids"


def shift(graph: Graph, owner: str, count: int) -> None:
    """Tokens that were numbered from 0 are numbered from `count`: given positions, and those the graph counts itself.

    An encoder's tokens keep their numbers where there is a decoder.
    """
    for node in [n for n in graph.trunk.nodes if n.op == "placeholder" and n.target == INPUT]:
        edit = Edit.of_trunk(graph, owner, node)
        edit.replace(edit.add(edit.y, count))
    length = lengths.length_of(graph)
    for node in lengths.positions(graph.trunk, length):
        _moved(Edit.of_trunk(graph, owner, node), count)
    for shared, paths in graph.groups():
        if not lengths.positions(shared, length):
            continue
        part = copied(shared)[0]
        for node in lengths.positions(part, length):
            _moved(Edit(graph, part, paths, owner, Site("", "", paths[0], node.name), 0), count)
        graph.layers.update(dict.fromkeys(paths, part))


def _moved(edit: Edit, count: int) -> None:
    edit.replace(edit.add(edit.y, count))


def limit(graph: Graph) -> int:
    """How many positions the model has, 0 for no limit: rows of a table, or what its config names."""
    config: Any = graph.config.get_text_config(decoder=True)
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx"))
    return next((int(number) for number in found if isinstance(number, int) and number > 0), 0)
