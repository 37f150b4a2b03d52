"""The kernels: one per file, each with `reference()`, `can_use()`, the kernel and its launch. See README.md."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def files() -> list[ModuleType]:
    """The files of kernels: those that say what they are compiled for ahead of time, in `VARIANTS`."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"surgeon.kernels.{name}") for name in names]
    return [module for module in modules if hasattr(module, "VARIANTS")]
