"""Choosing the next token: temperature, top-k, top-p, penalties, seeds and logprobs, request by request.

The order is that of transformers: penalties, temperature, top-k, top-p. Every request draws from a generator of its
own, so what it is given does not depend on who else is served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Sampling:
    """What a request asks for.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens with this much probability.
        top_k: sample from this many of the likeliest tokens, 0 for all.
        seed: of the request's generator; None for one that nobody can repeat.
        presence: taken off the scores of tokens that were generated already.
        frequency: taken off the scores of tokens as often as they were generated.
        bias: added to the scores of tokens.
        logprobs: how many of the likeliest tokens to report with each token; −1 for no report.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int = -1

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is the answer, and nothing else is asked."""
        return self.temperature == 0 and self.logprobs < 0 and not (self.presence or self.frequency or self.bias)


@dataclass(frozen=True)
class Choice:
    """A chosen token, its log probability, and those of the likeliest ones (none unless asked for)."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling, self._counts = sampling, Counter[int]()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> Choice:
        """The next token after logits `[vocab]`; log probabilities are the model's own, before any of the options."""
        wanted, scores = self.sampling, logits.float()
        report = torch.log_softmax(scores, -1) if wanted.logprobs >= 0 else None
        scores = self._penalised(scores)
        token = int(scores.argmax()) if wanted.temperature == 0 else self._drawn(scores)
        self._counts[token] += 1
        if report is None:
            return Choice(token)
        top = report.topk(min(wanted.logprobs, len(report))) if wanted.logprobs else None
        likeliest = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Choice(token, float(report[token]), likeliest)

    def _penalised(self, scores: torch.Tensor) -> torch.Tensor:
        wanted = self.sampling
        if not (wanted.bias or ((wanted.presence or wanted.frequency) and self._counts)):
            return scores
        scores = scores.clone()
        for token, value in wanted.bias.items():
            scores[token] += value
        for token, count in self._counts.items():
            scores[token] -= wanted.presence + wanted.frequency * count
        return scores

    def _drawn(self, scores: torch.Tensor) -> int:
        wanted = self.sampling
        scores = scores / wanted.temperature
        if 0 < wanted.top_k < len(scores):
            scores = scores.masked_fill(scores < scores.topk(wanted.top_k).values[-1], float("-inf"))
        probabilities = torch.softmax(scores, -1)
        if wanted.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= wanted.top_p
            ordered[beyond] = 0.0
            probabilities = torch.zeros_like(probabilities).scatter(0, index, ordered)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
