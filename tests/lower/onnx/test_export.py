"""An exported model computes what torch computes, through its cache, and its folder holds no more than it should."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from benchmarks.zoo import build, causal, graphs
from surgeon import lower, run
from surgeon.errors import CheckFailed, UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.lower.onnx import check, export, ready
from surgeon.lower.onnx import session as ort
from surgeon.passes import make
from surgeon.stream import StreamingExecutor
from surgeon.verification import make_probes

SCHEDULE = (5, 1, 1, 3, 1, 1)  # 12 tokens: a prefill, steps, a chunk; past the tiny families' window of 5
BATCHED = (7, 1, 1, 1, 1, 1)  # GroupQueryAttention continues by several tokens in one row only
PADDING = (0, 4, 2)
ERROR = 1e-5  # relative to the largest logit: fp32 arithmetic in another order


def exported(graph: Graph, folder: Path, **options: Any) -> export.OnnxReport:
    return export.export_onnx(graph, folder / "onnx", **options)


def batch(graph: Graph) -> tuple[Any, Any]:
    """Token ids and mask `[3, 12]`, two rows padded on the left."""
    vocabulary = graph.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (3, sum(SCHEDULE)), generator=torch.Generator().manual_seed(1)).numpy()
    mask = np.ones_like(ids)
    for row, count in enumerate(PADDING):
        mask[row, :count] = 0
    return ids, mask


def stepped(file: Path, ids: Any, mask: Any, schedule: Sequence[int] = BATCHED) -> Any:
    """The logits of all tokens, fed through the cache as the schedule says."""
    session = ort.open_session(file)
    names = [node.name for node in session.get_inputs()]
    outputs = [node.name for node in session.get_outputs()]
    past, start, logits = ort.empty_cache(session, len(ids)), 0, []
    for new in schedule:
        end = start + new
        places = ort.numbered(mask)[:, start:end]
        feed = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "position_ids": places, **past}
        found = dict(zip(outputs, session.run(None, {name: feed[name] for name in names}), strict=True))
        past = {k.replace("present", "past_key_values"): v for k, v in found.items() if k != "logits"}
        logits.append(found["logits"].astype(np.float32))
        start = end
    return np.concatenate(logits, 1)


def error_against_transformers(family: str, file: Path) -> float:
    """The largest difference at unpadded tokens, relative to the largest logit: of a batch, and of its rows alone."""
    ids, mask = batch(graphs.graph_of(family))
    given = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in graphs.graph_of(family).inputs:
        given["position_ids"] = ort.numbered(mask)
    with torch.no_grad():
        expected = graphs.model_of(family)(**{k: torch.from_numpy(v) for k, v in given.items()}).logits.numpy()
    alone = [stepped(file, ids[row : row + 1], mask[row : row + 1], SCHEDULE) for row in range(len(ids))]
    found = [np.abs(each - expected)[mask > 0].max() for each in (stepped(file, ids, mask), np.concatenate(alone))]
    return float(max(found) / np.abs(expected).max())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> export.OnnxReport:
    return exported(graphs.graph_of("llama"), tmp_path_factory.mktemp("llama"))


def test_steps_through_the_cache_equal_transformers(llama: export.OnnxReport) -> None:
    assert error_against_transformers("llama", llama.folder / export.MODEL) < ERROR


def test_names_and_dimensions_are_those_that_runtimes_expect(llama: export.OnnxReport) -> None:
    graph = ir.load(llama.folder / export.MODEL).graph
    kept = [f"past_key_values.{i}.{word}" for i in range(4) for word in ("key", "value")]
    assert [value.name for value in graph.inputs] == ["input_ids", "attention_mask", "position_ids", *kept]
    present = [name.replace("past_key_values", "present") for name in kept]
    assert [value.name for value in graph.outputs] == ["logits", *present]
    shapes = {value.name: [str(size) for size in value.shape or ()] for value in (*graph.inputs, *graph.outputs)}
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.0.key"] == ["batch_size", "2", "past_sequence_length", "8"]
    assert shapes["present.0.key"] == ["batch_size", "2", "total_sequence_length", "8"]


def test_the_replay_is_in_the_manifest(llama: export.OnnxReport) -> None:
    manifest = json.loads((llama.folder / export.MANIFEST).read_text())
    verified = manifest["verified"]
    assert verified["token_agreement"] == llama.token_agreement == 1.0
    assert verified["max_error"] == llama.max_error
    assert llama.max_error is not None
    assert 0 < llama.max_error < verified["bound"]
    single, padded = verified["batches"]
    assert len(single["prompts"]) == 1
    assert len({len(prompt) for prompt in padded["prompts"]}) == 3
    assert all(len(row) == 20 for row in single["tokens"] + padded["tokens"])


def test_no_path_and_no_trace_of_the_source(llama: export.OnnxReport) -> None:
    for path in llama.folder.iterdir():
        content = path.read_bytes()
        for word in (b"/home", b"/tmp", b"site-packages", b".py", str(Path.cwd()).encode(), str(llama.folder).encode()):
            assert word not in content, f"{word!r} in {path.name}"


def test_the_folder_has_the_configs(llama: export.OnnxReport) -> None:
    configs = {"config.json", "generation_config.json", "surgeon.json"}
    assert set(llama.files) == {"model.onnx", "model.onnx.safetensors", *configs}
    assert json.loads((llama.folder / "config.json").read_text())["model_type"] == "llama"


def test_weights_are_written_once(llama: export.OnnxReport) -> None:
    graph = graphs.graph_of("llama")
    parameters = sum(spec.count for spec in graph.tensors.values()) * 4
    assert parameters <= llama.files["model.onnx"] + llama.files["model.onnx.safetensors"] < parameters + 120_000


def logits_of(graph: Graph, ids: Any, mask: Any) -> Any:
    """The graph's own logits, adapters not folded."""
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": ort.numbered(mask)}
    return StreamingExecutor(graph)(*(torch.from_numpy(given[name]) for name in graph.inputs))[0].numpy()


def adapted(family: str, *, std: float) -> Graph:
    """A family with LoRA, and VeRA above it, whose values were drawn."""
    steps = (make("lora", targets="all-linear", rank=4), make("vera", targets="*.{q,k}_proj", rank=8))
    return graphs.randomised(run.apply(graphs.graph_of(family), *steps), std=std)


def test_adapters_are_folded_in_and_tied_weights_stay_one(tmp_path: Path) -> None:
    """Gemma 2: sliding windows, soft caps, a tied head; the replay is against the folded graph."""
    graph = adapted("gemma2", std=0.1)
    report = exported(graph, tmp_path)
    assert report.token_agreement == 1.0
    initialisers = ir.load(report.folder / export.MODEL).graph.initializers
    assert "model.embed_tokens.weight" in initialisers
    assert "lm_head.weight" not in initialisers
    ids, mask = batch(graph)
    found = stepped(report.folder / export.MODEL, ids, mask)
    expected, plain = logits_of(graph, ids, mask), logits_of(graphs.graph_of("gemma2"), ids, mask)
    assert np.abs(found - expected)[mask > 0].max() < ERROR * np.abs(expected).max()
    assert np.abs(found - plain)[mask > 0].max() > 0.1
    passes = [step["name"] for step in json.loads((report.folder / export.MANIFEST).read_text())["passes"]]
    assert passes == ["lora", "vera"]


def test_fp16_of_a_fresh_adapter_keeps_every_tensor(tmp_path: Path) -> None:
    """An adapter that is still zero folds into the base's own weights; cache and weights are half as large."""
    graph = run.apply(graphs.graph_of("mistral"), make("lora", rank=4))
    report = exported(graph, tmp_path, precision="fp16")
    assert report.token_agreement == 1.0
    assert report.max_error is not None
    assert error_against_transformers("mistral", report.folder / export.MODEL) < 2e-2
    found = ir.load(report.folder / export.MODEL).graph
    kinds = {value.name: value.dtype for value in (*found.inputs, *found.outputs)}
    assert kinds["past_key_values.0.key"] == kinds["present.0.value"] == ir.DataType.FLOAT16
    parameters = {name for name, spec in graphs.graph_of("mistral").tensors.items() if spec.parameter}
    assert parameters <= set(found.initializers)
    weights = [value.dtype for name, value in found.initializers.items() if name.endswith("proj.weight")]
    assert weights
    assert set(weights) == {ir.DataType.FLOAT16}


def test_a_wrong_file_is_caught_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = export.build

    def wrong(*args: Any, **options: Any) -> ir.Model:
        model = right(*args, **options)
        for name, value in model.graph.initializers.items():
            if "down_proj" in name and value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.05), name=name)
        return model

    monkeypatch.setattr(export, "build", wrong)
    with pytest.raises(CheckFailed, match="ONNX Runtime computes something else"):
        exported(graphs.graph_of("llama"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_tokens_fail(llama: export.OnnxReport) -> None:
    graph = graphs.graph_of("llama")
    found = check.replay(graph, llama.folder / export.MODEL, make_probes(graph, length=6), torch.float32, steps=3)
    assert found.token_agreement == 1.0
    assert found.steps == 3
    found = dataclasses.replace(found, token_agreement=0.9)
    with pytest.raises(CheckFailed, match="other tokens"):
        found.require("out")


def test_what_is_not_supported_is_said() -> None:
    with pytest.raises(UnsupportedError, match="encoder-decoders, classifiers and encoders; t5 is read for features"):
        ready.exportable(dataclasses.replace(graphs.graph_of("t5"), task="features"))
    with pytest.raises(UnsupportedError, match="no place for kv_cache"):
        ready.exportable(run.apply(graphs.graph_of("llama"), make("kv_cache")))
    with pytest.raises(UsageError, match="fp16"):
        export.export_onnx(graphs.graph_of("llama"), "unused", precision="fp61")
    with pytest.raises(UsageError, match="onnx"):
        lower.export("unused", "unused", target="onxx")


def test_recurrent_models_are_refused_by_name(tmp_path: Path) -> None:
    config = causal.causal_config("minimax")
    graph = graphs.graph_over(build.build(config), config, "causal-lm")
    with pytest.raises(UnsupportedError, match="minimax carries state"):
        exported(graph, tmp_path)


FAMILIES = (
    "qwen3", "gpt2", "gemma3_text", "gemma3n_text", "llama4_text", "gpt_oss", "mixtral", "qwen3_moe", "deepseek_v3",
    "opt", "gpt_neox", "phi", "phi3", "olmo2",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    report = exported(graphs.graph_of(family), tmp_path)
    assert report.token_agreement == 1.0
    assert error_against_transformers(family, report.folder / export.MODEL) < ERROR
