"""bitsandbytes' 4-bit tensors as they lie in a state dict, read and written without bitsandbytes.

For a weight `w`: `w` uint8 `[⌈n / 2⌉, 1]`, `w.absmax` (fp32, or uint8 with double quantisation), `w.quant_map` fp32
`[16]`, `w.quant_state.bitsandbytes__<nf4|fp4>` (JSON in uint8: quant_type, blocksize, dtype, shape), and with double
quantisation `w.nested_absmax`, `w.nested_quant_map` fp32 `[256]` and in the JSON nested_blocksize, nested_dtype and
nested_offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from surgeon.errors import UnsupportedError, UsageError
from surgeon.numerics import KINDS, NESTED_BLOCK, FourBit, Nested, code_book, dynamic_map

PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE = "quant_state.bitsandbytes__"
_AGAIN = "download or save the checkpoint again"


def part_names(name: str, stored: FourBit) -> list[str]:
    """The names of the tensors of one weight besides its own."""
    nested = PARTS if stored.nested is not None else PARTS[:2]
    return [*(f"{name}.{part}" for part in nested), f"{name}.{_STATE}{stored.kind}"]


def is_part(name: str) -> bool:
    """Whether a stored name is of a tensor that belongs to a 4-bit weight."""
    stem, _, leaf = name.rpartition(".")
    return leaf in PARTS or (leaf.startswith("bitsandbytes__") and stem.endswith(".quant_state"))


def to_state(name: str, stored: FourBit, dtype: torch.dtype, width: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of one weight by their names.

    Args:
        name: of the weight.
        stored: it.
        dtype: the weight's before it was quantised.
        width: least number of bytes of the JSON, which blanks fill: the size of the file is then known beforehand.
    """
    facts: dict[str, Any] = {
        "quant_type": stored.kind,
        "blocksize": stored.block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(stored.shape),
    }
    tensors = {name: stored.codes.reshape(-1, 1), f"{name}.absmax": stored.absmax}
    tensors[f"{name}.quant_map"] = code_book(stored.kind).clone()
    if stored.nested is not None:
        tensors[f"{name}.nested_absmax"] = stored.nested.scale
        tensors[f"{name}.nested_quant_map"] = dynamic_map().clone()
        facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        facts["nested_offset"] = stored.nested.offset.item()
    written = bytearray(json.dumps(facts).ljust(width).encode())
    tensors[f"{name}.{_STATE}{stored.kind}"] = torch.frombuffer(written, dtype=torch.uint8)
    return tensors


def from_state(name: str, tensors: Mapping[str, torch.Tensor], where: str = "") -> tuple[FourBit, torch.dtype]:
    """The weight, and its dtype before it was quantised.

    Args:
        name: of the weight.
        tensors: by stored names.
        where: the file, for messages.

    Raises:
        UsageError: a tensor is missing or does not fit the others.
        UnsupportedError: it was made with other code books or block sizes.
    """
    kind = next((kind for kind in KINDS if f"{name}.{_STATE}{kind}" in tensors), "")
    if not kind:
        raise UsageError(f"{name} has no quant_state", where, _AGAIN)
    facts = _facts(tensors[f"{name}.{_STATE}{kind}"], name, where)
    nested = None
    if "nested_offset" in facts:
        if facts["nested_blocksize"] != NESTED_BLOCK:
            raise UnsupportedError(f"{name} has a nested block size of {facts['nested_blocksize']}", where, _AGAIN)
        _require_map(tensors, f"{name}.nested_quant_map", dynamic_map(), where)
        offset = torch.tensor(float(facts["nested_offset"]), dtype=torch.float32)
        nested = Nested(_part(tensors, f"{name}.nested_absmax", where), offset)
    _require_map(tensors, f"{name}.quant_map", code_book(kind), where)
    shape, block = tuple(int(size) for size in facts["shape"]), int(facts["blocksize"])
    codes = _part(tensors, name, where).contiguous().view(torch.uint8).reshape(-1)
    stored = FourBit(codes, _part(tensors, f"{name}.absmax", where), shape, kind, nested, block)
    size = math.prod(shape)
    if len(codes) != (size + 1) // 2 or stored.absmax.numel() != -(-size // block):
        what = f"{name} holds {len(codes)} bytes and {stored.absmax.numel()} absmax for a shape of {list(shape)}"
        raise UsageError(what, where, _AGAIN)
    return stored, getattr(torch, facts["dtype"])


def _facts(packed: torch.Tensor, name: str, where: str) -> dict[str, Any]:
    try:
        facts = json.loads(bytes(packed.tolist()))
    except ValueError as error:
        raise UsageError(f"the quant_state of {name} is no JSON", where, _AGAIN) from error
    needed = {"blocksize", "dtype", "shape"} | ({"nested_blocksize"} if "nested_offset" in facts else set())
    if missing := needed - set(facts):
        raise UsageError(f"the quant_state of {name} lacks {', '.join(sorted(missing))}", where, _AGAIN)
    return dict(facts)


def _part(tensors: Mapping[str, torch.Tensor], name: str, where: str) -> torch.Tensor:
    if name not in tensors:
        raise UsageError(f"the checkpoint has no {name}", where, _AGAIN)
    return tensors[name]


def _require_map(tensors: Mapping[str, torch.Tensor], name: str, ours: torch.Tensor, where: str) -> None:
    found = _part(tensors, name, where).float().cpu()
    if found.shape != ours.shape or not torch.allclose(found, ours, atol=1e-6):
        raise UnsupportedError(f"{name} is another code book than bitsandbytes'", where, "quantise the original again")
