"""4-bit state dicts: those of bitsandbytes to the byte, read and written, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from bitsandbytes import functional as bitsandbytes

from surgeon.bitsandbytes_state import from_state, is_part, part_names, to_state
from surgeon.errors import SurgeonError
from surgeon.numerics import dequantise_4bit, quantise_4bit


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_the_state_is_that_of_bitsandbytes(kind: str, double: bool) -> None:
    weight = torch.randn(33, 50).to(torch.bfloat16)
    codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
    theirs = {"w": codes, **{f"w.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}}
    stored = quantise_4bit(weight, kind, double=double)
    ours = to_state("w", stored, torch.bfloat16)
    assert sorted(ours) == sorted(theirs) == sorted(["w", *part_names("w", stored)])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(is_part(name) for name in ours if name != "w")
    back, dtype = from_state("w", theirs)
    assert dtype == torch.bfloat16
    assert torch.equal(dequantise_4bit(back, dtype), dequantise_4bit(stored, torch.bfloat16))


def test_codes_stored_in_another_dtype_are_the_same_bytes() -> None:
    weight = torch.randn(8, 64)
    tensors = to_state("w", quantise_4bit(weight), torch.float32)
    tensors["w"] = tensors["w"].view(-1).view(torch.bfloat16).view(-1, 1)
    assert torch.equal(dequantise_4bit(from_state("w", tensors)[0]), dequantise_4bit(quantise_4bit(weight)))


def test_bitsandbytes_reads_what_is_written() -> None:
    stored = quantise_4bit(torch.randn(16, 64), double=True)
    tensors = to_state("w", stored, torch.float32)
    state = bitsandbytes.QuantState.from_dict({k: v for k, v in tensors.items() if k != "w"}, torch.device("cpu"))
    assert torch.equal(bitsandbytes.dequantize_4bit(tensors["w"], state), dequantise_4bit(stored))


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("w.absmax", None, "has no w.absmax"),
        ("w.quant_state.bitsandbytes__nf4", None, "no quant_state"),
        ("w.quant_state.bitsandbytes__nf4", torch.tensor([1, 2], dtype=torch.uint8), "is no JSON"),
        ("w.quant_state.bitsandbytes__nf4", torch.frombuffer(bytearray(b'{"shape": [2]}'), dtype=torch.uint8), "lacks"),
        ("w.quant_map", torch.linspace(-1, 1, 16), "another code book"),
        ("w", torch.zeros(3, 1, dtype=torch.uint8), "3 bytes"),
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused(name: str, value: torch.Tensor | None, what: str) -> None:
    tensors = to_state("w", quantise_4bit(torch.randn(16, 64), double=True), torch.float32)
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    with pytest.raises(SurgeonError, match=what):
        from_state("w", tensors, "model.safetensors")


def test_another_nested_block_size_is_refused() -> None:
    tensors = to_state("w", quantise_4bit(torch.randn(16, 64), double=True), torch.float32)
    name = "w.quant_state.bitsandbytes__nf4"
    facts = json.loads(bytes(tensors[name].tolist())) | {"nested_blocksize": 128}
    tensors[name] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    with pytest.raises(SurgeonError, match="nested block size of 128"):
        from_state("w", tensors)
