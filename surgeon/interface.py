"""The attention and the mask that transformers calls while a model is captured.

Registered once as the attention implementation "surgeon". The mask function returns the key padding alone and hangs the
rest, described by `surgeon.masks`, on it; the attention function turns both into one `surgeon::attention` node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from surgeon import masks
from surgeon.errors import UnsupportedError
from surgeon.masks import Mask, MaskFunction

NAME = "surgeon"
# Tensors that models pass on to every attention and that only other implementations than SDPA read.
_HARMLESS = ("position_ids", "cache_position")


@dataclass
class Record:
    """What the interface saw during one trace.

    Attributes:
        described: mask functions with the description they were given, to be checked on real indices.
        notes: masks that stayed explicit.
    """

    described: list[tuple[MaskFunction, Mask]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Evaluate every description against transformers' own mask function (see `masks.check`)."""
        for function, mask in self.described:
            masks.check(function, mask)


_records: list[Record] = []


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    """Collect a `Record` of the masks that are built inside the block."""
    record = Record()
    _records.append(record)
    try:
        yield record
    finally:
        _records.pop()


def _mask(
    batch_size: Any,
    q_length: Any,
    kv_length: Any,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "meta",
    **kwargs: Any,
) -> torch.Tensor:
    """Key padding `[b, s]` carrying its description, or an explicit boolean mask `[b, 1, t, s]`."""
    description = masks.describe(mask_function)
    if description is None:
        _records[-1].notes.append(f"explicit mask: {getattr(mask_function, '__qualname__', mask_function)}")
        options = {k: v for k, v in kwargs.items() if k in ("use_vmap", "local_size", "config")}
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, device=device, **options,
        )  # fmt: skip
    _records[-1].described.append((mask_function, description))
    if attention_mask is None:
        keys = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    else:
        keys = torch.ops.aten.alias.default(attention_mask)
    keys.surgeon_mask = description  # type: ignore[attr-defined]
    return keys


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """One `surgeon::attention` node; returns `[b, t, h, d_v]` as transformers expects."""
    for name, given in others.items():
        if isinstance(given, torch.Tensor) and name not in _HARMLESS:
            raise UnsupportedError(
                f"the attention takes {name}, which the attention node has not", type(module).__name__
            )
    description: Mask | None = getattr(attention_mask, "surgeon_mask", None)
    keys, bias = attention_mask, position_bias
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        description = Mask(causal=bool(causal))
    elif description is None:
        keys, bias, description = None, _both(attention_mask, position_bias, query), Mask()
    output = torch.ops.surgeon.attention(
        query, key, value, keys, bias, s_aux,
        scale=float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        causal=description.causal, window=description.window, chunk=description.chunk,
        softcap=float(softcap or 0.0), dropout_p=float(dropout), role=_role(module, query, key),
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def _both(mask: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """An explicit mask and a position bias as one additive bias."""
    if bias is None:
        return mask
    if mask.dtype != torch.bool:
        return mask + bias
    return bias.to(like.dtype).masked_fill(~mask, torch.finfo(like.dtype).min)


def _role(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> str:
    """Cross where keys come from another sequence: transformers' classes say so, or the lengths differ."""
    names = (type(module).__name__, getattr(module, "is_cross_attention", False))
    if "Cross" in names[0] or names[1] or not _same_length(query, key):
        return "cross"
    return "self"


def _same_length(query: torch.Tensor, key: torch.Tensor) -> bool:
    lengths = [size.node.expr if isinstance(size, torch.SymInt) else size for size in (query.shape[2], key.shape[2])]
    return bool(lengths[0] == lengths[1])


def _experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """A mixture of experts over tokens sorted by expert: two or three `surgeon::expert_linear` nodes, any routing."""
    each = top_k_index.shape[-1]
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    states = _through(module, first, hidden_states[order // each], ids)
    states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
    states = _through(module, "down_proj", states, ids)
    if getattr(module, "has_post_expert_norm", False):  # older transformers do not set it
        states = module.post_expert_norm(states)
    states = states * top_k_weights.reshape(-1)[order][:, None]
    states = states[torch.argsort(order)].view(-1, each, hidden_states.shape[-1]).sum(1)
    return states.to(hidden_states.dtype)


def _through(module: torch.nn.Module, name: str, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    return torch.ops.surgeon.expert_linear(
        rows, getattr(module, name), ids, bias, transposed=bool(module.is_transposed)
    )


AttentionInterface.register(NAME, _attention)
ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
AttentionMaskInterface.register(NAME, _mask)
