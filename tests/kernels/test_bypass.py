"""Low-rank bypasses: the operator and the kernels against the equation in float64, and their gradients."""

from __future__ import annotations

import pytest
import torch

from surgeon.kernels import bypass, down_up

INSIDE, OUTSIDE = 72, (80, 24, 24)
UNIT = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def made(rows: int, ranks: list[int], *, vera: bool = False, dtype: torch.dtype = torch.float32) -> dict:
    """Arguments of `bypass.reference`; VeRA's A and B are slices of larger matrices."""
    parts = 1 if vera else 3
    ys = [torch.randn(rows, out).to(dtype) for out in OUTSIDE[:parts]]
    a = torch.randn(sum(ranks[:parts]), INSIDE + 40 * vera)[:, :INSIDE].to(dtype)
    bs = [torch.randn(out + 16, rank).to(dtype)[:out] for out, rank in zip(OUTSIDE, ranks[:parts], strict=False)]
    d, gain = (torch.randn(n).to(dtype) if vera else None for n in (ranks[0], OUTSIDE[0]))
    return {"ys": ys, "x": torch.randn(rows, INSIDE).to(dtype), "a": a, "bs": bs, "scales": [2.0, 0.5, 1.0][:parts],
            "d": d, "gain": gain}  # fmt: skip


def double(given: dict) -> dict:
    """The same in float64, to be differentiated."""
    return {
        name: [v.double().requires_grad_() for v in value] if name in ("ys", "bs")
        else value.double().requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }  # fmt: skip


def exact(given: dict) -> list[torch.Tensor]:
    """The equation part by part."""
    parts, found = given["a"].split([b.shape[1] for b in given["bs"]]), []
    for y, a, b, scale in zip(given["ys"], parts, given["bs"], given["scales"], strict=True):
        low = given["x"] @ a.T
        high = (low if given["d"] is None else low * given["d"]) @ b.T
        found.append(y + scale * (high if given["gain"] is None else high * given["gain"]))
    return found


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    wanted = wanted.detach()
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted, atol=UNIT[dtype] * float(wanted.abs().max()), rtol=0)


FORMS = {"lora": ([3, 7, 33], False), "vera": ([128], True), "rank 1": ([1, 1, 1], False)}


@pytest.mark.parametrize(("ranks", "vera"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [5, 65])
def test_kernels_are_the_equation(rows: int, dtype: torch.dtype, ranks: list[int], vera: bool) -> None:
    given = made(rows, ranks, vera=vera, dtype=dtype)
    *found, low = bypass.launch(**given)
    for one, wanted in zip(found, exact(double(given)), strict=True):
        close(one, wanted, dtype)
    close(low, (given["x"].double() @ given["a"].double().T), dtype)


@pytest.mark.parametrize(("ranks", "vera"), FORMS.values(), ids=FORMS)
def test_gradients_are_those_of_the_equation(ranks: list[int], vera: bool) -> None:
    given = made(9, ranks, vera=vera)
    known = double(given)
    outputs = exact(known)
    sent = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, sent)
    low = given["x"] @ given["a"].T
    wanted = [known["x"], known["a"], known["bs"][0], known["d"], known["gain"]]
    for inputs in (bypass._by_torch, bypass._by_kernels):
        grads = [grad.float() for grad in sent]
        dx, da, dbs, dd, dgain = bypass._gradients(
            grads, given["x"], given["a"], given["bs"], low, given["scales"], given["d"], given["gain"], inputs
        )
        for found, tensor in zip((dx, da, dbs[0], dd, dgain), wanted, strict=True):
            assert (found is None) == (tensor is None)
            if tensor is not None:
                close(found, tensor.grad, torch.float32)


@pytest.mark.parametrize("vera", [False, True])
def test_the_operator_trains(vera: bool) -> None:
    given = made(6, [4, 4, 4], vera=vera)
    known = double(given)
    torch.autograd.backward(exact(known), [torch.ones_like(y) for y in known["ys"]])
    trained = double(given)
    torch.autograd.backward(bypass.bypass(**trained)[:-1], [torch.ones_like(y) for y in known["ys"]])
    for name in ("x", "a", "d", "gain"):
        if known[name] is not None:
            torch.testing.assert_close(trained[name].grad, known[name].grad)
    for name in ("ys", "bs"):
        for one, wanted in zip(trained[name], known[name], strict=True):
            torch.testing.assert_close(one.grad, wanted.grad)


def test_one_node_of_an_exported_graph() -> None:
    given = made(3, [4, 4, 4])

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.surgeon.bypass(given["ys"], x, given["a"], given["bs"], given["scales"], None, None)[0]

    program = torch.export.export(Module(), (given["x"],)).run_decompositions({})
    assert "surgeon.bypass" in str(program.graph)
    assert torch.equal(program.module()(given["x"]), Module()(given["x"]))


def test_reasons() -> None:
    given = made(3, [4, 4, 4])
    assert bypass.can_use(given["x"], given["a"], given["bs"]) == ""
    assert "dtypes" in bypass.can_use(given["x"].half(), given["a"], given["bs"])
    assert "side by side" in bypass.can_use(given["x"].T.contiguous().T, given["a"], given["bs"])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 3, 7, 16, 33, 64, 128])
@pytest.mark.parametrize("rows", [1, 16, 64, 130])
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_kernels_at_many_shapes(rank: int, rows: int, dtype: torch.dtype) -> None:
    for vera in (False, True):
        given = made(rows, [rank] * 3, vera=vera, dtype=dtype)
        for one, wanted in zip(bypass.launch(**given), exact(double(given)), strict=False):
            close(one, wanted, dtype)
    assert down_up.rows(rows, dtype)["BM"] in (16, 64)
