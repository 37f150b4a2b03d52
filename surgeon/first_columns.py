"""First values of a prefix: the keys and values that the model itself computes for a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.passes.base import ATTENTION, Pass

if TYPE_CHECKING:
    from surgeon.edit import Edit
    from surgeon.sites import Site


@dataclass(frozen=True)
class ReadKeys(Pass):
    """Keys and values of every attention as outputs `<path>.k` and `<path>.v` of the model, without its own."""

    name: ClassVar[str] = "read_keys"
    kinds: ClassVar[tuple[str, ...]] = (ATTENTION,)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """k, v → outputs, as the model computes them."""
        paths = {path: f"{path}{site.path[len(site.layer) :]}" for path in edit.paths}
        for position, word in ((1, "k"), (2, "v")):
            edit.model_output(edit.argument(position), {layer: f"{path}.{word}" for layer, path in paths.items()})


@dataclass
class TextColumns:
    """Keys and values `[h_kv, count, d]` of a text at every attention, by `<path>.k` and `<path>.v`.

    The text is tokenised with its special tokens and cut or repeated to the count. The model runs over it once, in an
    encoder-decoder over both sides.

    Attributes:
        text: what it says.
        count: number of columns.
        graph: the model, with the pass that asks.
        owner: id of that pass, which is left out.
        tokenizer: of the model, None if it has none.
    """

    text: str
    count: int
    graph: Graph
    owner: str
    tokenizer: Any
    known: dict[str, torch.Tensor] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        """The keys or values of one attention.

        Raises:
            UsageError: there is no tokenizer, or the text has no tokens.
        """
        if not self.known:
            self.known.update(self._run(self._ids()))
        return self.known[name].clone()

    def _ids(self) -> torch.Tensor:
        where = f"--init text:{self.text}"
        if self.tokenizer is None:
            raise UsageError("the model has no tokenizer to read a text with", where, "--init normal")
        ids = torch.tensor(self.tokenizer(self.text)["input_ids"], dtype=torch.long)
        if not len(ids):
            raise UsageError("the text has no tokens", where, "give it a few words")
        return ids.repeat(-(-self.count // len(ids)))[None, : self.count]

    @torch.no_grad()
    def _run(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        from surgeon import module, numbering, run
        from surgeon.strip import without

        graph = run.apply(without(self.graph, {self.owner}), ReadKeys())
        mask = torch.ones_like(ids)
        given = {"position_ids": numbering.default(graph, mask, ids), "token_type_ids": torch.zeros_like(ids)}
        given |= {name: mask if name.endswith("mask") else ids for name in graph.inputs if name not in given}
        runner = module.load(graph)
        results = dict(zip(graph.outputs, runner(*[given[name] for name in graph.inputs]), strict=True))
        return {name: value[0].float() for name, value in results.items() if value.dim() == 4}


@dataclass(frozen=True)
class FirstColumns:
    """Keys or values of one attention, as columns.

    Attributes:
        columns: of the model.
        name: which, `<path>.k`.
    """

    columns: TextColumns
    name: str

    def __call__(self) -> torch.Tensor:
        """Read them."""
        return self.columns.read(self.name)


@dataclass(frozen=True)
class FirstFeatures:
    """tanh(E Wᵀ + b) `[tokens, hidden]`, of the first values of E, W and b."""

    table: Callable[[], torch.Tensor]
    weight: Callable[[], torch.Tensor]
    bias: Callable[[], torch.Tensor]

    def __call__(self) -> torch.Tensor:
        """Compute them."""
        return torch.tanh(torch.nn.functional.linear(self.table(), self.weight(), self.bias()))


@dataclass(frozen=True)
class FirstWeight:
    """The last matrix W of an MLP, F Wᵀ + bias = the columns: the smallest that makes them, by least squares.

    Attributes:
        columns: `[h, tokens, d]`.
        features: F `[tokens, hidden]`.
        bias: `[h · d]`.
    """

    columns: FirstColumns
    features: Callable[[], torch.Tensor]
    bias: Callable[[], torch.Tensor]

    def __call__(self) -> torch.Tensor:
        """Solve for it, `[h · d, hidden]`."""
        wanted = self.columns().transpose(0, 1).flatten(1) - self.bias()
        solved: torch.Tensor = torch.linalg.lstsq(self.features().double(), wanted.double(), driver="gelsd").solution
        return solved.T.float().contiguous()
