"""The model of a server: one graph with the slora pass, its pool, and steps over batches of requests."""

from __future__ import annotations

from typing import Any

import torch

from surgeon import module, numbering, positions, run
from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.graph import Graph, sweep
from surgeon.packed import packed_products
from surgeon.passes import make
from surgeon.serve import bypass, paged, partition, shared
from surgeon.serve.adapters import Loader
from surgeon.serve.batch import Batches, Piece
from surgeon.serve.layout import Layout
from surgeon.serve.memory import Memory
from surgeon.serve.partition import Share
from surgeon.serve.pool import Pool
from surgeon.serve.sequence import Sequence
from surgeon.sites import ATTENTION, EXPERTS, Site, sites

assert bypass  # registers the operators
assert paged
assert shared
FIXED = 32
"""Tokens of every step of a deterministic server: products of one shape, whatever is asked."""


class Engine:
    """One base model in memory, ready for requests with any adapters of it.

    Attributes:
        base: the graph it was made from.
        layout: of the pool.
        memory: the pool and who is in it.
        loader: reads adapters for it.
        limit: tokens a text may have, 0 for no limit.
    """

    def __init__(
        self,
        base: Graph,
        *,
        pool_bytes: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        deterministic: bool = False,
        targets: str = "*",
        block: int = 0,
        share: Share | None = None,
    ) -> None:
        """Load the model.

        Args:
            base: a graph with values and no adapters.
            pool_bytes: size of the pool.
            dtype: of the model; None keeps the checkpoint's.
            device: where the model and the pool are.
            deterministic: whether a request's result has the same bits in any batch.
            targets: the linears that adapters may change.
            block: tokens per page, 0 for what fits the model.
            share: which part of the model this process computes; None for all of it.

        Raises:
            UnsupportedError: the model cannot be served, with the place that cannot.
        """
        if deterministic and sites(base, EXPERTS):
            what = "a deterministic server has no experts: how many tokens one sees depends on the others"
            raise UnsupportedError(what, base.config.model_type, "leave --deterministic out")
        graph = run.apply(base, make("slora", targets=targets, block=block, each=deterministic))
        step: Any = graph.applied[-1]
        linears = tuple(s for s in run.chosen_sites(base, step)[0] if s.kind != ATTENTION)
        self.base, self.deterministic, self.share = base, deterministic, share
        self.layout, swept = _layout(base, linears, step), _swept(graph)
        self.roles: dict[str, str] = {}
        if share is not None:
            _check_shared(base, targets)
            self.roles = partition.roles(base, share.size)
            self.layout = partition.layout_of(self.layout, share)
            swept = partition.partitioned(swept, self.roles, self.layout, share)
        self.model = module.load(swept, dtype=dtype, device=device)
        held = self.model.model_dtype
        pages = max(1, pool_bytes // (self.layout.page * held.itemsize))
        self.memory = Memory(Pool(pages, self.layout.page, held, device), self.layout)
        self.loader = Loader(base, self.layout, held)
        self.limit = positions.limit(base)
        self.batches = Batches(self.memory, start=numbering.first(base), pad=FIXED if deterministic else 0)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.base.config.get_text_config().vocab_size)

    def needs(self, sequence: Sequence) -> int:
        """Pages a request may ever need, without its adapter."""
        return self.layout.pages(sequence.most)

    def fits(self, sequence: Sequence) -> bool:
        """Whether a request can begin now and be sure to end."""
        return self.memory.fits(sequence.packed, self.needs(sequence))

    def admit(self, sequence: Sequence) -> None:
        """Begin with a request; raises PoolFull where `fits` is false."""
        self.memory.admit(sequence.owner, sequence.packed, self.needs(sequence))

    def release(self, sequence: Sequence) -> None:
        """Done with a request."""
        self.memory.release(sequence.owner, sequence.packed)

    def stop(self) -> None:
        """Nobody asks any more."""

    @torch.inference_mode()
    def step(self, pieces: list[Piece]) -> dict[str, torch.Tensor]:
        """Compute some tokens of each request; returns the logits `[vocab]` after the last of each, by owner.

        Raises:
            SurgeonError: more tokens than a deterministic step has.
        """
        pieces = sorted(pieces, key=lambda piece: piece[0].order)
        count = sum(number for _, number in pieces)
        if self.deterministic and count > FIXED:
            raise SurgeonError(f"a step of {count} tokens, and a deterministic one has {FIXED}")
        for sequence, number in pieces:
            self._grow(sequence, sequence.done + number)
        given = self.batches.make(pieces)
        with packed_products(not self.deterministic):
            results = self.model(*[given[name] for name in self.model.graph.inputs])
        logits = results[0][0]
        if "slora.keep" not in self.model.graph.inputs:
            logits = logits[given["slora.keep"]]
        logits = logits.cpu()  # tokens are drawn there, by generators that give the same ones everywhere
        for sequence, number in pieces:
            sequence.done += number
        return {sequence.owner: logits[place] for place, (sequence, _) in enumerate(pieces)}

    def _grow(self, sequence: Sequence, tokens: int) -> None:
        """Pages for so many tokens."""
        missing = self.layout.blocks(tokens) - len(sequence.pages)
        width = len(self.layout.attentions)
        if missing > 0:
            taken = self.memory.grow(sequence.owner, missing * width)
            sequence.pages += [taken[start : start + width] for start in range(0, len(taken), width)]


def _check_shared(base: Graph, targets: str) -> None:
    if targets != "*":
        raise UsageError(
            f"the targets are {targets}", "--tensor-parallel", "every linear takes part: leave --targets out"
        )
    quantised = next((spec.held for spec in base.tensors.values() if spec.held is not None), None)
    if quantised is not None:
        what = "weights in codes are not split over processes"
        raise UnsupportedError(what, quantised.owner, "leave --quantise out, or serve it in one process")


def _layout(base: Graph, linears: tuple[Site, ...], step: Any) -> Layout:
    from surgeon import virtual

    embedding = virtual.token_embedding(base, "input_ids")
    hidden = embedding.out if embedding is not None else 0
    return Layout(tuple(sites(base, ATTENTION)), linears, step.block, step.page, hidden)


def _swept(graph: Graph) -> Graph:
    """The graph without what the pass has replaced: masks and attentions that nobody reads."""
    result = graph.rewritable()
    for part in (result.trunk, *(part for part, _ in result.groups())):
        sweep(part)
    return result
