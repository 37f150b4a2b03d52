from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from benchmarks.zoo.graphs import graph_of, inputs_of
from surgeon import spec
from surgeon.edit import Edit
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph, copied, path_of, tag
from surgeon.initial import Initial
from surgeon.module import load
from surgeon.sites import ATTENTION, Site, sites
from surgeon.strip import without

aten = torch.ops.aten


def site_of(family: str, suffix: str, *kinds: str) -> Site:
    return next(site for site in sites(graph_of(family), *kinds) if site.path.endswith(suffix))


def rewritten(family: str, suffix: str, write: Callable[[Edit], None], *kinds: str) -> Graph:
    """The family with one site rewritten, in every layer that shares its graph."""
    site, result = site_of(family, suffix, *kinds), graph_of(family).copy()
    result.trunk = copied(result.trunk)[0]
    part, paths = result.trunk, [""]
    if site.layer:
        shared = result.layers[site.layer]
        paths = [path for path, graph in result.layers.items() if graph is shared]
        part = copied(shared)[0]
        result.layers.update(dict.fromkeys(paths, part))
    write(Edit(result, part, paths, "test", site, 5))
    spec.check(result)
    return result


def outputs(graph: Graph) -> torch.Tensor:
    with torch.no_grad():
        return load(graph)(*inputs_of(graph))[0]


def test_nodes_are_written_in_order_and_named_by_path() -> None:
    def write(edit: Edit) -> None:
        first = edit.mul(edit.y, 2.0)
        second = edit.add(first, edit.y)
        edit.replace(edit.mul(second, 1 / 3))

    graph = rewritten("llama", "0.self_attn.q_proj", write)
    made = [node for node in graph.layers["model.layers.0"].nodes if tag(node)]
    assert [node.target for node in made] == [aten.mul.Tensor, aten.add.Tensor, aten.mul.Tensor]
    assert {path_of(node) for node in made} == {"self_attn.q_proj"}
    assert [tag(node).output for node in made] == [False, False, True]  # type: ignore[union-attr]
    assert all(node.meta["val"].shape[-1] == 32 for node in made)
    assert torch.allclose(outputs(graph), outputs(graph_of("llama")), rtol=0, atol=1e-4)


def test_a_parameter_is_one_tensor_per_layer() -> None:
    def write(edit: Edit) -> None:
        edit.replace(edit.mul(edit.y, edit.param("s", (32,), "ones")))

    graph = rewritten("llama", "0.self_attn.q_proj", write)
    names = [f"model.layers.{i}.self_attn.q_proj.test.s" for i in range(4)]
    assert list(graph.trainable()) == names
    assert {graph.tensors[name].owner for name in names} == {"test"}
    assert torch.equal(outputs(graph), outputs(graph_of("llama")))


@pytest.mark.parametrize("trainable", [True, False])
def test_a_shared_tensor_is_one_for_the_model(trainable: bool) -> None:
    def write(edit: Edit) -> None:
        once = edit.shared("s", (32,), "ones", trainable=trainable)
        assert edit.shared("s", (32,), "ones", trainable=trainable) is once
        edit.replace(edit.mul(edit.y, once))

    graph = rewritten("llama", "0.self_attn.q_proj", write)
    inserted = [name for name, found in graph.tensors.items() if found.owner]
    assert inserted == ["test.s"]
    assert list(graph.trainable()) == (["test.s"] if trainable else [])
    assert torch.equal(outputs(graph), outputs(graph_of("llama")))


def test_what_is_fed_comes_before_the_site() -> None:
    def write(edit: Edit) -> None:
        x = edit.x
        edit.feed(edit.mul(x, edit.param("u", (32,), "constant:2.0")))
        assert edit.x is x
        edit.feed(edit.mul(x, edit.param("v", (32,), "constant:0.5")))
        assert edit.x is x
        assert edit.below == "test"

    graph = rewritten("llama", "0.self_attn.q_proj", write)
    part = graph.layers["model.layers.0"]
    site = next(node for node in part.nodes if node.name == site_of("llama", "0.self_attn.q_proj").node)
    inner = site.args[0]
    assert tag(inner).input  # type: ignore[union-attr,arg-type]
    outer = inner.args[0]  # type: ignore[union-attr]
    assert outer < inner < site  # type: ignore[operator]
    assert torch.equal(outputs(graph), outputs(graph_of("llama")))


def test_any_argument_can_be_fed() -> None:
    def write(edit: Edit) -> None:
        edit.feed(edit.mul(edit.argument(2), 2.0))
        edit.replace(edit.mul(edit.y, 0.5))

    graph = rewritten("llama", "0.self_attn", write, ATTENTION)
    assert torch.allclose(outputs(graph), outputs(graph_of("llama")), rtol=0, atol=1e-5)
    with pytest.raises(UnsupportedError, match="has no weight"):
        rewritten("llama", "0.self_attn", lambda edit: print(edit.weight), ATTENTION)


def test_the_site_knows_its_weight_and_bias() -> None:
    def biased(edit: Edit) -> None:
        assert (edit.weight.target, edit.bias.target) == ("attn.c_attn.weight", "attn.c_attn.bias")  # type: ignore[union-attr]
        assert edit.x.meta["val"].shape[-1] == 32

    def unbiased(edit: Edit) -> None:
        assert edit.bias is None
        assert edit.below == ""

    def embedding(edit: Edit) -> None:
        assert edit.x.op == "placeholder"

    rewritten("gpt2", "0.attn.c_attn", biased)
    rewritten("llama", "0.self_attn.q_proj", unbiased)
    rewritten("llama", "embed_tokens", embedding)


def test_a_trunk_node_is_edited_like_a_site() -> None:
    result = graph_of("llama").copy()
    result.trunk = copied(result.trunk)[0]
    (logits,) = next(iter(reversed(result.trunk.nodes))).args[0]  # type: ignore[misc]
    edit = Edit.of_trunk(result, "test", logits)
    edit.replace(edit.mul(edit.y, 3.0))
    again = Edit.of_trunk(result, "test", logits)
    assert again.y is edit.y
    assert torch.equal(outputs(result), outputs(graph_of("llama")) * 3)


def test_dropout_and_rows_insert_nothing_they_need_not() -> None:
    def write(edit: Edit) -> None:
        assert edit.dropout(edit.x, 0.0) is edit.x
        assert edit.rows(edit.y, 32, 2) is edit.y
        assert edit.rows(edit.y, 3, 2).meta["val"].shape[2] == 3
        assert edit.dropout(edit.x, 0.5).target is aten.dropout.default

    rewritten("llama", "0.self_attn.q_proj", write)


@pytest.mark.parametrize("kind", ["zeros", "ones", "kaiming", "normal", "gaussian", "constant:0.25"])
def test_first_values_are_the_same_everywhere(kind: str) -> None:
    one = Initial(kind, (16, 400), 3, "a")
    assert one().shape == (16, 400)
    assert torch.equal(one(), one())
    torch.manual_seed(1)
    assert torch.equal(one(), Initial(kind, (16, 400), 3, "a")())
    drawn = kind in ("kaiming", "normal", "gaussian")
    for other in (Initial(kind, (16, 400), 4, "a"), Initial(kind, (16, 400), 3, "b")):
        assert torch.equal(one(), other()) != drawn


def test_first_values_have_the_spread_they_say() -> None:
    uniform = Initial("kaiming", (16, 400), 0, "a")()
    assert uniform.abs().max() <= 1 / 20
    assert abs(float(uniform.std()) - 1 / 20 / 3**0.5) < 1e-3
    assert abs(float(Initial("gaussian", (16, 400), 0, "a")().std()) - 1 / 16) < 2e-3
    assert abs(float(Initial("normal", (16, 400), 0, "a")().std()) - 1) < 0.03
    assert Initial("constant:0.25", (2,), 0, "a")().tolist() == [0.25, 0.25]
    assert (Initial("zeros", (2,), 0, "a")().any(), Initial("ones", (2,), 0, "a")().all()) == (False, True)


def test_an_argument_the_model_leaves_out_can_be_given_and_taken_back() -> None:
    def write(edit: Edit) -> None:
        assert edit.has(3)
        assert not edit.has(4)
        edit.give(4, edit.mul(edit.param("scores", (1, 1, 1, 1), "ones"), 2.0))
        edit.raise_by("prefix", 3)
        edit.raise_by("prefix", 2)
        assert not edit.has(4)  # which says what the model gives
        assert edit.node.kwargs["prefix"] == 5
        assert edit.node.args[4].target is aten.mul.Tensor

    graph = rewritten("llama", "layers.1.self_attn", write, ATTENTION)
    assert without(graph, {"test"}).text() == graph_of("llama").text()


def test_what_is_computed_once_is_handed_to_every_layer() -> None:
    def make(trunk: Edit) -> fx.Node:
        left, right = (trunk.shared(name, (3, 5), "ones", trainable=True) for name in ("left", "right"))
        return trunk.mul(left, right)

    def write(edit: Edit) -> None:
        first, again = edit.once("product", make), edit.once("product", make)
        assert first is again
        assert first.op == "placeholder"
        edit.feed(edit.add(edit.argument(0), edit.call(aten.sum.default, first)))

    graph = rewritten("llama", "layers.1.self_attn", write, ATTENTION)
    (made,) = [node for node in graph.trunk.nodes if node.meta.get("once") == "test.product"]
    assert len(made.users) == len(graph.layers)
    assert set(graph.trainable()) == {"test.left", "test.right"}
    assert outputs(graph).isfinite().all()
    assert without(graph, {"test"}).text() == graph_of("llama").text()
