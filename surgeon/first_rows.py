"""First values of virtual tokens: rows of the base's own embedding, drawn, or named by a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.initial import generator_of
from surgeon.sites import Site
from surgeon.virtual import embedded

FREQUENT = 5000
VOCABULARY, TEXT, LABELS = "vocabulary", "text:", "labels:"


@dataclass(frozen=True)
class FirstRows:
    """`[count, h]` from the base's embedding; reads it when called.

    Attributes:
        init: "vocabulary", "text:…" or "labels:a|b|…".
        graph: a graph that has the embedding.
        site: the embedding.
        count: number of rows.
        seed, name: of the random numbers.
        tokenizer: for texts and labels; None if the model has none.
    """

    init: str
    graph: Graph
    site: Site
    count: int
    seed: int
    name: str
    tokenizer: Any = None

    def __call__(self) -> torch.Tensor:
        """Read them.

        Raises:
            UsageError: the model has no tokenizer, or the text no tokens, or there are more labels than rows.
        """
        if self.init.startswith(TEXT):
            return self._embedded(self._text(self.init.removeprefix(TEXT)))
        labels = self.init.removeprefix(LABELS).split("|") if self.init.startswith(LABELS) else []
        if len(labels) > self.count:
            what = f"{len(labels)} labels do not fit into {self.count} virtual tokens"
            raise UsageError(what, f"--init {self.init}", f"--tokens {len(labels)} or more")
        means = [self._embedded(self._ids(label, special=False)).mean(0, keepdim=True) for label in labels]
        return torch.cat([*means, self._embedded(self._frequent(self.count - len(labels)))])

    def _text(self, text: str) -> torch.Tensor:
        """Ids of the text with its special tokens, cut or repeated to the count, as in PEFT."""
        ids = self._ids(text, special=True)
        return ids.repeat(-(-self.count // len(ids)))[: self.count]

    def _ids(self, text: str, *, special: bool) -> torch.Tensor:
        if self.tokenizer is None:
            what = f"the first values are to come from the text '{text[:40]}', and the model has no tokenizer"
            raise UsageError(
                what, self.graph.source or self.site.path, "put tokenizer.json beside the config, or --init vocabulary"
            )
        ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        if not ids:
            raise UsageError(
                "the text of the first values has no tokens", f"--init {self.init}", "give a text with words"
            )
        return torch.tensor(ids)

    def _frequent(self, count: int) -> torch.Tensor:
        """Ids drawn from the most frequent, which come first in a vocabulary; none twice while there are enough."""
        frequent, generator = min(FREQUENT, self.site.inp), generator_of(self.seed, self.name)
        if count > frequent:
            return torch.randint(frequent, (count,), generator=generator)
        return torch.randperm(frequent, generator=generator)[:count]

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        return embedded(self.graph, self.site, ids)
