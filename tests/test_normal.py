from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from surgeon.errors import UnsupportedError
from surgeon.normal import Normal, compose

OUT, IN, RANK = 6, 8, 3
Array = NDArray[np.float64]


def drawn(seed: int = 0, group: int = 1, parts: str = "ab u s bias") -> Normal:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (RANK, IN // group), "b": (OUT, RANK), "u": (IN,), "s": (OUT,), "bias": (OUT,)}
    wanted = {"a", "b"} if "ab" in parts.split() else set()
    values = {
        name: torch.randn(shape, generator=g, dtype=torch.float64)
        for name, shape in shapes.items()
        if name in wanted | set(parts.split())
    }
    return Normal(scale=1.7, group=group, **values)  # type: ignore[arg-type]


def formula(n: Normal, weight: Array, x: Array, bias: Array) -> Array:
    """y = s ⊙ ((u ⊙ x) Wᵀ + scale · pool(u ⊙ x) aᵀ bᵀ) + bias."""
    ux = x * (n.u.numpy() if n.u is not None else 1)
    y = ux @ weight.T
    if n.a is not None and n.b is not None:
        y = y + n.scale * ux.reshape(len(x), -1, n.group).sum(-1) @ n.a.double().numpy().T @ n.b.double().numpy().T
    return y * (n.s.numpy() if n.s is not None else 1) + (n.bias.numpy() if n.bias is not None else bias)


def apply(n: Normal, weight: torch.Tensor, x: Array, bias: Array) -> Array:
    """The merged weight and bias on x."""
    kept = torch.from_numpy(bias) if n.bias is None else n.bias
    return (torch.from_numpy(x) @ n.merged(weight).T + kept).numpy()


def data(seed: int = 9) -> tuple[torch.Tensor, Array, Array]:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(OUT, IN))), rng.normal(size=(5, IN)), rng.normal(size=OUT)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("parts", ["ab", "u", "s", "ab u", "ab s", "u s", "ab u s bias", "s bias", "bias"])
def test_merged_is_the_formula_in_numpy(parts: str, group: int) -> None:
    weight, x, bias = data()
    n = drawn(1, group, parts)
    if n.a is not None:  # the delta is computed in fp32, as PEFT does: exact products need few bits
        n = Normal(0.5, *(torch.round(t * 8) / 8 for t in (n.a, n.b) if t is not None), n.u, n.s, n.bias, group)
    expected = formula(n, weight.numpy(), x, bias)
    assert np.abs(apply(n, weight, x, bias) - expected).max() <= 1e-12 * np.abs(expected).max()


def test_the_delta_is_in_pefts_order_and_precision() -> None:
    n = drawn(2, parts="ab")
    assert n.a is not None
    assert n.b is not None
    expected = (n.b.float() @ n.a.float()) * 1.7
    found = n.delta()
    assert found is not None
    assert torch.equal(found, expected)
    half = Normal(1.7, n.a.bfloat16(), n.b.bfloat16()).delta()
    assert half is not None
    assert half.dtype == torch.float32
    weight = torch.randn(OUT, IN).bfloat16()
    assert n.merged(weight).dtype == torch.float32
    assert torch.equal(n.merged(weight), weight.float() + expected)
    assert Normal(s=torch.ones(OUT)).delta() is None


@pytest.mark.parametrize("group", [1, 4])
def test_slices_merge_as_the_whole_does(group: int) -> None:
    weight, _, _ = data()
    n = drawn(3, group)
    whole = n.merged(weight)
    for rows in (slice(0, 2), slice(3, 6), slice(None)):
        assert torch.equal(n.outputs(rows).merged(weight[rows]), whole[rows])
    assert n.bias is not None
    assert torch.equal(n.outputs(slice(1, 3)).bias, n.bias[1:3])  # type: ignore[arg-type]
    for columns in (slice(0, 4), slice(4, 8), slice(3, 7)):
        assert torch.equal(n.inputs(columns).merged(weight[:, columns]), whole[:, columns])
    assert n.inputs(slice(0, 4)).group == 1


def test_experts_are_one_axis_more() -> None:
    each = [drawn(seed, 2) for seed in range(4)]
    together: dict[str, Any] = {
        name: torch.stack([getattr(n, name) for n in each]) for name in ("a", "b", "u", "s", "bias")
    }
    n, weights = Normal(1.7, group=2, **together), torch.randn(4, OUT, IN, dtype=torch.float64)
    whole = n.merged(weights)
    for expert, one in enumerate(each):
        assert torch.allclose(whole[expert], one.merged(weights[expert]), rtol=0, atol=1e-6)
    assert torch.equal(n.experts(slice(1, 3)).merged(weights[1:3]), whole[1:3])
    assert torch.equal(n.outputs(slice(0, 2)).merged(weights[:, :2]), whole[:, :2])
    assert torch.equal(n.inputs(slice(4, 8)).merged(weights[..., 4:8]), whole[..., 4:8])


@pytest.mark.parametrize(
    ("outer", "inner"),
    [(o, i) for o, i in itertools.product(["ab", "s", "ab s", "ab bias", "s bias", "bias"], ["ab", "ab bias", "bias"])],
)
def test_compose_is_one_after_the_other(outer: str, inner: str) -> None:
    weight, x, bias = data()
    first, second = drawn(4, parts=inner), drawn(5, parts=outer)
    below = first.merged(weight)
    expected = apply(second, below, x, bias if first.bias is None else first.bias.numpy())
    found = apply(compose(second, first), weight, x, bias)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(("outer", "inner"), [("u", "ab"), ("ab", "u"), ("ab", "s"), ("ab s", "ab s"), ("u", "u")])
def test_compose_says_why_there_is_none(outer: str, inner: str) -> None:
    with pytest.raises(UnsupportedError, match="scale the same") as caught:
        compose(drawn(6, parts=outer), drawn(7, parts=inner))
    assert caught.value.hint


def test_different_groups_do_not_compose() -> None:
    with pytest.raises(UnsupportedError, match="groups of 4 and 2"):
        compose(drawn(6, 4, "ab"), drawn(7, 2, "ab"))
    same = compose(drawn(6, 4, "ab"), drawn(7, 4, "ab"))
    assert same.group == 4
    assert same.a is not None
    assert same.a.shape == (2 * RANK, IN // 4)
