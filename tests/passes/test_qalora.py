"""QA-LoRA: its formula, the exact merge into zero points, the factors of other people's files, what does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.zoo.folders import folder_of
from benchmarks.zoo.graphs import close, graph_of, inputs_of, outputs_of, randomised
from surgeon import api, fold, run
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.hold import held_value
from surgeon.model import load_model
from surgeon.module import load
from surgeon.normal import Normal
from surgeon.passes import make
from surgeon.planning import plan
from surgeon.presets import steps_of
from surgeon.zero_points import fold_zero_points, unfoldable


def adapted(family: str = "llama", bits: int = 4, wide: torch.dtype = torch.float32, **options: object) -> Graph:
    """QA-LoRA with random values over integers, all in one dtype."""
    base = graph_of(family)
    values = {name: base.values[name] for name in base.values}
    values = {name: value.to(wide) if value.is_floating_point() else value for name, value in values.items()}
    steps = (make("intq", bits=bits, group=8, **options), make("qalora", rank=3))
    graph = randomised(run.apply(dataclasses.replace(base, values=values), *steps))
    for name in graph.trainable():
        value = graph.inserted[name]().to(wide)
        graph.inserted[name] = lambda value=value: value
    return graph


def test_the_formula() -> None:
    """y = W x + alpha / rank · B A sum_group(x), in five lines of NumPy; the factors of the other pools."""
    x, rng = np.random.default_rng(0).normal(size=(5, 24)), np.random.default_rng(1)
    a, b = rng.normal(size=(3, 3)), rng.normal(size=(7, 3))
    pooled = x.reshape(5, 3, 8).sum(-1)
    for pool, form in (("sum", pooled), ("mean", pooled / 8), ("peft", pooled / 8 * 3)):
        step = make("qalora", rank=3, group=8, pool=pool)
        site = next(s for s in run.chosen_sites(graph_of("llama"), make("lora", targets="all-linear"))[0])
        normal = Normal(step.scale_at(dataclasses.replace(site, inp=24)), torch.tensor(a), torch.tensor(b), group=8)
        delta = normal.delta()
        assert delta is not None
        assert np.allclose(x @ delta.double().numpy().T, 16 / 3 * form @ a.T @ b.T, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_merge_into_zero_points_is_exact(bits: int) -> None:
    graph = adapted("gpt2", bits, torch.float64)
    merged = fold_zero_points(graph)
    assert [step.name for step in merged.applied] == ["intq"]
    assert merged.text() == run.apply(graph_of("gpt2"), make("intq", bits=bits, group=8)).text()
    with torch.no_grad():
        found, expected = (load(one)(*inputs_of(graph))[0] for one in (merged, graph))
    assert expected.dtype == torch.float64
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    for name in (name for name in graph.inserted if name.endswith((".codes", ".scale"))):
        assert torch.equal(merged.inserted[name](), graph.inserted[name]())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_fp32_every_merged_weight_is_right_to_the_last_digits(family: str, bits: int) -> None:
    graph = adapted(family, bits)
    merged = fold_zero_points(graph)
    for item in fold.folds(graph):
        name = item.site.weight
        expected = fold.stacked(item.site.matrix(held_value(graph, name)).double(), fold.normals([item], None, None))  # type: ignore[arg-type]
        found = item.site.matrix(held_value(merged, name))
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert close(outputs_of(merged), outputs_of(graph))


def test_rounded_zero_points_would_lose_the_adapter() -> None:
    """Why they are floating point: what requantising loses is what users see elsewhere."""
    graph = adapted("gpt2")
    merged = fold_zero_points(graph)
    rounded = dataclasses.replace(merged, inserted=dict(merged.inserted))
    for name in (name for name in merged.inserted if name.endswith(".zero")):
        rounded.inserted[name] = lambda name=name: merged.inserted[name]().round()
    expected = outputs_of(graph)
    assert (outputs_of(rounded) - expected).norm() > 1e3 * (outputs_of(merged) - expected).norm()


def test_what_is_not_constant_over_a_group_is_refused() -> None:
    quantised = run.apply(graph_of("llama"), make("intq", group=8))
    lora = run.apply(quantised, make("lora", rank=3))
    with pytest.raises(UnsupportedError, match="lora is not constant over groups of 8 inputs"):
        fold_zero_points(lora)
    assert "not constant" in unfoldable(lora)
    dora = run.apply(quantised, make("dora", rank=3))
    with pytest.raises(UnsupportedError, match="constant over groups"):
        fold_zero_points(dora)
    with pytest.raises(UnsupportedError, match="its zero points are integers"):
        fold_zero_points(adapted(zero="integer"))
    with pytest.raises(UnsupportedError, match="no zero points"):
        fold_zero_points(run.apply(graph_of("llama"), make("qalora", rank=3, group=8)))
    with pytest.raises(UsageError, match="no adapter to merge"):
        fold_zero_points(quantised)


def test_a_wider_group_than_the_integers_folds_too() -> None:
    base = graph_of("gpt2")
    graph = randomised(run.apply(base, make("intq", group=8), make("qalora", rank=3, group=16)))
    assert close(outputs_of(fold_zero_points(graph)), outputs_of(graph))


def test_the_group_is_that_of_the_integers() -> None:
    base = graph_of("llama")
    quantised = run.apply(base, make("intq", group=8))
    assert run.apply(quantised, make("qalora", rank=3)).applied[1].group == 8  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="has no group"):
        run.apply(base, make("qalora", rank=3))
    with pytest.raises(UsageError, match="pools groups of 12, the weights are quantised in groups of 8"):
        run.apply(quantised, make("qalora", rank=3, group=12))


def test_the_count_is_the_papers() -> None:
    """C-48: 89 M for LLaMA-7B, rank 64, groups of 32."""
    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    assert plan(config, *steps_of("qa-lora", {}), task="causal-lm").trainable_parameters == 89_309_184


@pytest.mark.parametrize("pool", ["sum", "peft"])
def test_work_folders_and_pefts_files(pool: str, tmp_path: Path) -> None:
    step = make("qalora", rank=3, group=8, pool=pool)
    graph = randomised(run.apply(api.read(folder_of("llama")), step))
    model = load_model(graph)
    folder = model.save(tmp_path / "work")
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(api.load(folder)(input_ids=ids).logits, expected)
        if pool == "peft":
            (folder / "surgery.json").unlink()
            again = api.load(folder)
            (step,) = again.graph.applied
            assert (step.name, step.pool, step.group) == ("qalora", "peft", 8)  # type: ignore[attr-defined]
            assert torch.equal(again(input_ids=ids).logits, expected)
    assert (folder / "adapter_config.json").is_file() == (pool == "peft")


@pytest.mark.parametrize(("flag", "factor"), [({}, 1 / 8), ({"use_qalora": True, "qalora_group_size": 8}, 4 / 8)])
def test_files_of_the_papers_code_and_of_peft(flag: dict[str, object], factor: float, tmp_path: Path) -> None:
    """In the layout of both: A `[r, in / g]`; the code pools by the mean, PEFT by the mean times in / g."""
    quantised, folder = tmp_path / "quantised", tmp_path / "adapter"
    api.quantise(folder_of("llama"), quantised, make("intq", group=8, targets="*.q_proj"))
    generator, tensors, folder_name = torch.Generator().manual_seed(0), {}, "base_model.model.model.layers.{}"
    for layer in range(4):
        stem = folder_name.format(layer) + ".self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(3, 4, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(32, 3, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj"], "base_model_name_or_path": str(quantised), "inference_mode": True, **flag,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    graph = api.read(folder)
    step = graph.applied[-1]
    assert (step.name, step.group) == ("qalora", 8)  # type: ignore[attr-defined]
    name = "model.layers.1.self_attn.q_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    plain = api.read(quantised)
    held = plain.tensors[f"{name}.weight"].held
    assert held is not None
    zero, scale = (plain.inserted[held.parts[part]]().double() for part in ("zero", "scale"))
    merged = fold_zero_points(graph)
    expected = zero - (b @ a) * (6 / 3) * factor / scale  # the code's merge: zeros −= (B A)ᵀ · s / g / scales
    assert torch.allclose(merged.inserted[held.parts["zero"]]().double(), expected, rtol=1e-5, atol=1e-5)
    assert close(outputs_of(merged), outputs_of(graph))


def test_a_flag_that_peft_ignores_is_plain_lora(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    base = graph_of("llama")
    lora = randomised(run.apply(api.read(folder_of("llama")), make("lora", rank=3)))
    load_model(lora).save(folder)
    (folder / "surgery.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text()) | {"use_qalora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    graph = api.read(folder)
    assert graph.applied[-1].name == "lora"
    assert torch.equal(outputs_of(graph), outputs_of(lora))
    assert base.applied == ()


@pytest.mark.parametrize(
    ("options", "what"),
    [({"rank": 0}, "rank is 0"), ({"dropout": 1.0}, "dropout"), ({"pool": "max"}, "pool is"), ({"group": -2}, "group")],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        make("qalora", **options)
