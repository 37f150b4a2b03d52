"""Triton's interpreter beside its compiler in one process.

What it shows is whether the arithmetic, the masks and the addresses are right. What it does not show:

* bf16 arithmetic: a bf16 is a uint16 there, and a sum or a `tl.dot` of them is silently wrong. A kernel that may be
  given bf16 has a constant `UPCAST` that turns loaded tiles into fp32; a bf16 store truncates.
* races: programs run one after another. A tile of the result is owned by one program; nothing is added to memory.
* stores past a tensor: the tests put NaN around every buffer (`tests/kernels/conftest.py`).
* tf32 and K < 16 in `tl.dot`, which a compiler refuses: compiling ahead of time shows it (`surgeon.kernels.aot`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections.abc import Iterator
from typing import Any


def interpreted(function: types.FunctionType) -> Any:
    """Triton's InterpretedFunction, to be called and launched within `interpreting` only."""
    return _class()(function)


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Within it Triton's language acts on CPU tensors, its own library (`tl.sum`, `tl.zeros`, …) too."""
    import triton.language as tl
    from triton.runtime.interpreter import _patch_lang

    swapped = [(owner, name, vars(owner)[name]) for owner, name, _ in _library()]
    for owner, name, function in _library():
        setattr(owner, name, function)
    patched = _patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        yield
    finally:
        patched.restore()
        for owner, name, function in swapped:
            setattr(owner, name, function)


@functools.cache
def _class() -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    class Interpreted(InterpretedFunction):
        """Patches nothing when a kernel calls it: Triton's own patches the language for good, call after call."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.rewrite()(*args, **kwargs)

    return Interpreted


@functools.cache
def _library() -> list[tuple[Any, str, Any]]:
    """Where a compiled function of Triton's library stands, and the interpreted one to put in its place."""
    importlib.import_module("triton.experimental.gluon")  # a launch would import it, which fails after the swap
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    made: dict[int, Any] = {}
    found = []
    for owner in (tl, tl.standard, tl.random, tl.tensor):
        for name, value in vars(owner).items():
            if isinstance(value, JITFunction):
                made.setdefault(id(value), interpreted(value.fn))
                found.append((owner, name, made[id(value)]))
    return found
