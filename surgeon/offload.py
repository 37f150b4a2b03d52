"""AdamW whose moments lie in files that are mapped into memory: the system writes them out when it needs the room."""

from __future__ import annotations

import importlib.util
import mmap
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import AdamW, adamw
from torch.utils.weak import WeakTensorKeyDictionary

MOMENTS = ("exp_avg", "exp_avg_sq")
ARENA = 1 << 26
"""Bytes that are mapped at once, at least: a map of its own for every tensor would run out of file handles."""
State = dict[str, Any]


class OffloadedAdamW(AdamW):
    """torch's AdamW to the bit, with its state out of the memory that trains (after Dettmers et al. 2023, §3).

    The moments of all parameters are in files without a name, gone when the process is; the step moves those of one
    parameter to its device and back. Between steps none of their pages counts as memory of the process.

    Args:
        params: as for AdamW.
        folder: where the files are; a disk, not a file system in memory.
        options: of AdamW; amsgrad is not offered.
    """

    def __init__(self, params: Iterable[Any], *, folder: str | Path | None = None, **options: Any) -> None:
        self._folder = folder
        self._arena: mmap.mmap | None = None
        self._used = 0
        self._places: Any = WeakTensorKeyDictionary()
        super().__init__(params, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, a parameter at a time."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As AdamW does, into files."""
        super().load_state_dict(dict(state_dict))
        for parameter, state in self.state.items():
            self._adopt(parameter, state)

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state: State = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
        self._adopt(parameter, state)
        far = [state[name] for name in MOMENTS]
        near = [moment.to(parameter.device) for moment in far]
        adamw(
            [parameter], [gradient], [near[0]], [near[1]], [], [state["step"]], foreach=False, fused=group["fused"],
            amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
        )  # fmt: skip
        for moment, updated in zip(far, near, strict=True):
            if updated is not moment:
                moment.copy_(updated)
        self._release(parameter)

    def _adopt(self, parameter: Tensor, state: State) -> None:
        """Moments that are not in a file yet (new, loaded, or cut with their parameter) are moved into one."""
        if not state or (parameter in self._places and state[MOMENTS[0]].data_ptr() == self._places[parameter][3]):
            return
        for name, mapped in self._mapped(parameter).items():
            state[name] = mapped.copy_(state[name]) if name in state else mapped
        self._release(parameter)

    def _mapped(self, parameter: Tensor) -> dict[str, Tensor]:
        """Moments of 0."""
        size = -(-parameter.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._arena is None or self._used + 2 * size > len(self._arena):
            with tempfile.TemporaryFile(dir=self._folder) as file:
                file.truncate(max(ARENA, 2 * size))
                self._arena, self._used = mmap.mmap(file.fileno(), max(ARENA, 2 * size)), 0
        start, self._used = self._used, self._used + 2 * size
        options: Any = {"dtype": parameter.dtype, "count": parameter.numel()}
        found = {
            name: torch.frombuffer(self._arena, offset=start + number * size, **options).view(parameter.shape)
            for number, name in enumerate(MOMENTS)
        }
        self._places[parameter] = (self._arena, start, 2 * size, found[MOMENTS[0]].data_ptr())
        return found

    def _release(self, parameter: Tensor) -> None:
        """Give the pages back: the file has what they hold."""
        arena, start, size, _ = self._places[parameter]
        if hasattr(mmap, "MADV_DONTNEED"):
            arena.madvise(mmap.MADV_DONTNEED, start, size)


def paged_name(device: str) -> str:
    """transformers' name of the paged optimiser on a device, "" where it is the one above."""
    return "paged_adamw_32bit" if device == "cuda" and importlib.util.find_spec("bitsandbytes") else ""
