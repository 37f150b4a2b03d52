"""Scaled positions: the factor, what is refused, and that transformers reads what a merge writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import surgeon
from benchmarks.zoo.folders import folder_of
from benchmarks.zoo.oracles import nudged
from surgeon import context, store
from surgeon.api import read
from surgeon.errors import UnsupportedError, UsageError


def llama(**options: object) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(max_position_embeddings=4096, **options)


@pytest.mark.parametrize(("tokens", "factor"), [(8192, 2), (32768, 8), (65536, 16), (100000, 25), (4097, 2)])
def test_factors_of_longlora(tokens: int, factor: int) -> None:
    """C-78: from 4096 tokens."""
    config = llama()
    context.extend(config, tokens)
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.rope_parameters["factor"] == factor
    assert context.limit(config) == 4096 * factor


def test_a_model_that_is_scaled_already_is_scaled_on() -> None:
    config = llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    assert context.limit(config) == 8192
    context.extend(config, 8192)
    assert config.rope_parameters["factor"] == 2
    context.extend(config, 16384)
    assert config.rope_parameters["factor"] == 4


def test_only_layers_that_see_everything_are_scaled() -> None:
    config = transformers.AutoConfig.for_model("gemma3_text", max_position_embeddings=1024)
    context.extend(config, 4096)
    assert config.rope_parameters["full_attention"]["factor"] == 4
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"


def test_refusals() -> None:
    with pytest.raises(UsageError, match="1024 learned positions"):
        context.extend(transformers.GPT2Config(), 2048)
    with pytest.raises(UsageError, match=r"a context of -5 tokens"):
        context.extend(llama(), -5)
    scaled = llama(rope_parameters={
        "rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    })  # fmt: skip
    context.extend(scaled, 4096)
    with pytest.raises(UnsupportedError, match="llama3 already, up to 4096"):
        context.extend(scaled, 8192)


def test_models_without_positions_need_none() -> None:
    for config in (transformers.T5Config(), transformers.AutoConfig.for_model("bloom")):
        context.extend(config, 100000)
        assert context.limit(config) == 0


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_a_merged_folder_says_it_and_transformers_agrees(form: str, tmp_path: Path) -> None:
    """LongLoRA applied, saved, read back, merged: transformers computes at long lengths what surgeon does."""
    base = Path(shutil.copytree(folder_of("llama"), tmp_path / "base"))
    stored = json.loads((base / "config.json").read_text())
    limit = stored["max_position_embeddings"]
    if form == "rope_scaling":
        rope = stored.pop("rope_parameters")
        stored.update(rope_theta=rope["rope_theta"], rope_scaling=None)
        (base / "config.json").write_text(json.dumps(stored))
    model = nudged(surgeon.apply(base, "longlora", rank=2, context=4 * limit), 0.02)
    model.save(tmp_path / "work")
    assert read(tmp_path / "work").context == 4 * limit
    assert store.load(tmp_path / "work").config.rope_parameters["factor"] == 4
    surgeon.merge(tmp_path / "work", tmp_path / "merged")
    merged = json.loads((tmp_path / "merged/config.json").read_text())
    assert merged[form]["factor"] == 4
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.randint(3, 30, (1, 3 * limit), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = model.eval()(input_ids=ids).logits, theirs(input_ids=ids).logits
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.slow
def test_onnx_generates_what_the_work_folder_does(tmp_path: Path) -> None:
    nudged(surgeon.apply(folder_of("llama"), "longlora", rank=2, context=256), 0.02).save(tmp_path / "work")
    report = surgeon.export(tmp_path / "work", tmp_path / "onnx")
    assert report.replay.token_agreement == 1


def test_a_work_folder_has_its_context_already(tmp_path: Path) -> None:
    base = folder_of("llama")
    surgeon.apply(base, "lora", rank=2, context=256).save(tmp_path / "work")
    with pytest.raises(UsageError, match="when the first method is applied"):
        surgeon.apply(str(tmp_path / "work"), "vera", rank=2, context=512)
