"""Runs of equal layers as one operator of the trace, because `torch.export` pays milliseconds for every operator.

A layer that was traced before is called like its equal was: its hidden states are what the layer before it returned,
everything else is the same tensors. So the operator of one such layer also returns what those behind it will return.
Every later call is held against what was expected of it, and one that differs begins a run of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from surgeon.signature import Given

OPERANDS = -1
"""Instead of the number of a call: the run's own operands."""


@dataclass
class Kind:
    """The first layer of a kind: where its trace lies and what it returned."""

    path: str
    shape: str
    outputs: list[Any]
    structure: pytree.TreeSpec
    indices: list[Any] = field(default_factory=list)
    followers: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> list[int]:
        """Positions of the outputs that are tensors."""
        return [i for i, leaf in enumerate(self.outputs) if isinstance(leaf, torch.Tensor)]


@dataclass
class Example:
    """The last call of a layer of some signature.

    Attributes:
        kind: of the layer.
        given: what it was called with.
        chained: positions of its arguments → positions of the results, of the layer before it, that they are.
    """

    kind: Kind
    given: Given
    chained: dict[int, int]


@dataclass
class Call:
    """One layer of a run.

    Attributes:
        path: of the layer.
        kind: its kind.
        key: of the arguments it is expected to be called with.
        sources: where each tensor it is given comes from: (`OPERANDS`, position among the run's operands), or (number
            of an earlier call of the run, position among the tensors which that returns).
        expected: position of an argument → the tensor or size expected there.
        versions: position → version of that tensor, which tells whether it was written to meanwhile.
        results: what it returns.
    """

    path: str
    kind: Kind
    key: str
    sources: dict[int, tuple[int, int]]
    expected: dict[int, Any]
    versions: dict[int, int] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)

    def expect(self, run: Run) -> None:
        """Remember the tensors it is to be given, once all of them exist."""
        for position, (number, index) in self.sources.items():
            made = run.operands if number == OPERANDS else run.calls[number].tensor_results()
            self.expected[position], self.versions[position] = made[index], made[index]._version

    def tensor_results(self) -> list[torch.Tensor]:
        """The tensors among its results."""
        return [self.results[i] for i in self.kind.tensors]

    def fits(self, path: str, given: Given) -> bool:
        """Whether a call is this one."""
        return (
            path == self.path
            and given.key == self.key
            and all(_same(leaf, given.leaves[position]) for position, leaf in self.expected.items())
            and all(given.leaves[position]._version == version for position, version in self.versions.items())
        )


def _same(expected: Any, found: Any) -> bool:
    both = isinstance(expected, torch.SymInt) and isinstance(found, torch.SymInt)
    return expected is found or (both and expected.node.expr == found.node.expr)


@dataclass
class Run:
    """Consecutive layers that are one operator in the trace.

    Attributes:
        calls: of its layers, in order.
        operands: tensors that the layers are given and none of them made.
        sizes: symbolic sizes that they are given.
        taken: how many of the calls took place.
    """

    calls: list[Call] = field(default_factory=list)
    operands: list[torch.Tensor] = field(default_factory=list)
    sizes: list[torch.SymInt] = field(default_factory=list)
    taken: int = 0

    @classmethod
    def beginning(cls, path: str, example: Example, behind: Iterable[tuple[str, Example | None]]) -> Run:
        """The run of a layer and of those behind it that can be foretold.

        Args:
            path: of the first layer.
            example: its call.
            behind: the layers that stand behind it in their list, each with the last call of one like it.
        """
        run = cls()
        run._append(path, example, {})
        for follower, like in behind:
            if like is None or not like.chained or not {*like.chained.values()} <= {*run.calls[-1].kind.tensors}:
                break
            run._append(follower, like, like.chained)
        return run

    def _append(self, path: str, example: Example, chained: dict[int, int]) -> None:
        given, sources = example.given, {}
        for position in given.tensors:
            if position in chained:
                sources[position] = len(self.calls) - 1, self.calls[-1].kind.tensors.index(chained[position])
            else:
                sources[position] = OPERANDS, self._operand(given.leaves[position])
        sizes = {position: given.leaves[position] for position in given.sizes}
        self.sizes += sizes.values()
        self.calls.append(Call(path, example.kind, given.key, sources, sizes))

    def _operand(self, tensor: torch.Tensor) -> int:
        for position, known in enumerate(self.operands):
            if known is tensor:
                return position
        self.operands.append(tensor)
        return len(self.operands) - 1

    def trace(self, number: int, keep: Callable[[Any, Any], None]) -> None:
        """Put the operator into the trace, as number `number`, and hand its results to the calls."""
        _STACK.append([call.kind.outputs[i] for call in self.calls for i in call.kind.tensors])
        try:
            made = iter(torch.ops.surgeon.layers(self.operands, self.sizes, number))
        finally:
            _STACK.pop()
        for call in self.calls:
            call.results = [next(made) if isinstance(leaf, torch.Tensor) else leaf for leaf in call.kind.outputs]
            for before, after in zip(call.kind.outputs, call.results, strict=True):
                keep(before, after)
        for call in self.calls:
            call.expect(self)


_STACK: list[list[torch.Tensor]] = []


def made_by_layers(xs: list[torch.Tensor], sizes: list[int], run: int) -> list[torch.Tensor]:
    """What the layers of the run being traced return: the structure of what their equals returned."""
    return [torch.empty_like(x) for x in _STACK[-1]]
