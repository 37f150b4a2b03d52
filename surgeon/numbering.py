"""The positions a model gives its tokens where the user gives none.

Most count from 0. RoBERTa and its kin count the tokens that are no padding, from the row after the padding's; OPT and
BioGPT count what their mask shows. With virtual tokens in front Hugging Face's models see embeddings in place of ids,
and no ids to tell padding by: they number everything, as PEFT's prompts do.
"""

from __future__ import annotations

import torch
from torch import fx

from surgeon.graph import Graph, tag
from surgeon.wiring import inputs_of

aten = torch.ops.aten
INPUT = "position_ids"
BY_MASK = ("opt", "biogpt")


def default(graph: Graph, mask: torch.Tensor, ids: torch.Tensor | None = None, *, virtual: int = 0) -> torch.Tensor:
    """`position_ids` `[b, t]` of the first t tokens of a text.

    Args:
        graph: of the model.
        mask: 0 where there is padding.
        ids: the tokens, where they are at hand.
        virtual: how many virtual tokens the model puts in front; their positions are its own affair.
    """
    start, mask = first(graph), mask.long()
    if graph.config.model_type in BY_MASK:
        return mask.cumsum(-1) * mask - 1
    if start and not virtual:
        real = mask if ids is None else (ids != start - 1).long()
        return real.cumsum(-1) * real + start - 1
    return torch.arange(start, start + mask.shape[-1], device=mask.device).expand(mask.shape)


def first(graph: Graph) -> int:
    """The position of the first token: the row after the padding's in a table of positions, else 0."""
    queue = [node for node in inputs_of(graph.trunk) if node.target == INPUT]
    while queue:
        for user in queue.pop().users:
            row = _padding_row(user)
            if row is not None:
                return row + 1
            if tag(user) is not None:
                queue.append(user)
    return 0


def _padding_row(node: fx.Node) -> int | None:
    """The row for padding that an embedding has."""
    is_table = node.target is aten.embedding.default and len(node.args) > 2
    row = node.args[2] if is_table else None
    return row if isinstance(row, int) and row >= 0 else None
