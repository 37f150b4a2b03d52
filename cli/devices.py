"""`--device`: what a command computes on."""

from __future__ import annotations

from surgeon.errors import UsageError


def chosen(text: str) -> str:
    """The device that was asked for; "" is a GPU if there is one.

    Raises:
        UsageError: this machine has no such device.
    """
    import torch

    where = text or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        what = f"cannot use the device '{where}': {str(error).splitlines()[0]}"
        raise UsageError(what, "--device", "cpu, or surgeon doctor to see what there is") from error
    return where
