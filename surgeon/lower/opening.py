"""What an export takes: from what users name to a graph with values and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgeon import api
from surgeon.graph import Graph
from surgeon.model import SurgeonModel
from surgeon.ranks import at_rank


def opened(work: str | Path | SurgeonModel, base: str | Path | None, rank: int | None) -> tuple[Graph, Any]:
    """The graph and the tokenizer of a folder or a loaded model.

    Args:
        work: a work folder, a PEFT adapter folder, a plain checkpoint, or a loaded model.
        base: the base of an adapter, where the folder's own record of it no longer holds.
        rank: of adapters that have every rank (DyLoRA); their highest if not given.
    """
    if isinstance(work, SurgeonModel):
        graph, tokenizer = work.trained(), work.tokenizer
    else:
        graph = api.read(work, base=base)
        tokenizer = api.tokenizer_of(work) or api.tokenizer_of(graph.source)
    return (graph if rank is None else at_rank(graph, rank)), tokenizer
