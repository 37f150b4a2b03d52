"""What a model does while it runs that a trace must not contain: noise of training, constants, reads of values.

Everything here is switched on for the length of one trace; the traced classes are not changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

_NOISE = (
    "layerdrop", "encoder_layerdrop", "decoder_layerdrop", "jitter_noise", "router_jitter_noise", "input_jitter_noise",
)  # fmt: skip
_LONGEST_LITERAL = 64


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers and torch.export warn about what capture does on purpose."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def silence_noise(model: nn.Module, training: bool) -> list[str]:
    """Train mode, so that dropout is in the graph, without the other randomness of training; say what was left out."""
    model.train(training)
    if not training:
        return ["captured as in evaluation, without dropout: training draws other random numbers"]
    notes = []
    for path, module in model.named_modules():
        for name in _NOISE:
            value = module.__dict__.get(name)
            if isinstance(value, float) and value:
                module.__dict__[name] = 0.0
                notes.append(f"{path}.{name} = {value} is left out")
    return notes


@contextmanager
def literals() -> Iterator[None]:
    """Numbers written in a model's code become nodes; distributions do not look at their arguments' values."""
    checked = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        with _Literals():
            yield
    finally:
        Distribution.set_default_validate_args(checked)


class _Literals(torch.overrides.TorchFunctionMode):
    """Numbers written in a model's code become factory nodes, which run on any device, rather than constants.

    Layer drop, whose probability is 0 here, is given a constant instead of a random number to compare with it.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.rand and args and not isinstance(args[0], int) and len(args[0]) == 0:
            return 1.0
        if func is torch.tensor and args:
            made = _literal(args[0], kwargs.get("dtype"), kwargs.get("device"))
            if made is not None:
                return made
        if func is torch.Tensor.bfloat16:
            return torch.ops.surgeon.bfloat16(args[0])
        if func is torch.Tensor.__getitem__:
            args = (args[0], _index(args[1], args[0].device))
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()  # `.data` itself hides what is done to it from the trace
        return func(*args, **kwargs)


def _literal(data: Any, dtype: torch.dtype | None, device: Any) -> torch.Tensor | None:
    """`torch.tensor(data)` as `scalar_tensor` and `stack` nodes, or None for anything but numbers in small lists."""
    numbers = _flat(data)
    if numbers is None or len(numbers) > _LONGEST_LITERAL:
        return None
    dtype = dtype or _common_dtype(numbers)
    if not isinstance(data, (list, tuple)):
        return torch.scalar_tensor(data, dtype=dtype, device=device)
    parts = [_literal(item, dtype, device) for item in data]
    known = [part for part in parts if part is not None]
    return torch.stack(known) if known and len(known) == len(parts) else None


def _index(index: Any, device: torch.device) -> Any:
    """An index whose lists of numbers are tensors of the model's device."""
    if isinstance(index, tuple):
        return tuple(_index(item, device) for item in index)
    made = _literal(index, None, device) if isinstance(index, list) else None
    return index if made is None else made


def _flat(data: Any) -> list[Any] | None:
    if isinstance(data, (bool, int, float, torch.SymInt, torch.SymFloat)):
        return [data]
    if not isinstance(data, (list, tuple)):
        return None
    found = [_flat(item) for item in data]
    return None if any(item is None for item in found) else [n for item in found if item for n in item]


def _common_dtype(numbers: list[Any]) -> torch.dtype:
    if any(isinstance(number, (float, torch.SymFloat)) for number in numbers):
        return torch.get_default_dtype()
    return torch.bool if numbers and all(isinstance(number, bool) for number in numbers) else torch.int64
