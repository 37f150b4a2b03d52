"""Where a GPU takes a kernel: asked with tensors of this machine, of which the seam `is_gpu` says that they are on one.

The operators then run their CPU references, so the results can be compared with those of a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import surgeon
from surgeon import compile as compiling
from surgeon import on_gpu, ops
from surgeon.loss import linear_cross_entropy
from surgeon.numerics import quantise_4bit
from surgeon.numerics_int import quantise_groups
from surgeon.quantised import int_linear, nf4_linear


class Recorded(TorchDispatchMode):
    """Names of surgeon's operators, as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "surgeon":
            self.names.append(func._schema.name.removeprefix("surgeon::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], torch.Tensor]], tuple[torch.Tensor, list[str]]]:
    """Runs a function as if its tensors were on a GPU; the result, and the kernels that were asked."""

    def run(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[str]]:
        with monkeypatch.context() as patched, Recorded() as recorded:
            patched.setattr(on_gpu, "is_gpu", lambda x: True)
            return function(), recorded.names

    return run


def test_tensors_of_this_machine_reach_no_kernel() -> None:
    with Recorded() as recorded:
        x, weight = torch.randn(2, 64), quantise_4bit(torch.randn(8, 64))
        nf4_linear(x, None, weight.codes, weight.absmax, out=8, inp=64)
        linear_cross_entropy(x, torch.randn(9, 64), None, torch.tensor([1, 2]))
    assert recorded.names == []
    assert not on_gpu.is_gpu(torch.zeros(1))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("bits", [0, 3])
def test_few_rows_are_one_kernel_and_many_decode(on_a_gpu, bits: int, biased: bool) -> None:  # type: ignore[no-untyped-def]
    weight, bias = torch.randn(24, 64), torch.randn(24) if biased else None
    if bits:
        groups = quantise_groups(weight, bits, 32, float_zero=True)
        fused, decoder = "int_matmul", "int_dequantise"

        def linear(x: torch.Tensor) -> torch.Tensor:
            return int_linear(x, bias, groups.codes, groups.scale, groups.zero, bits=bits)
    else:
        stored = quantise_4bit(weight, double=True)
        assert stored.nested is not None
        nested = stored.nested
        fused, decoder = "nf4_matmul", "nf4_dequantise"

        def linear(x: torch.Tensor) -> torch.Tensor:
            return nf4_linear(x, bias, stored.codes, stored.absmax, nested.scale, nested.offset, out=24, inp=64)

    for shape, asked in (((1, 5, 64), [fused]), ((3, 40, 64), [decoder])):
        x = torch.randn(shape)
        y, names = on_a_gpu(lambda x=x: linear(x))
        assert names == asked
        torch.testing.assert_close(y, linear(x))
    x = torch.randn(2, 64, requires_grad=True)
    y, names = on_a_gpu(lambda: torch.autograd.grad(linear(x).sum(), x)[0])
    assert names == [decoder, decoder], "a gradient needs the weight in both passes"
    torch.testing.assert_close(y, torch.autograd.grad(linear(x).sum(), x)[0])


def test_what_no_kernel_takes_runs_as_on_a_cpu(on_a_gpu) -> None:  # type: ignore[no-untyped-def]
    groups = quantise_groups(torch.randn(8, 120), 4, 40)
    x = torch.randn(2, 120)
    parts = (x, None, groups.codes, groups.scale, groups.zero)
    y, names = on_a_gpu(lambda: int_linear(*parts, bits=4))
    assert names == []
    assert torch.equal(y, int_linear(*parts, bits=4))


def attended(**options: object) -> torch.Tensor:
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    mask = torch.ones(2, 20)
    mask[0, :3] = 0
    return ops.attention(q, k, v, mask, scale=0.4, causal=True, group=6, **options)  # type: ignore[arg-type]


def test_segments_are_attended_to_by_the_kernel(on_a_gpu) -> None:  # type: ignore[no-untyped-def]
    for options in ({}, {"wrap": True}, {"window": 4}):
        out, names = on_a_gpu(lambda options=options: attended(**options))
        assert names == ["shifted_attention"]
        torch.testing.assert_close(out, attended(**options))
    _, names = on_a_gpu(lambda: attended(softcap=5.0))
    assert names == [], "the kernel knows no soft cap"


@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "softcap": 4.0}])
def test_loss_and_its_gradients(on_a_gpu, options: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    """The same chunks, with replaced rows and a bias, by the kernel in the middle of them."""
    hidden, weight, bias = torch.randn(9, 8), torch.randn(21, 8), torch.randn(21)
    labels, index, own = torch.randint(21, (9,)), torch.tensor([3, 7]), torch.randn(2, 8)
    labels[4] = -100
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias, own)]

    def loss() -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, bias, labels, chunk_tokens=4, replaced=(index, own), **options)

    got, names = on_a_gpu(lambda: torch.cat([g.flatten() for g in torch.autograd.grad(loss(), leaves)]))
    assert names == ["cross_entropy_"] * 2
    torch.testing.assert_close(got, torch.cat([g.flatten() for g in torch.autograd.grad(loss(), leaves)]))
    with torch.no_grad():
        torch.testing.assert_close(on_a_gpu(loss)[0], loss())


def test_a_bypass_over_codes_is_one_kernel(  # type: ignore[no-untyped-def]
    on_a_gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation; on a CPU it stays the operators of the graph, bit for bit."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32)).save_pretrained(tmp_path)
    model = surgeon.apply(tmp_path, "qlora", rank=3, targets="*.{q,v}_proj").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.requires_grad)
    ids = torch.randint(32, (1, 9))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        on_kernels, names = on_a_gpu(lambda: model(input_ids=ids).logits)
        monkeypatch.setattr(compiling, "joined", lambda graph: graph)
        compiling._codes.clear()
        assert torch.equal(model(input_ids=ids).logits, logits)
    compiling._codes.clear()
    torch.testing.assert_close(on_kernels, logits)
    assert set(names) & {"nf4_matmul", "nf4_dequantise", "nf4_linear"} == {"nf4_matmul"}
