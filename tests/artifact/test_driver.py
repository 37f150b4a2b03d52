"""Launches through ctypes, told by a driver that writes down what it is asked (`fake_cuda.c`)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from surgeon.artifact.binaries import Binaries, choose
from surgeon.artifact.driver import Driver, scalar
from surgeon.artifact.manifest import digest
from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.kernels.jit import Float, Int, Ptr, kernel, launcher

if TYPE_CHECKING:
    import triton.language as tl


@kernel("N/BN")
def example(x: Ptr, y: Ptr, N: Int, far: Int, scale: Float, BN: tl.constexpr, UPCAST: tl.constexpr) -> None:
    """Never runs."""


class Fake(Driver):
    """The driver, and its journal."""

    def kinds(self, text: str) -> None:
        self._library.fake_kinds(text.encode())

    def fail(self, code: int) -> None:
        self._library.fake_fail(code)

    @property
    def journal(self) -> list[str]:
        read = self._library.fake_journal
        read.restype = ctypes.c_char_p
        return read().decode().splitlines()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gcc = shutil.which("gcc") or shutil.which("cc")
    if gcc is None:
        pytest.fail("a C compiler is needed to build the recording driver", pytrace=False)
    out = tmp_path_factory.mktemp("fake") / "libcuda.so"
    subprocess.run([gcc, "-shared", "-fPIC", "-O1", "-o", out, Path(__file__).with_name("fake_cuda.c")], check=True)
    return out


@pytest.fixture
def driver(library: Path) -> Fake:
    made = Fake(str(library))
    made._library.fake_clear()
    made.fail(0)
    return made


CUBIN, PTX = b"\x7fELF and the rest", b".version 8.7\n.target sm_80\n"


def record(**changes: Any) -> dict[str, Any]:
    found = {
        "kernel": "example", "label": "a", "target": "sm_80", "symbol": "example_0d1d", "threads": 128,
        "shared": 1024, "arguments": {"x": "*fp32", "y": "*fp32", "N": "i32", "far": "i64", "scale": "fp32"},
        "constants": {"BN": 16, "UPCAST": False}, "divisible": [], "trailing": 2, "file": "a.cubin",
        "sha256": digest(CUBIN), "ptx": "a.ptx", "ptx_sha256": digest(PTX),
    }  # fmt: skip
    return found | changes


def binaries(folder: Path, driver: Driver, records: list[dict[str, Any]], *, text: bool = False) -> Binaries:
    (folder / "a.cubin").write_bytes(CUBIN)
    (folder / "a.ptx").write_bytes(PTX)
    return Binaries(folder, records, "sm_80", text, driver, lambda: 77)


def launched(made: Binaries, x: torch.Tensor, **changes: Any) -> None:
    given = {"x": x, "y": x, "N": 40, "far": 2**40, "scale": 0.5, "BN": 16, "UPCAST": True, **changes}
    with launcher(made):
        example.launch(**given)


def test_a_launch_word_by_word(tmp_path: Path, driver: Fake) -> None:
    x = torch.zeros(64)
    driver.kinds("ppilfpp")
    made = binaries(tmp_path, driver, [record()])
    launched(made, x)
    launched(made, x, N=16)
    first = f"launch example_0d1d grid 3 1 1 block 128 1 1 shared 1024 stream 77 {x.data_ptr():x} {x.data_ptr():x}"
    assert driver.journal[:2] == ["load cubin", "function example_0d1d"]
    assert driver.journal[2] == f"{first} 40 {2**40} 0.5 0 0"
    assert driver.journal[3].startswith("launch example_0d1d grid 1 1 1"), "loaded once"
    assert len(driver.journal) == 4


def test_more_shared_memory_is_allowed_first(tmp_path: Path, driver: Fake) -> None:
    driver.kinds("")
    launched(binaries(tmp_path, driver, [record(shared=70000)]), torch.zeros(64))
    assert driver.journal[2] == "attribute 8 70000"
    assert "shared 70000" in driver.journal[3]


def test_ptx_for_a_later_gpu(tmp_path: Path, driver: Fake) -> None:
    driver.kinds("")
    launched(binaries(tmp_path, driver, [record()], text=True), torch.zeros(64))
    assert driver.journal[0] == "load ptx"


def test_bad_launches(tmp_path: Path, driver: Fake) -> None:
    made = binaries(tmp_path, driver, [record(divisible=["N"])])
    with pytest.raises(UnsupportedError, match="multiple of 16 in N"):
        launched(made, torch.zeros(64), N=17)
    with pytest.raises(UnsupportedError, match="multiple of 16 in x, y"):
        launched(made, torch.zeros(64)[1:], N=16)
    with pytest.raises(UnsupportedError, match="no binary of example for BN=32"):
        launched(made, torch.zeros(64), BN=32)
    driver.fail(700)
    with pytest.raises(SurgeonError, match="CUDA error 700: an illegal memory access"):
        launched(made, torch.zeros(64), N=16)


def test_a_tampered_binary_is_not_loaded(tmp_path: Path, driver: Fake) -> None:
    made = binaries(tmp_path, driver, [record()])
    (tmp_path / "a.cubin").write_bytes(CUBIN + b"!")
    with pytest.raises(UsageError, match=r"a\.cubin was changed after the export") as caught:
        launched(made, torch.zeros(64))
    assert len(str(caught.value).splitlines()) == 3
    assert driver.journal == []


def test_scalars() -> None:
    assert scalar("i32", -5).value == -5
    assert scalar("i64", 2**40).value == 2**40
    assert scalar("fp32", 0.5).value == 0.5
    x = torch.zeros(2)
    assert scalar("*bf16", x).value == x.data_ptr()


@pytest.mark.parametrize(
    ("archs", "capability", "found"),
    [
        (["sm_80", "sm_90"], (9, 0), ("sm_90", False)),
        (["sm_80", "sm_90"], (8, 9), ("sm_80", False)),
        (["sm_80", "sm_86"], (8, 9), ("sm_86", False)),
        (["sm_80", "sm_90"], (12, 0), ("sm_80", True)),
        (["sm_80", "sm_100"], (10, 3), ("sm_100", False)),
    ],
)
def test_load_rule(archs: list[str], capability: tuple[int, int], found: tuple[str, bool]) -> None:
    assert choose(archs, capability, "here") == found


def test_no_architecture_fits() -> None:
    with pytest.raises(UnsupportedError, match="no binaries for sm_75; it has sm_80, sm_90") as caught:
        choose(["sm_90", "sm_80"], (7, 5), "artifact/")
    assert len(str(caught.value).splitlines()) == 3


def test_no_driver() -> None:
    with pytest.raises(UnsupportedError, match="no NVIDIA driver"):
        Driver("libno-such-driver.so")
