"""Merging to a folder: the bits of PEFT's merge, fused and tied weights, every dtype, and nothing left on failure."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.zoo import build, families
from benchmarks.zoo.graphs import inputs_of, model_of, randomised
from surgeon import run
from surgeon.errors import CheckFailed, SurgeonError
from surgeon.fold import folds
from surgeon.graph import Graph
from surgeon.lower import merge as lower
from surgeon.model import load_model
from surgeon.normal import Base, Normal
from surgeon.passes import make
from surgeon.passes.base import EXPERTS, LINEAR, Adapter
from surgeon.source import Source, open_graph, open_source

pytestmark = pytest.mark.usefixtures("one_capture_per_config")


@functools.cache
def opened(folder: Path) -> tuple[Source, Graph]:
    source = open_source(folder)
    return source, open_graph(source)


def base_of(tmp_path: Path, family: str, dtype: torch.dtype = torch.float32) -> tuple[Source, Graph]:
    config = families.tiny_config(family)
    config.dtype = dtype
    model = build.build(config, families.task_of(family)).to(dtype)
    return opened(build.save(model, tmp_path / f"{family}-{dtype}"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


@torch.no_grad()
def logits(graph: Graph, folder: Path | None = None) -> torch.Tensor:
    inputs = dict(zip(graph.inputs, inputs_of(graph), strict=True))
    if folder is None:
        result: Any = load_model(graph, dtype=torch.float32)(**inputs).logits
        return result
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()(**inputs).logits  # type: ignore[no-any-return]


def nothing_left(folder: Path) -> bool:
    return [path.name for path in folder.iterdir() if "merged" in path.name] == []


@pytest.mark.parametrize(("family", "fan_in_fan_out"), [("llama", False), ("gpt2", True)])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_bits_are_those_of_pefts_fp32_merge(
    tmp_path: Path, family: str, fan_in_fan_out: bool, rslora: bool
) -> None:
    source, base = base_of(tmp_path, family)
    targets = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "c_fc"]
    trained = randomised(run.apply(base, make("lora", rank=3, alpha=7, rslora=rslora, targets=" ".join(targets))))
    options = peft.LoraConfig(
        r=3, lora_alpha=7, use_rslora=rslora, target_modules=targets, fan_in_fan_out=fan_in_fan_out
    )
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(source.folder), options)
    modules = dict(theirs.base_model.model.named_modules())
    for item in folds(trained):
        module, p = modules[item.site.path], item.tensors()
        module.lora_A["default"].weight.data, module.lora_B["default"].weight.data = p["a"], p["b"]
    expected = theirs.merge_and_unload().state_dict()
    lower.merge(trained, source, tmp_path / "merged")
    found = tensors(tmp_path / "merged")
    changed = [item.site.weight for item in folds(trained)]
    assert changed
    for name, tensor in found.items():
        full = name if name in expected else f"transformer.{name}"
        assert torch.equal(tensor, expected[full]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_once_to_the_dtype_of_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    source, base = base_of(tmp_path, "llama", dtype)
    trained = randomised(run.apply(base, make("lora", rank=3), make("vera", rank=4, targets="all-linear")))
    merged = lower.merge(trained, source, tmp_path / "merged")
    before, after = tensors(source.folder), tensors(tmp_path / "merged")
    assert set(before) == set(after)
    groups: dict[str, torch.Tensor] = {name: tensor.float() for name, tensor in before.items()}
    for item in folds(trained):
        groups[item.site.weight] = item.normal(Base(lambda: torch.empty(0))).merged(groups[item.site.weight])
    assert all(torch.equal(after[name], tensor.to(dtype)) for name, tensor in groups.items())
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert merged.comparison is not None
    assert merged.comparison.ok
    manifest = json.loads((tmp_path / "merged" / lower.MANIFEST).read_text())
    assert [step["name"] for step in manifest["passes"]] == ["lora", "vera"]
    assert manifest["verified"]["max_error"] == merged.comparison.max_error


def test_into_another_dtype(tmp_path: Path) -> None:
    source, base = base_of(tmp_path, "llama")
    trained = randomised(run.apply(base, make("lora", rank=3)))
    merged = lower.merge(trained, source, tmp_path / "merged", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in tensors(tmp_path / "merged").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert merged.comparison is not None
    assert merged.comparison.ok


@pytest.mark.parametrize("targets", ["lm_head", "embed_tokens", "lm_head embed_tokens", "*.q_proj"])
def test_tied_embeddings_come_apart_or_stay(tmp_path: Path, targets: str) -> None:
    source, base = base_of(tmp_path, "qwen3")
    trained = randomised(run.apply(base, make("lora", rank=3, targets=targets)))
    out = tmp_path / "merged"
    lower.merge(trained, source, out)
    config = json.loads((out / "config.json").read_text())
    apart = targets != "*.q_proj"
    assert config["tie_word_embeddings"] is not apart
    assert ("lm_head.weight" in tensors(out)) == apart
    expected = logits(trained)
    assert (logits(trained, out) - expected).abs().max() <= 5e-5 * expected.abs().max()


def test_fused_experts_are_written_in_the_parts_they_came_in(tmp_path: Path) -> None:
    class ExpertLora(Adapter):
        """y = W_e x + B_e A_e x."""

        name: ClassVar[str] = "lora"
        kinds: ClassVar[tuple[str, ...]] = (EXPERTS, LINEAR)

        def rewrite(self, edit: Any, site: Any) -> None:
            experts = (site.experts,) if site.experts else ()
            a = edit.param("a", (*experts, 3, site.inp), "kaiming")
            b = edit.param("b", (*experts, site.out, 3), "zeros")
            if not experts:
                edit.replace(edit.add(edit.y, edit.linear(edit.linear(edit.x, a), b)))
                return
            grouped, ids = torch.ops.surgeon.expert_linear.default, edit.argument(2)
            edit.replace(edit.add(edit.y, edit.call(grouped, edit.call(grouped, edit.x, a, ids), b, ids)))

        def normal(self, params: Any, site: Any, base: Base) -> Normal:
            return Normal(a=params["a"], b=params["b"])

    source, base = base_of(tmp_path, "mixtral")
    trained = randomised(run.apply(base, ExpertLora(targets="*.experts.* *.q_proj *.gate")))
    out = tmp_path / "merged"
    lower.merge(trained, source, out)
    before, after = tensors(source.folder), tensors(out)
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} >= {"q_proj", "gate"}
    assert sum(1 for name in changed if "expert" in name) >= 8
    expected = logits(trained)
    assert (logits(trained, out) - expected).abs().max() <= 5e-5 * expected.abs().max()


def test_experts_stored_in_one_tensor(tmp_path: Path) -> None:
    class Scaled(Adapter):
        """y = s_e ⊙ (W_e x + b_e)."""

        name: ClassVar[str] = "lora"
        kinds: ClassVar[tuple[str, ...]] = (EXPERTS,)
        changes_bias: ClassVar[bool] = True

        def rewrite(self, edit: Any, site: Any) -> None:
            s = edit.param("s", (site.experts, site.out), "ones")
            chosen = edit.call(torch.ops.aten.index.Tensor, s, [edit.argument(2)])
            edit.replace(edit.mul(edit.y, chosen))

        def normal(self, params: Any, site: Any, base: Base) -> Normal:
            bias = base.bias()
            return Normal(s=params["s"], bias=None if bias is None else params["s"] * bias)

    source, base = base_of(tmp_path, "gpt_oss")
    trained = randomised(run.apply(base, Scaled(targets="*.experts.*")))
    out = tmp_path / "merged"
    lower.merge(trained, source, out)
    before, after = tensors(source.folder), tensors(out)
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"}
    expected = logits(trained)
    assert (logits(trained, out) - expected).abs().max() <= 5e-5 * expected.abs().max()


def test_changed_biases_are_written(tmp_path: Path) -> None:
    class Ia3(Adapter):
        """y = s ⊙ (W x + b)."""

        name: ClassVar[str] = "lora"
        kinds: ClassVar[tuple[str, ...]] = (LINEAR, "conv1d")
        changes_bias: ClassVar[bool] = True

        def rewrite(self, edit: Any, site: Any) -> None:
            edit.replace(edit.mul(edit.y, edit.param("s", (site.out,), "ones")))

        def normal(self, params: Any, site: Any, base: Base) -> Normal:
            bias = base.bias()
            return Normal(s=params["s"], bias=None if bias is None else params["s"] * bias)

    source, base = base_of(tmp_path, "gpt2")
    trained = randomised(run.apply(base, Ia3(targets="*.c_attn *.c_fc"), Ia3(targets="*.c_attn")))
    out = tmp_path / "merged"
    lower.merge(trained, source, out)
    before, after = tensors(source.folder), tensors(out)
    changed = {".".join(name.split(".")[-2:]) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"c_attn.weight", "c_attn.bias", "c_fc.weight", "c_fc.bias"}
    expected = logits(trained)
    assert (logits(trained, out) - expected).abs().max() <= 5e-5 * expected.abs().max()


def test_a_failed_verification_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, base = base_of(tmp_path, "llama")
    trained = randomised(run.apply(base, make("lora", rank=3)))

    def wrong(weight: torch.Tensor, below: list[Normal]) -> torch.Tensor:
        for normal in below:
            weight = normal.merged(weight) * 1.01
        return weight

    monkeypatch.setattr(lower, "stacked", wrong)
    with pytest.raises(CheckFailed, match="not the same function") as caught:
        lower.merge(trained, source, tmp_path / "merged")
    assert caught.value.exit_code == 1
    assert nothing_left(tmp_path)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "old").write_text("kept")
    with pytest.raises(CheckFailed):
        lower.merge(trained, source, tmp_path / "merged", overwrite=True)
    assert (tmp_path / "merged" / "old").read_text() == "kept"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_leaves_nothing(tmp_path: Path, bad: float) -> None:
    source, base = base_of(tmp_path, "llama")
    trained = run.apply(base, make("lora", rank=3))
    name = "model.layers.2.self_attn.q_proj.lora.b"
    trained.inserted[name] = lambda: torch.full((32, 3), bad)
    with pytest.raises(SurgeonError) as caught:
        lower.merge(trained, source, tmp_path / "merged")
    assert "q_proj" in str(caught.value)
    assert nothing_left(tmp_path)


def test_untouched_tensors_keep_their_bytes(tmp_path: Path) -> None:
    source, base = base_of(tmp_path, "llama", torch.bfloat16)
    lower.merge(randomised(run.apply(base, make("lora", rank=3, targets="*.q_proj"))), source, tmp_path / "merged")
    before, after = tensors(source.folder), tensors(tmp_path / "merged")
    same = [name for name in before if torch.equal(before[name].view(torch.int16), after[name].view(torch.int16))]
    assert len(same) == len(before) - 4


def test_a_head_stored_untied_is_merged_untied(tmp_path: Path) -> None:
    folder = build.save(model_of("qwen3"), tmp_path / "stored")
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened_file:
        metadata = opened_file.metadata()
    stored = load_file(file)
    stored["lm_head.weight"] = torch.randn(112, 32)
    save_file(stored, file, metadata)
    source = open_source(folder)
    trained = randomised(run.apply(open_graph(source), make("lora", rank=3, targets="lm_head")))
    lower.merge(trained, source, tmp_path / "merged")
    after = tensors(tmp_path / "merged")
    assert torch.equal(after["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], stored["lm_head.weight"])
