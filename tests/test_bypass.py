"""Shapes, counts and layouts of low-rank bypasses; what they compute is tested beside the methods."""

from __future__ import annotations

import pytest
import torch

from surgeon.bypass import Bypass, bypass_at
from surgeon.errors import UnsupportedError, UsageError
from surgeon.parts import Layout
from surgeon.sites import CONV, CONV1D, EMBEDDING, EXPERTS, LINEAR, Site

FUSED = Layout.parse("2*q4,k2,v2")


def site(kind: str, inp: int, out: int, **more: object) -> Site:
    return Site("a.b", kind, "a", "n", "a.b.weight", inp=inp, out=out, **more)  # type: ignore[arg-type]


BYPASSES: dict[str, tuple[Bypass, tuple[int, ...], tuple[int, ...], int, int]] = {
    "linear": (bypass_at(site(LINEAR, 5, 7), 3), (3, 5), (7, 3), 5, 36),
    "conv1d": (bypass_at(site(CONV1D, 5, 7), 3), (3, 5), (7, 3), 5, 36),
    "embedding": (bypass_at(site(EMBEDDING, 50, 7), 3), (3, 50), (7, 3), 7, 21),
    "experts": (bypass_at(site(EXPERTS, 5, 7, experts=4, used=2), 3), (4, 3, 5), (4, 7, 3), 5, 72),
    "batched": (bypass_at(site(EXPERTS, 5, 7, experts=4, used=4, batched=True), 3), (4, 3, 5), (4, 7, 3), 5, 144),
    "window": (bypass_at(site(CONV, 2, 7, window=(3, 5)), 3), (3, 30), (7, 3), 7, 111),
    "groups": (bypass_at(site(CONV, 8, 12, window=(3,), groups=4), 8), (8, 6), (12, 2), 12, 72),
    "parts": (bypass_at(site(LINEAR, 5, 16), 3, FUSED, ("q", "v")), (2, 3, 5), (12, 3), 4, 126),
}
every = pytest.mark.parametrize("kind", BYPASSES)


def drawn(made: Bypass) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("a", made.a), ("b", made.b))}


@every
def test_shapes_and_counts(kind: str) -> None:
    made, a, b, limit, macs = BYPASSES[kind]
    assert (made.a, made.b, made.limit, made.macs) == (a, b, limit, macs)
    assert made.parameters == torch.Size(a).numel() + torch.Size(b).numel()


@every
def test_the_normal_form_is_a_change_of_the_weight(kind: str) -> None:
    made, p = BYPASSES[kind][0], drawn(BYPASSES[kind][0])
    where = made.site
    a, b = made.normal(p["a"], p["b"])
    weight = where.stored(b @ a)
    shapes = {
        CONV: (where.out, where.inp // where.groups, *where.window),
        EXPERTS: (where.experts, where.out, where.inp),
    }
    assert weight.shape == shapes.get(where.kind, (where.out, where.inp))
    assert torch.equal(where.matrix(weight), b @ a)
    if kind != "parts":
        assert all(torch.equal(p[name], t) for name, t in zip("ab", made.of_normal(a, b), strict=True))


@every
def test_what_is_packed_is_unpacked(kind: str) -> None:
    made, p = BYPASSES[kind][0], drawn(BYPASSES[kind][0])
    for name, tensor in p.items():
        packed = made.packed(name, tensor)
        assert torch.equal(made.unpacked(name, packed), tensor)
        other = packed[..., :0] if packed.dim() == 2 else packed[:0]
        assert torch.equal(made.unpacked(name, other), other)


def test_experts_are_asymmetric_in_peft() -> None:
    made = BYPASSES["experts"][0]
    p = drawn(made)
    a, b = made.packed("a", p["a"]), made.packed("b", p["b"])
    assert torch.equal(a.view(4, 3, 5), p["a"])
    assert torch.equal(b.view(7, 3, 4).permute(2, 0, 1), p["b"])


def test_groups_see_nothing_of_each_other_in_peft() -> None:
    made = BYPASSES["groups"][0]
    a = made.packed("a", drawn(made)["a"])
    assert a.shape == (8, 8, 3)
    assert [row.any(1).nonzero()[:, 0].tolist() for row in a] == [[0, 1]] * 2 + [[2, 3]] * 2 + [[4, 5]] * 2 + [
        [6, 7]
    ] * 2
    with pytest.raises(UnsupportedError, match="mixes the groups") as caught:
        made.unpacked("a", torch.ones(8, 8, 3))
    assert caught.value.hint
    assert bypass_at(made.site, 6).unfit() == "rank 6 is no multiple of its 4 groups"


def test_parts_are_between_zeros() -> None:
    made = BYPASSES["parts"][0]
    b = drawn(made)["b"]
    whole = made.packed("b", b)
    rows = {"q": [0, 1, 2, 3, 8, 9, 10, 11], "k": [4, 5, 12, 13], "v": [6, 7, 14, 15]}
    assert torch.equal(whole[rows["q"]], torch.cat([b[:8], torch.zeros(8, 3)], 1))
    assert torch.equal(whole[rows["v"]], torch.cat([torch.zeros(4, 3), b[8:]], 1))
    assert not whole[rows["k"]].any()
    with pytest.raises(UsageError, match="changes an output by what belongs to another part") as caught:
        made.unpacked("b", torch.ones(16, 6))
    assert caught.value.where == "a.b"


def test_a_projection_of_one_part_is_a_plain_one() -> None:
    assert type(bypass_at(site(LINEAR, 5, 8), 3, Layout.parse("q8"), ("q", "v"))) is Bypass
