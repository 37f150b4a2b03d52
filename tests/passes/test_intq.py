"""Group-wise integer weights in graphs: bits as planned, options that do not fit, zero points in every mode."""

from __future__ import annotations

import pytest
import torch

from benchmarks.zoo.graphs import graph_of
from surgeon import fold, run
from surgeon.errors import UsageError
from surgeon.numerics_int import dequantise_groups, quantise_groups
from surgeon.passes import make
from surgeon.planning import plan
from surgeon.run import chosen_sites


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_per_weight_are_as_planned(bits: int) -> None:
    graph, step = graph_of("llama"), make("intq", bits=bits, group=8)
    count = sum(site.inp * site.out for site in chosen_sites(graph, step)[0])
    found = plan(graph, step).bytes
    assert found.memory - found.base == count * (bits + 64 / 8) / 8 - 4 * count


@pytest.mark.parametrize("zero", ["float", "integer", "symmetric"])
def test_the_weights_are_those_of_the_numerics(zero: str) -> None:
    graph = run.apply(graph_of("llama"), make("intq", bits=3, group=8, zero=zero))
    name = "model.layers.1.mlp.down_proj.weight"
    stored = quantise_groups(graph.values[name], 3, 8, symmetric=zero == "symmetric", float_zero=zero == "float")
    assert torch.equal(fold.value_of(graph, name), dequantise_groups(stored))


def test_groups_that_do_not_fit_are_skipped_with_the_reason() -> None:
    graph = graph_of("llama")
    widths = {site.path: site.inp for site in chosen_sites(graph, make("intq", group=-1))[0]}
    chosen, skipped = chosen_sites(graph, make("intq", group=32))
    assert {site.path for site in chosen} == {path for path, width in widths.items() if width % 32 == 0}
    assert {item.path for item in skipped} == {path for path, width in widths.items() if width % 32}
    assert all("no whole number of groups of 32 (try --group" in item.why for item in skipped)


@pytest.mark.parametrize(
    ("options", "what"),
    [({"bits": 5}, "no codes of 5 bits"), ({"zero": "none"}, "zero is 'none'"), ({"group": 1000}, "no weight to")],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        run.apply(graph_of("llama"), make("intq", **options))
