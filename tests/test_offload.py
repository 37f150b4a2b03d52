"""AdamW with its state in a mapped file: the same bits as AdamW, resumable, and no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim import AdamW

from surgeon import offload
from surgeon.offload import OffloadedAdamW
from surgeon.run_state import load_tree, save_tree


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def step(optimiser: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimiser.step()


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_adamw_across_a_checkpoint(fused: bool | None, dtype: torch.dtype, tmp_path: Path) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1, "fused": fused}
    plain, paged = parameters((70, 33), (5,), (), dtype=dtype), parameters((70, 33), (5,), (), dtype=dtype)
    first: torch.optim.Optimizer = AdamW(plain, foreach=None if fused else False, **options)
    second: torch.optim.Optimizer = OffloadedAdamW(paged, folder=tmp_path, **options)
    for number in range(3):
        step(first, number)
        step(second, number)
    save_tree(second.state_dict(), tmp_path, "optimizer")
    second = OffloadedAdamW(paged, folder=tmp_path, **options)
    second.load_state_dict(load_tree(tmp_path, "optimizer"))
    for number in range(3, 6):
        step(first, number)
        step(second, number)
    for one, other in zip(plain, paged, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(first.state[one]["exp_avg_sq"], second.state[other]["exp_avg_sq"])
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("optimizer.")]


def anonymous() -> int:
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * sum(int(status[key].split()[0]) for key in ("RssAnon", "RssFile", "RssShmem"))


def test_the_state_is_no_memory_of_the_process(tmp_path: Path) -> None:
    (parameter,) = parameters((4_000_000,))
    optimiser = OffloadedAdamW([parameter], folder=tmp_path, fused=True)
    parameter.grad = torch.ones_like(parameter)
    before = anonymous()
    optimiser.step()
    assert anonymous() - before < 2 * parameter.nbytes / 4


def test_a_parameter_without_a_gradient_has_no_state(tmp_path: Path) -> None:
    optimiser = OffloadedAdamW(parameters((2,), (3,)), folder=tmp_path)
    optimiser.param_groups[0]["params"][0].grad = torch.ones(2)
    assert optimiser.step(lambda: 1.5) == 1.5
    assert len(optimiser.state) == 1


def test_on_cuda_it_is_bitsandbytes_own_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload.importlib.util, "find_spec", lambda name: name == "bitsandbytes" or None)
    assert offload.paged_name("cuda") == "paged_adamw_32bit"
    assert offload.paged_name("cpu") == ""
    monkeypatch.setattr(offload.importlib.util, "find_spec", lambda name: None)
    assert offload.paged_name("cuda") == ""
