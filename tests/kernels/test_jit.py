"""The two forms of a kernel in one process, the launch as data, and what the compiler refuses."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from surgeon import kernels
from surgeon.errors import CheckFailed, UsageError
from surgeon.kernels import aot, jit
from surgeon.kernels.jit import Int, Ptr, Tile, kernel

if TYPE_CHECKING:
    import triton.language as tl

FACTOR = 2.0


@kernel()
def doubled(tile: Tile) -> Tile:
    """A helper with a number from its file."""
    return tile * FACTOR


@kernel("M/BM", "N/BN")
def product(
    x: Ptr, w: Ptr, y: Ptr, M: Int, N: Int, K: Int, past: Int, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
) -> None:
    """y = 2 x wᵀ; `past` moves the store of every row."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for begin in range(0, K, BK):
        k = begin + tl.arange(0, BK)
        a = tl.load(x + m[:, None] * K + k[None], mask=(m[:, None] < M) & (k[None] < K), other=0.0)
        b = tl.load(w + n[:, None] * K + k[None], mask=(n[:, None] < N) & (k[None] < K), other=0.0)
        total += tl.dot(a, tl.trans(b))
    total = doubled(total) + 0 * tl.sum(total, 1)[:, None]
    tl.store(y + past + m[:, None] * N + n[None], total.to(y.dtype.element_ty), (m[:, None] < M) & (n[None] < N))


def launched(x: torch.Tensor, w: torch.Tensor, past: int = 0) -> torch.Tensor:
    y = torch.empty(len(x), len(w))
    product.launch(x=x, w=w, y=y, M=len(x), N=len(w), K=x.shape[1], past=past, BM=16, BN=32, BK=16)
    return y


def variant(inner: int = 16, rows: int = 32, warps: int = 4) -> aot.Variant:
    constants = {"BM": rows, "BN": rows, "BK": inner}
    return aot.Variant(product, f"k{inner}", "*fp16 *fp16 *fp16 i32 i32 i32 i32", constants, warps)


def test_interpreted_compiled_and_interpreted_again() -> None:
    """Neither form disturbs the other, in one process and in any order."""
    x, w = torch.randn(33, 50), torch.randn(70, 50)
    torch.testing.assert_close(launched(x, w), 2 * x @ w.T, rtol=1e-5, atol=1e-4)
    binary = aot.build(variant(), aot.target("sm_80"))
    torch.testing.assert_close(launched(x, w), 2 * x @ w.T, rtol=1e-5, atol=1e-4)
    assert binary.code[:4] == b"\x7fELF"


@pytest.mark.parametrize("name", aot.TARGETS)
def test_binary(name: str) -> None:
    binary = aot.build(variant(), aot.target(name))
    record = binary.record()
    assert record["symbol"] == "product"
    assert record["symbol"] in binary.text
    assert (record["spilled"], record["trailing"], record["threads"]) == (0, 2, 128)
    assert record["grid"] == ["M/BM", "N/BN"]
    assert record["constants"] == {"BM": 32, "BN": 32, "BK": 16}
    assert 16 < record["registers"] < 256


class NoDevice:
    """What Triton asks a driver before it launches, of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def test_launch_on_a_gpu_up_to_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments are bound by name, specialised and compiled for."""
    from triton.runtime.driver import driver

    def compiled_only(call: jit.Call) -> None:
        chosen = jit.options(call.warps, call.stages, 32, amd=False)
        run = call.kernel.compiled.run
        made.append(run(grid=call.grid, warmup=True, **call.arguments, **call.constants, **chosen))

    made: list[Any] = []
    monkeypatch.setattr(driver, "_active", NoDevice())
    with jit.launcher(compiled_only):
        launched(torch.randn(20, 32), torch.randn(40, 32))
    assert made[0].metadata.name == "product"
    assert made[0].metadata.num_warps == 4


def test_options_of_amd() -> None:
    """As many threads in wider warps, and a stage fewer."""
    assert jit.options(8, 2, 64, amd=True) == {"num_warps": 4, "num_stages": 1}
    assert jit.options(1, 1, 64, amd=True) == {"num_warps": 1, "num_stages": 1}


def test_refused_by_the_compiler() -> None:
    """A tile product over 8 values, which gfx942 alone compiles, and tiles that do not fit the registers."""
    with pytest.raises(CheckFailed, match="over 8 values"):
        aot.build(variant(inner=8), aot.target("gfx942"))
    with pytest.raises(CheckFailed, match=r"\d+ bytes per thread are spilled"):
        aot.build(variant(rows=128, warps=1), aot.target("sm_80"))


def test_store_past_the_end_is_seen() -> None:
    with pytest.raises(AssertionError, match="outside"):
        launched(torch.randn(16, 16), torch.randn(32, 16), past=1)


def test_a_launch_is_data() -> None:
    """Who runs it can be replaced, and a binary knows whether it serves it."""
    calls: list[jit.Call] = []
    x, w, y = (torch.randn(n, 64, dtype=torch.float16) for n in (33, 70, 33))
    with jit.launcher(calls.append):
        product.launch(x=x, w=w, y=y, M=33, N=70, K=64, past=0, BM=32, BN=32, BK=16)
        product.launch(x=x[:0], w=w, y=y, M=0, N=70, K=64, past=0, BM=32, BN=32, BK=16)
        with pytest.raises(TypeError, match="differ in BK, past"):
            product.launch(x=x, w=w, y=y, M=33, N=70, K=64, BM=32, BN=32)
    (call,) = calls
    assert call.grid == (2, 3)
    assert call.types == {"x": "*fp16", "w": "*fp16", "y": "*fp16", "M": "i32", "N": "i32", "K": "i32", "past": "i32"}
    fits = variant()
    assert fits.serves(call)
    assert aot.Variant(product, "", fits.signature, fits.constants, divisible=frozenset({"K"})).serves(call)
    assert not aot.Variant(product, "", fits.signature, fits.constants, divisible=frozenset({"M"})).serves(call)
    assert not variant(inner=32).serves(call)
    with jit.launcher(calls.append):
        product.launch(x=x[:, 1:], w=w, y=y, M=33, N=70, K=63, past=0, BM=32, BN=32, BK=16)
    assert not fits.serves(calls[-1]), "an address that is no multiple of 16"


def test_grid_rule() -> None:
    assert jit.programs(("M/BM", "B*H", "N/BN*B"), {"M": 33, "BM": 16, "B": 2, "H": 3, "N": 1, "BN": 8}) == (3, 6, 2)


def test_no_such_architecture() -> None:
    with pytest.raises(UsageError, match="no architecture 'h100'"):
        aot.target("h100")


def test_files_import_without_triton() -> None:
    """And say what is missing when a kernel is to run."""
    names = [module.__name__ for module in kernels.files()]
    code = f"""
import sys, importlib
sys.modules["triton"] = None
for name in {names} + ["surgeon.kernels.aot", "surgeon.kernels.interpreter"]:
    importlib.import_module(name)
from surgeon.kernels import jit
print(jit.missing())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Triton is not installed"
