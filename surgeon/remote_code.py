"""Code that some checkpoints bring along (`auto_map` in config.json): it runs only where the user says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from surgeon.errors import UsageError

FLAG = "--trust-remote-code"
_TRUSTED: ContextVar[bool] = ContextVar("surgeon_trust_remote_code", default=False)


@contextmanager
def trust_remote_code(trusted: bool = True) -> Iterator[None]:
    """Within, code that lies beside a checkpoint is imported and run, with the rights of this process."""
    token = _TRUSTED.set(trusted)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def is_trusted() -> bool:
    """Whether such code may run here; the default is no."""
    return _TRUSTED.get()


def check_known(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UsageError for a model that only its own code describes, where that code may not run.

    Many checkpoints carry the code of an architecture that transformers knows by now: they open without it.
    """
    code = config.get("auto_map")
    if not code or is_trusted():
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") in CONFIG_MAPPING:
        return
    named = sorted({str(reference).rpartition(".")[0] for reference in code.values()}) if isinstance(code, dict) else []
    files = ", ".join(f"{name}.py" for name in named) or "auto_map"
    raise UsageError(
        f"transformers does not know {config.get('model_type')}, and the checkpoint's own code is not run unasked",
        f"{folder / 'config.json'} names {files}",
        f"read that code; if you trust it, {FLAG}",
    )


@contextmanager
def code_refused(folder: Path) -> Iterator[None]:
    """Transformers' refusal to run a tokenizer's own code, as a UsageError."""
    try:
        yield
    except ValueError as error:
        if is_trusted() or "trust_remote_code" not in str(error):
            raise
        hint = f"read that code; if you trust it, {FLAG}"
        raise UsageError("the tokenizer needs its own code, which is not run unasked", str(folder), hint) from error
