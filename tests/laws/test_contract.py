"""The contract under stress: methods old and new, most of them not registered, each in a few lines against it.

Each is applied, compared with its formula on transformers' own modules, trained, merged (or finalised), and taken out.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.zoo.graphs import graph_of, inputs_of, model_of, randomised
from surgeon import fold, run
from surgeon.edit import Edit
from surgeon.errors import SurgeonError, UnsupportedError
from surgeon.graph import Graph
from surgeon.module import load
from surgeon.normal import Base, Columns, Normal
from surgeon.passes.base import ATTENTION, CONV1D, EMBEDDING, LINEAR, Adapter, Pass
from surgeon.passes.ia3 import Ia3
from surgeon.passes.loha import Loha
from surgeon.passes.lora import Lora
from surgeon.sites import EXPERTS, Site, sites

aten = torch.ops.aten
Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Ia3In(Ia3):
    """The other half of IA³ under a name of its own."""

    name: ClassVar[str] = "ia3_in"
    inputs: str = "*"


@dataclass(frozen=True)
class QaLora(Adapter):
    """y = W x + α/r · B A sum_group(x), a: [r, in / group] (Xu et al. 2024)."""

    name: ClassVar[str] = "qalora"
    kinds: ClassVar[tuple[str, ...]] = (LINEAR, CONV1D)
    rank: int = 3
    group: int = 4

    def unfit(self, site: Site) -> str:
        return f"{site.inp} inputs are no whole number of groups of {self.group}" if site.inp % self.group else ""

    def rewrite(self, edit: Edit, site: Site) -> None:
        a = edit.param("a", (self.rank, site.inp // self.group), "kaiming")
        b = edit.param("b", (site.out, self.rank), "zeros")
        groups = edit.call(aten.unflatten.int, edit.x, -1, [-1, self.group])
        low = edit.linear(edit.call(aten.sum.dim_IntList, groups, [-1]), a)
        edit.replace(edit.add(edit.y, edit.mul(edit.linear(low, b), 2.0)))

    def normal(self, params: Params, site: Site, base: Base) -> Normal:
        return Normal(2.0, params["a"], params["b"], group=self.group)


@dataclass(frozen=True)
class Dora(Adapter):
    """y = m / ‖W + B A‖ ⊙ (W x + B A x) + b, the norm not differentiated (Liu et al. 2024, eq. 5, §4.3)."""

    name: ClassVar[str] = "dora"
    kinds: ClassVar[tuple[str, ...]] = (LINEAR, CONV1D)
    reads_weight: ClassVar[bool] = True
    rank: int = 3

    def rewrite(self, edit: Edit, site: Site) -> None:
        a, b = edit.param("a", (self.rank, site.inp), "kaiming"), edit.param("b", (site.out, self.rank), "zeros")
        m = edit.param("m", (site.out,), "ones")
        weight = edit.call(aten.t.default, edit.weight) if site.transposed else edit.weight
        whole = edit.call(aten.detach.default, edit.add(weight, edit.call(aten.mm.default, b, a)))
        s = edit.call(aten.div.Tensor, m, edit.call(aten.linalg_vector_norm.default, whole, 2, [1]))
        y = edit.y if edit.bias is None else edit.call(aten.sub.Tensor, edit.y, edit.bias)
        y = edit.mul(edit.add(y, edit.linear(edit.linear(edit.x, a), b)), s)
        edit.replace(y if edit.bias is None else edit.add(y, edit.bias))

    def normal(self, params: Params, site: Site, base: Base) -> Normal:
        norm = (base.weight() + params["b"] @ params["a"]).norm(dim=1)
        return Normal(a=params["a"], b=params["b"], s=params["m"] / norm)


@dataclass(frozen=True)
class Prefix(Adapter):
    """softmax(q [k_p, k]ᵀ) [v_p, v]: learned columns before the keys, after rotary (Li & Liang 2021)."""

    name: ClassVar[str] = "prefix"
    keeps: ClassVar[str] = "changes"
    kinds: ClassVar[tuple[str, ...]] = (ATTENTION,)
    targets: str = "*"
    length: int = 4

    def rewrite(self, edit: Edit, site: Site) -> None:
        batch = edit.call(aten.sym_size.int, edit.argument(0), 0)
        for position, name in ((1, "k"), (2, "v")):
            old = edit.argument(position)
            heads, size = old.meta["val"].shape[1], old.meta["val"].shape[3]
            learned = edit.param(name, (heads, self.length, size), "normal")
            rows = edit.call(aten.expand.default, learned, [batch, -1, -1, -1])
            edit.feed(edit.call(aten.cat.default, [rows, old], 2))
        mask = edit.argument(3)
        ones = edit.call(aten.new_ones.default, mask, [batch, self.length])
        edit.feed(edit.call(aten.cat.default, [ones, mask], 1))

    def columns(self, params: Params, site: Site) -> Columns:
        return Columns(params["k"], params["v"])


@dataclass(frozen=True)
class Prompt(Pass):
    """Learned rows before the tokens' embeddings; the mask, positions and lengths follow (Lester et al. 2021)."""

    name: ClassVar[str] = "prompt"
    keeps: ClassVar[str] = "changes"
    kinds: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    length: int = 4

    def match(self, graph: Graph) -> list[Any]:
        return [site for site in sites(graph, EMBEDDING) if site.layer == ""][:1]

    def rewrite(self, edit: Edit, site: Site) -> None:
        learned = edit.param("p", (self.length, site.out), "normal")
        rows = edit.call(aten.expand.default, learned, [edit.call(aten.sym_size.int, edit.y, 0), -1, -1])
        edit.replace(edit.call(aten.cat.default, [rows, edit.y], 1))

    def finish(self, graph: Graph, owner: str) -> None:
        base = {node.name: node for node in graph.trunk.nodes if node.meta.get("surgeon") is None}
        ids = base["input_ids"]
        embedded = {ids, *ids.users} - {n for n in ids.users if n.target is aten.sym_size.int}
        for size in [n for n in ids.users if n.target is aten.sym_size.int and n.args[1] == 1]:
            edit = Edit.of_trunk(graph, owner, size)
            edit.replace(edit.call(operator.add, edit.y, self.length), keep=embedded)
        edit, ones = self._ones(graph, owner, base["attention_mask"])
        edit.replace(edit.call(aten.cat.default, [ones, edit.y], 1))
        edit, ones = self._ones(graph, owner, base["position_ids"])
        first = edit.call(aten.sub.Tensor, edit.call(aten.cumsum.default, ones, 1), 1)
        edit.replace(edit.call(aten.cat.default, [first, edit.call(aten.add.Tensor, edit.y, self.length)], 1))
        (result,) = next(iter(reversed(graph.trunk.nodes))).args[0]
        edit = Edit.of_trunk(graph, owner, result)
        edit.replace(edit.call(aten.slice.Tensor, edit.y, 1, self.length, 2**63 - 1))

    def _ones(self, graph: Graph, owner: str, node: Any) -> tuple[Edit, Any]:
        edit = Edit.of_trunk(graph, owner, node)
        batch = edit.call(aten.sym_size.int, edit.y, 0)
        return edit, edit.call(aten.new_ones.default, edit.y, [batch, self.length])


# What each linear method does to a module's output y, from its input x and its parameters p: the paper's formula.
Formula = Callable[[Any, Params, Tensor, Tensor], Tensor]


def weight_of(module: Any) -> Tensor:
    return module.weight.t() if type(module).__name__ == "Conv1D" else module.weight


def dora_formula(module: Any, p: Params, x: Tensor, y: Tensor) -> Tensor:
    whole = weight_of(module) + p["b"] @ p["a"]
    bias = 0 if getattr(module, "bias", None) is None else module.bias
    return p["m"] * (x @ (whole / whole.norm(dim=1, keepdim=True)).T) + bias


FORMULAS: dict[Adapter, Formula] = {
    Ia3(targets="all-linear", inputs=""): lambda module, p, x, y: p["s"] * y,
    Ia3In(targets="all-linear"): lambda module, p, x, y: module(x * p["u"]),
    Loha(rank=3, alpha=6, targets="all-linear"): lambda module, p, x, y: (
        y + 2 * (x @ ((p["b1"] @ p["a1"]) * (p["b2"] @ p["a2"])).T)
    ),
    QaLora(targets="all-linear"): lambda module, p, x, y: (
        y + 2 * (x.unflatten(-1, (-1, 4)).sum(-1) @ p["a"].T @ p["b"].T)
    ),
    Dora(targets="all-linear"): dora_formula,
    Lora(rank=3, alpha=6, targets="all-linear"): lambda module, p, x, y: y + 2 * (x @ p["a"].T @ p["b"].T),
}
METHODS = [pytest.param(step, formula, id=step.name) for step, formula in FORMULAS.items()]


@contextmanager
def hooked(model: Any, graph: Graph, formulas: Mapping[str, Formula]) -> Iterator[None]:
    """The model with each site's modules computing what the formulas say, in the order of the passes."""
    handles = []
    inside = False

    def hook_of(params: Params, formula: Formula) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            nonlocal inside
            if inside:
                return None
            inside = True
            try:
                return formula(module, params, args[0], output)
            finally:
                inside = False

        return hook

    for item in fold.folds(graph):
        module, hook = model.get_submodule(item.site.path), hook_of(item.tensors(), formulas[item.step.name])
        handles += [module.register_forward_hook(hook)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reference(family: str, graph: Graph, formulas: Mapping[str, Formula], inputs: list[Tensor]) -> Tensor:
    model = model_of(family)
    with hooked(model, graph, formulas):
        logits: Tensor = model(**dict(zip(graph.inputs, inputs, strict=True))).logits
    return logits


@torch.no_grad()
def logits_of(graph: Graph, inputs: list[Tensor]) -> Tensor:
    result: Tensor = load(graph)(*inputs)[0]
    return result


def assert_close(found: Tensor, expected: Tensor, relative: float = 2e-5) -> None:
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def assert_trains(graph: Graph) -> None:
    model = load(randomised(graph)).train()
    model(*inputs_of(graph))[0].square().sum().backward()
    for name, spec in graph.tensors.items():
        gradient = (model.get_parameter(name) if spec.parameter else model.get_buffer(name)).grad
        assert (gradient is not None and bool(gradient.any())) == spec.trainable, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("step", "formula"), METHODS)
def test_a_method_at_linears(step: Adapter, formula: Formula, family: str) -> None:
    base, inputs = graph_of(family), inputs_of(graph_of(family))
    graph = run.apply(base, step)
    if step.name != "dora":  # whose magnitudes would have to start at the norms of the weights
        assert torch.equal(logits_of(graph, inputs), logits_of(base, inputs))
    assert_trains(graph)
    trained = randomised(graph)
    assert_close(logits_of(trained, inputs), reference(family, trained, {step.name: formula}, inputs))
    merged = fold.fold(trained)
    assert_close(logits_of(merged, inputs), logits_of(trained, inputs))
    assert merged.text() == base.text()


PAIRS = [(one, two) for one in FORMULAS for two in FORMULAS if one != two]


@pytest.mark.parametrize(
    ("first", "second"), [pytest.param(*pair, id="-".join(p.name for p in pair)) for pair in PAIRS]
)
def test_methods_stack_as_functions_of_functions(first: Adapter, second: Adapter) -> None:
    base, inputs = graph_of("bert"), inputs_of(graph_of("bert"))
    if second.name == "dora":
        with pytest.raises(UnsupportedError, match="reads the weight") as caught:
            run.apply(base, first, second)
        assert first.name in caught.value.where
        assert "dora first" in caught.value.hint
        return
    trained = randomised(run.apply(base, first, second))
    merged = fold.fold(trained)
    assert_close(logits_of(merged, inputs), logits_of(trained, inputs))
    assert merged.text() == base.text()
    assert fold.without(trained, {first.name}).text() == run.apply(base, second).text()
    assert fold.without(trained, {second.name}).text() == run.apply(base, first).text()
    if "ia3_in" not in (first.name, second.name):  # the hooks see the inner input alone
        formulas = {step.name: FORMULAS[step] for step in (first, second)}
        assert_close(logits_of(trained, inputs), reference("bert", trained, formulas, inputs))


def test_an_outer_input_factor_reaches_what_is_below() -> None:
    base, inputs = graph_of("bert"), inputs_of(graph_of("bert"))
    graph = randomised(run.apply(base, Lora(rank=3, alpha=6, targets="*.query"), Ia3In(targets="*.query")))
    both = {item.step.name: item.tensors() for item in fold.folds(graph) if ".0." in item.site.path}
    one = randomised(
        run.apply(base, Lora(rank=3, alpha=6, targets="*.layer.0.*.query"), Ia3In(targets="*.layer.0.*.query"))
    )
    query = model_of("bert").get_submodule("bert.encoder.layer.0.attention.self.query")
    lora, u = both["lora"], both["ia3_in"]["u"]
    for name, tensor in {**{f"lora.{k}": v for k, v in lora.items()}, "ia3_in.u": u}.items():
        one.inserted[f"bert.encoder.layer.0.attention.self.query.{name}"] = lambda t=tensor: t  # type: ignore[misc]

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0] * u
        return torch.nn.functional.linear(x, module.weight, module.bias) + 2 * (x @ lora["a"].T @ lora["b"].T)

    handle = query.register_forward_hook(hook)
    with torch.no_grad():
        expected = model_of("bert")(**dict(zip(base.inputs, inputs, strict=True))).logits
    handle.remove()
    assert_close(logits_of(one, inputs), expected)


def test_qalora_changes_a_weight_by_a_constant_over_each_group() -> None:
    base = graph_of("llama")
    trained = randomised(run.apply(base, QaLora(targets="*.down_proj")))
    merged = fold.fold(trained)
    for item in fold.folds(trained):
        weight = base.values[item.site.weight].double()
        normal = item.normal(Base(lambda weight=weight: weight))  # type: ignore[misc]
        pooled = 2 * item.params["b"]().double() @ item.params["a"]().double()
        change = normal.delta()
        assert change is not None
        grouped = change.unflatten(1, (-1, 4))
        assert torch.equal(grouped, grouped[..., :1].expand_as(grouped))
        assert_close(grouped[..., 0].double(), pooled, 1e-6)
        assert_close(merged.values[item.site.weight].double() - weight, pooled.repeat_interleave(4, 1), 1e-6)
    with pytest.raises(SurgeonError, match="no site to work on") as caught:
        run.apply(base, QaLora(targets="*.down_proj", group=5))
    assert "no whole number of groups of 5" in caught.value.where


def test_dora_over_a_quantised_weight_sees_the_dequantised_one() -> None:
    base = graph_of("llama")

    class Dequantised(dict[str, Tensor]):
        """int8 codes with a scale per output, decoded when they are read."""

        def __getitem__(self, name: str) -> Tensor:
            weight = base.values[name]
            if weight.dim() < 2 or "embed" in name:
                return weight
            scale = weight.abs().amax(1, keepdim=True) / 127
            return (weight / scale).round().to(torch.int8).float() * scale

    quantised = dataclasses.replace(base, values=Dequantised(base.values))
    inputs = inputs_of(base)
    trained = randomised(run.apply(quantised, Dora(targets="all-linear")))
    merged = fold.fold(trained)
    assert_close(logits_of(merged, inputs), logits_of(trained, inputs))
    item = fold.folds(trained)[0]
    decoded, p = quantised.values[item.site.weight], item.tensors()
    whole = decoded + p["b"] @ p["a"]
    assert_close(merged.values[item.site.weight], p["m"][:, None] * whole / whole.norm(dim=1, keepdim=True), 1e-6)
    assert not torch.equal(decoded, base.values[item.site.weight])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_experts_are_sites(family: str) -> None:
    base, inputs = graph_of(family), inputs_of(graph_of(family))
    step = Lora(rank=3, alpha=3, targets="*.experts.*")
    graph = run.apply(base, step)
    assert torch.equal(logits_of(graph, inputs), logits_of(base, inputs))
    assert [len(paths) for _, paths in graph.groups()] == [len(paths) for _, paths in base.groups()]
    assert_trains(graph)
    trained = randomised(graph)
    model = copy.deepcopy(model_of(family))
    for item in fold.folds(trained):
        p, weight = item.tensors(), model.get_parameter(item.site.weight).data
        change = torch.einsum("eor,eri->eoi", p["b"], p["a"])
        weight += change.transpose(1, 2) if item.site.transposed else change
    with torch.no_grad():
        expected = model(**dict(zip(base.inputs, inputs, strict=True))).logits
    assert_close(logits_of(trained, inputs), expected)
    merged = fold.fold(trained)
    assert_close(logits_of(merged, inputs), logits_of(trained, inputs))
    assert merged.text() == base.text()
    found = sites(base, EXPERTS)
    assert {site.path.rpartition(".")[2] for site in found} == {"gate_up_proj", "down_proj"}
    assert {(site.experts, site.inp) for site in found if site.path.endswith("gate_up_proj")} == {(4, 32)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_is_columns_at_the_attentions(family: str) -> None:
    base, inputs = graph_of(family), inputs_of(graph_of(family))
    trained = randomised(run.apply(base, Prefix()))
    assert_trains(trained)
    columns = [item.columns() for item in fold.columns(trained)]
    cache = DynamicCache()
    for layer, column in enumerate(columns):
        cache.update(column.k.expand(2, -1, -1, -1), column.v.expand(2, -1, -1, -1), layer)
    with torch.no_grad():
        given = dict(zip(base.inputs, inputs, strict=True))
        given["attention_mask"] = torch.ones(2, 11, dtype=torch.long)
        expected = model_of(family)(**given, past_key_values=cache).logits
    assert_close(logits_of(trained, inputs), expected)
    with pytest.raises(SurgeonError, match="no adapter to merge"):
        fold.fold(trained)
    assert fold.without(trained, {"prefix"}).text() == base.text()


def test_a_prefix_hides_nothing_of_the_padding() -> None:
    base = graph_of("llama")
    trained = randomised(run.apply(base, Prefix()))
    ids, mask, positions = inputs_of(base)
    mask[0, :3] = 0
    whole = logits_of(trained, [ids, mask, positions])
    alone = logits_of(trained, [ids[:1, 3:], mask[:1, 3:], positions[:1, 3:]])
    assert_close(whole[:1, 3:], alone)


def test_a_prefix_stays_when_what_is_beside_it_merges() -> None:
    base, inputs = graph_of("llama"), inputs_of(graph_of("llama"))
    for steps in ((Lora(rank=3), Prefix()), (Prefix(), Lora(rank=3)), (Prefix(), Prefix(length=2), Lora(rank=3))):
        trained = randomised(run.apply(base, *steps))
        merged = fold.fold(trained)
        assert [step.name for step in merged.applied] == [step.name for step in steps if step.name == "prefix"]
        assert_close(logits_of(merged, inputs), logits_of(trained, inputs))
        assert merged.text() == run.apply(base, *(step for step in steps if step.name == "prefix")).text()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_is_rows_before_the_tokens(family: str) -> None:
    base, inputs = graph_of(family), inputs_of(graph_of(family))
    trained = randomised(run.apply(base, Prompt()))
    assert_trains(trained)
    (name,) = trained.trainable()
    model, rows = model_of(family), trained.inserted[name]()
    with torch.no_grad():
        embedded = model.get_input_embeddings()(inputs[0])
        given = torch.cat([rows.expand(2, -1, -1), embedded], 1)
        expected = model(inputs_embeds=given).logits[:, 4:]
    found = logits_of(trained, inputs)
    assert found.shape == expected.shape
    assert_close(found, expected)
    assert fold.without(trained, {"prompt"}).text() == base.text()
    both = randomised(run.apply(base, Prompt(), Lora(rank=3, targets="all-linear")))
    merged = fold.fold(both)
    assert merged.text() == run.apply(base, Prompt()).text()
    assert_close(logits_of(merged, inputs), logits_of(both, inputs))


def test_a_bias_that_changes_unannounced_is_an_error() -> None:
    class Silent(Ia3):
        changes_bias: ClassVar[bool] = False

    trained = randomised(run.apply(graph_of("bert"), Silent(targets="*.query", inputs="")))
    with pytest.raises(SurgeonError, match="changes a bias and does not say so"):
        fold.fold(trained).values["bert.encoder.layer.0.attention.self.query.weight"]


def test_a_bias_without_a_place_is_refused() -> None:
    class Biased(Ia3):
        def normal(self, params: Params, site: Site, base: Base) -> Normal:
            return Normal(s=params["s"], bias=params["s"])

    trained = randomised(run.apply(graph_of("llama"), Biased(targets="*.q_proj", inputs="")))
    with pytest.raises(UnsupportedError, match="needs a bias"):
        fold.fold(trained).values["model.layers.0.self_attn.q_proj.weight"]
