"""Decoding: one token for every request at a time, on a GPU as one recorded graph.

All that a step reads and writes lies in tensors that stay where they are, and it moves them on by itself: the tokens it
found are those it reads next. The first step runs as it is, which lets libraries make their workspaces; the second is
recorded as a CUDA graph, and from then on a token is one launch from Python in place of several hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from surgeon.artifact.cache import Cache
from surgeon.kernels.pages import POSITION, plan

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Steps:
    """The steps of a batch.

    Args:
        run: (ids `[b, 1]`, positions `[b, 1]`, segments, slots) → logits `[b, vocab]`.
        cache: of the requests, the prompts in it.
        tokens: the first new token of each `[b]`.
        lengths: of the prompts.
        first: the position of a text's first token.
        choose: logits → tokens.
    """

    def __init__(
        self,
        run: Run,
        cache: Cache,
        tokens: torch.Tensor,
        lengths: Sequence[int],
        first: int,
        choose: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._run, self._choose, self._places = run, choose, cache.slots
        device = cache.device
        self.ids = tokens[:, None].clone()
        self.segments = plan([(1, length) for length in lengths]).to(device)
        self.positions = torch.tensor(lengths, device=device)[:, None] + first
        self.slots = self._where()
        self._warm = False
        self._recorded: torch.cuda.CUDAGraph | None = None

    def advance(self) -> torch.Tensor:
        """The next token of every request, `[b]`."""
        if self._recorded is None and self._warm and self.ids.is_cuda:
            self._record()
        if self._recorded is not None:
            self._recorded.replay()
        else:
            self._step()
            self._warm = True
        return self.ids[:, 0]

    def _step(self) -> None:
        logits = self._run(self.ids, self.positions, self.segments, self.slots)
        self.ids.copy_(self._choose(logits)[:, None])
        self.positions += 1
        self.segments[:, POSITION] += 1
        self.slots.copy_(self._where())

    def _where(self) -> torch.Tensor:
        at = self.segments[:, POSITION, None].long().clamp(max=self._places.shape[1] - 1)
        return self._places.gather(1, at)[:, 0]

    def _record(self) -> None:
        self._recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._recorded):
            self._step()
