"""Integers for an export, decided linear by linear, with what each decision keeps of the adapter and what it costs.

    quantise     no adapter: the nearest codes
    requantise   the adapter is merged and the sum quantised, where the codes then hold at least `KEPT` of it
    side         codes of the base's weight, the adapter in floating point beside them: where they would hold less, and
                 where adapters are inputs (`surgeon.lower.onnx.slots`), which hold all of them
    zero-points  the adapter moves the zero points of codes that the base has: exact
    codes        codes that the base has, as they are
    fp           the merged weight as it is: no codes fit it

Retention is ⟨Q(W + Δ) − Q(W), Δ⟩ / ⟨Δ, Δ⟩: a small Δ vanishes between the points of a 4-bit grid. NF4 goes to 8 bits,
which hold its 16 values; on 4 bits other than its own they would be 8 % off.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from surgeon import run
from surgeon.fold import by_weight, folds
from surgeon.graph import Graph, TensorSpec
from surgeon.hold import holders
from surgeon.lower.onnx.codes import SIDE as BESIDE
from surgeon.lower.onnx.codes import with_codes
from surgeon.lower.onnx.effective import SIDE, Effective, merged
from surgeon.lower.onnx.overlay import Overlay
from surgeon.lower.saved import relative_error
from surgeon.normal import Normal
from surgeon.passes.intq import IntQ
from surgeon.passes.nf4 import Nf4
from surgeon.sites import LINEAR, Site, sites
from surgeon.targets import head_paths
from surgeon.verification import Probe, outputs
from surgeon.zero_points import unfoldable

BITS = {"int8": 8, "int4": 4}
KEPT = 0.95
"""Share of an adapter that codes must hold to take it."""
GROUPS = (32, 16)
FAST, ACTIVATIONS = 4, 0.15
"""MatMulNBits with its input rounded to 8 bits, and what that may change, of the largest logit.

It is 0.5 % per linear, and depends on the processor: 0.04 to 0.06 at four layers of random weights, 0.1 with an adapter
of large ones. What the lowering itself may be off by is measured without it (`surgeon.lower.onnx.unrounded`).
"""
Read = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Linear:
    """What becomes of one linear.

    Attributes:
        path: its module.
        how: see above.
        bits: of its codes, 0 for none.
        retention: share of the adapter that the codes hold or, beside them, would; None without an adapter. 1 where
            adapters are inputs.
        error: ‖found − exact‖ / ‖exact‖ of its weight, the adapter with it.
    """

    path: str
    how: str
    bits: int
    retention: float | None
    error: float


@dataclass(frozen=True)
class Quantised:
    """A graph to be lowered, and the same function with its weights decoded, for torch.

    Attributes:
        graph: weights in codes; adapters beside them as tensors of their own.
        reference: the weights as graph and side paths make them.
        linears: what became of each linear.
        step: what made codes of the weights, None where they are those that the base has.
    """

    graph: Graph
    reference: Graph
    linears: tuple[Linear, ...]
    step: IntQ | None = None

    def beside(self, paths: Collection[str]) -> Quantised:
        """The same whose linears of these paths have adapters beside them, as inputs."""
        how = {"quantise": SIDE, "codes": SIDE}
        rows = [
            dataclasses.replace(row, how=how.get(row.how, row.how), retention=1.0) if row.path in paths else row
            for row in self.linears
        ]
        return dataclasses.replace(self, linears=tuple(rows))

    def change(self, exact: Graph, probes: Sequence[Probe]) -> float:
        """‖found − exact‖ / ‖exact‖ of the outputs on probes, in torch."""
        return relative_error(outputs(exact, probes), outputs(self.reference, probes))


def quantised(graph: Graph, precision: str, four_bit: str) -> Quantised:
    """The graph in its final form with the weights of its linears in integers.

    Args:
        graph: any graph with values, adapters and codes with it.
        precision: "int8" or "int4".
        four_bit: what becomes of NF4: "bnb4" keeps it, "int4" forces it into 4-bit integers, else it goes to 8 bits.
    """
    owners = run.owners(graph.applied)
    old = [owners[name] for name in sorted(holders(graph))]
    own = next((step for step in old if isinstance(step, IntQ)), None)
    nf4 = any(isinstance(step, Nf4) for step in old)
    if (nf4 and four_bit == "bnb4") or (own is not None and not (folds(graph) and unfoldable(graph))):
        made = with_codes(graph)
        return Quantised(made, made, tuple(_kept(graph)))
    bits = 8 if nf4 and four_bit != "int4" else BITS[precision]
    plain = merged(graph)
    heads = " ".join(sorted(head_paths(plain)))
    step = dataclasses.replace(own, calibration="") if own else IntQ(bits=bits, group=_group(plain), zero="symmetric")
    step = dataclasses.replace(step, targets=f"all-linear {heads}", exclude="")
    return _Policy(graph, plain, step).applied()


class _Policy(Effective):
    """Decides for every linear of `plain`, the graph with its adapters merged."""

    def applied(self) -> Quantised:
        """Codes where there are to be some, and beside them what they do not hold."""
        left_out = " ".join(site.path for site in self.sites if self.how[site.weight] == "fp")
        coded = {weight: how for weight, how in self.how.items() if how != "fp"}
        chosen = [site for site in self.sites if site.weight in coded]
        base = {site.weight: functools.partial(self.base, site) for site in chosen if coded[site.weight] == SIDE}
        below = dataclasses.replace(self.plain, values=Overlay(self.plain.values, base))
        made = run.apply(below, dataclasses.replace(self.step, exclude=left_out))
        for site in chosen:
            if coded[site.weight] != "requantise":
                self._keep_codes(made, site)
        self._put_beside(made)
        return Quantised(made, self.reference(coded), tuple(map(self._row, self.sites)), self.step)

    @functools.cached_property
    def rows(self) -> dict[str, tuple[float | None, float, float]]:
        """Weight → retention, and the errors of codes of the sum and of codes with the adapter beside them."""
        return {site.weight: self._measured(site) for site in self.sites}

    def _measured(self, site: Site) -> tuple[float | None, float, float]:
        merged = site.matrix(self.plain.values[site.weight].float())
        again = self.rounded(merged, site)
        error = _relative(again, merged)
        if site.weight not in self.groups:
            return None, error, error
        base = site.matrix(self.base(site).float())
        codes, change = self.rounded(base, site), merged - base
        size = float(change.square().sum())
        retention = float(((again - codes) * change).sum()) / size if size else 1.0
        normal = self.normal(site)
        return retention, error, float("inf") if normal is None else _relative(normal.merged(codes), merged)

    @functools.cached_property
    def how(self) -> dict[str, str]:
        """By weight; linears of equal layers alike, as the one that loses most of its adapter needs it."""
        alike: dict[tuple[int, str], list[Site]] = {}
        for site in self.sites:
            part = self.plain.layers[site.layer] if site.layer else self.plain.trunk
            alike.setdefault((id(part), site.node), []).append(site)
        how: dict[str, str] = {}
        for group in alike.values():
            rows = [self.rows[site.weight] for site in group]
            kept = [retention for retention, _, _ in rows if retention is not None]
            word = "quantise" if not kept else "requantise" if min(kept) >= KEPT else SIDE
            if word == SIDE and any(error == float("inf") for _, _, error in rows):
                word = "fp"
            how.update({site.weight: word for site in group})
        return how

    def _row(self, site: Site) -> Linear:
        how, (retention, again, beside) = self.how[site.weight], self.rows[site.weight]
        error = {"fp": 0.0, SIDE: beside}.get(how, again)
        return Linear(site.path, how, 0 if how == "fp" else self.step.bits, retention, error)

    def _keep_codes(self, made: Graph, site: Site) -> None:
        holding = made.tensors[site.weight].held
        assert holding is not None
        for part, name in self.own_codes(site).items():
            made.inserted[holding.parts[part]] = self.graph.inserted[name]

    def _put_beside(self, made: Graph) -> None:
        """The tensors of the side paths; equal layers have equal shapes, so ranks are filled up with zeros."""
        chosen = [site for site in self.sites if self.how[site.weight] == SIDE]
        known = {site.weight: self.normal(site) or Normal() for site in chosen}
        rank = max((n.a.shape[0] for n in known.values() if n.a is not None), default=0)
        scaled = {part: any(getattr(n, part) is not None for n in known.values()) for part in ("u", "s")}
        for site in chosen:
            holding = made.tensors[site.weight].held
            assert holding is not None
            for part, value in _tensors(known[site.weight], site, rank, scaled).items():
                name = site.weight + BESIDE + part
                made.tensors[name] = TensorSpec(tuple(value.shape), owner=holding.owner, parameter=False)
                made.inserted[name] = functools.partial(lambda kept: kept, value)


def _tensors(normal: Normal, site: Site, rank: int, scaled: Mapping[str, bool]) -> dict[str, torch.Tensor]:
    """a `[in, r]`, b `[r, out]` with the scale in it, and, if any has them, u `[in]` and s `[out]`."""
    a, b = torch.zeros(site.inp, rank), torch.zeros(rank, site.out)
    if normal.a is not None and normal.b is not None:
        wide = normal.a.float().repeat_interleave(normal.group, -1)
        a[:, : len(wide)] = wide.t()
        b[: len(wide)] = normal.b.float().t() * (normal.scale / normal.divisor)
    found = {"a": a, "b": b}
    for part, size in (("u", site.inp), ("s", site.out)):
        if scaled[part]:
            value = getattr(normal, part)
            found[part] = torch.ones(size) if value is None else value.float()
    return found


def _kept(graph: Graph) -> Iterator[Linear]:
    groups = by_weight(graph, folds(graph))
    for site in sites(graph):
        held = graph.tensors[site.weight].held if site.weight in graph.tensors else None
        if held is None:
            continue
        adapted = site.weight in groups
        how = ("zero-points" if "zero" in held.parts else SIDE) if adapted else "codes"
        step = run.owners(graph.applied)[held.owner]
        bits = step.bits if isinstance(step, IntQ) else 4
        yield Linear(site.path, how, bits, 1.0 if adapted else None, 0.0)


def _group(graph: Graph) -> int:
    """The inputs that share a scale: as many as most linears can have."""
    inputs = [site.inp for site in sites(graph, LINEAR)]
    fitting = {size: sum(inp % size == 0 for inp in inputs) for size in GROUPS}
    return max(GROUPS, key=lambda size: (fitting[size] > len(inputs) / 2, size))


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm().clamp(min=1e-30))
