"""Running a graph on shapes alone, to see that they fit."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch._subclasses import FakeTensorMode

from surgeon import module
from surgeon.graph import Graph
from surgeon.wiring import inputs_of


def dry_run(graph: Graph) -> tuple[tuple[int, ...], ...]:
    """The shapes of the outputs when every symbolic size of the inputs is another small number.

    Nothing is computed and no weight is read.

    Raises:
        RuntimeError: shapes do not fit; torch's message.
    """
    inputs = [node.meta["val"] for node in inputs_of(graph.trunk)]
    symbols = sorted({s for value in inputs for size in value.shape for s in _expression(size).free_symbols}, key=str)
    numbers = {symbol: 3 + i for i, symbol in enumerate(symbols)}
    shapes = [tuple(int(_expression(size).xreplace(numbers)) for size in value.shape) for value in inputs]
    with _quiet(), FakeTensorMode(), torch.no_grad():
        values = {
            name: torch.empty(spec.shape, dtype=spec.dtype or torch.float32) for name, spec in graph.tensors.items()
        }
        given = [torch.empty(s, dtype=_dtype(v.dtype)) for s, v in zip(shapes, inputs, strict=True)]
        results = module.load(dataclasses.replace(graph, values=values, inserted={}))(*given)
    return tuple(tuple(result.shape) for result in results)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs a traceback for every shape that does not fit before it raises."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _dtype(traced: torch.dtype) -> torch.dtype:
    """Inputs of the model's dtype follow it."""
    return torch.float32 if traced.is_floating_point else traced
