"""Values that no checkpoint stores: rotary frequencies, position ids, scales, and heads that are new."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from transformers import PreTrainedModel

_FLAG = "_is_hf_initialized"


def materialise_buffers(model: PreTrainedModel) -> None:
    """Give every non-persistent buffer of a meta model its value on the CPU; parameters stay where they are.

    The values are computed by the model's own `_init_weights`, as `from_pretrained` does it.
    """
    _initialise(model, [])


def transient(model: PreTrainedModel) -> Callable[[str], torch.Tensor | None]:
    """Full name → the value of a non-persistent buffer of a meta model, computed when first asked for; else None."""

    @functools.cache
    def values() -> dict[str, torch.Tensor]:
        scratch = copy.deepcopy(model)
        materialise_buffers(scratch)
        return {name: buffer.detach() for name, buffer in scratch.named_non_persistent_buffers()}

    names = {name for name, _ in model.named_non_persistent_buffers()}
    return lambda name: values()[name] if name in names else None


def initialise_missing(model: PreTrainedModel, names: Iterable[str], seed: int) -> dict[str, torch.Tensor]:
    """Fresh CPU values of these parameters or buffers by the model's own `_init_weights`; `model` is not changed.

    Deterministic in `seed`; torch's global generator is left as it was.
    """
    names = list(names)
    if not names:
        return {}
    # A copy of a meta model costs no memory, and leaves no trace in the one that is captured.
    scratch = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _initialise(scratch, names)
    state = scratch.state_dict()
    return {name: state[name] for name in names}


def _initialise(model: PreTrainedModel, names: list[str]) -> None:
    transient = [name for name, _ in model.named_non_persistent_buffers()]
    for module in model.modules():
        module.__dict__.pop(_FLAG, None)
    for name in (*names, *transient):
        _place(model, name)
    fresh = {*names, *transient}
    kept = [tensor for name, tensor in _named_tensors(model) if name not in fresh]
    for tensor in kept:
        setattr(tensor, _FLAG, True)
    try:
        model.initialize_weights()
    finally:
        for tensor in kept:
            tensor.__dict__.pop(_FLAG, None)
        for module in model.modules():
            module.__dict__.pop(_FLAG, None)


def _named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _place(model: PreTrainedModel, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    value = torch.empty_like(old, device="cpu")
    if leaf in module._parameters:
        value = torch.nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module, leaf, value)
