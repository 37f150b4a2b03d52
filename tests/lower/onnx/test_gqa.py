"""GroupQueryAttention by construction: the same logits in every batch, or standard operators and the reason."""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from benchmarks.zoo import graphs
from surgeon import ops, run
from surgeon.graph import Graph
from surgeon.lower.onnx import export, gqa, group_query
from surgeon.lower.onnx import session as ort
from surgeon.lower.onnx.join import Joined, finish, typed
from surgeon.lower.onnx.parts import lower_part
from surgeon.passes import make

HEADS, SHARED, SIZE, PAST, NEW = 4, 2, 8, 6, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"scale": 0.3},
    "window": {"scale": 0.3, "window": 4},
    "chunk": {"scale": 0.3, "chunk": 4},
    "softcap": {"scale": 1.0, "softcap": 2.0, "window": 5},
}


def rows_of(heads: torch.Tensor) -> torch.Tensor:
    return heads.transpose(1, 2).flatten(2)


def heads_of(rows: torch.Tensor) -> torch.Tensor:
    return rows.unflatten(2, (HEADS, SIZE)).transpose(1, 2)


def operator_alone(options: dict[str, Any], *, sinks: bool, bias: bool) -> onnxruntime.InferenceSession:
    """The operator as surgeon writes it, lowered by itself."""
    part = torch.fx.Graph()
    names = ["q", "k", "v", "past_k", "past_v", "mask", *(["bias"] if bias else []), *(["sinks"] if sinks else [])]
    given = {name: part.placeholder(name) for name in names}
    call, rest = part.call_function, dict(options)
    q, k, v = (call(rows_of, (given[name],)) for name in "qkv")
    added = call(group_query.added, (given["mask"], q, torch.float32, rest.pop("chunk", 0)))
    added = call(group_query.biased, (added, given["bias"])) if bias else added
    total = call(group_query.total, (given["mask"],))
    counts = [call(group_query.lengths, (given["mask"], total)), total]
    args: list[Any] = [q, k, v, given["past_k"], given["past_v"], *counts, added, None, None, given.get("sinks")]
    made = call(group_query.attention, tuple(args), {**rest, "heads": HEADS})
    result, keys, values = (call(operator.getitem, (made, position)) for position in range(3))
    part.output((call(heads_of, (result,)), keys, values))
    samples = []
    for batch, past, new in ((2, 5, 3), (3, 11, 7)):
        sizes = {"q": (batch, HEADS, new, SIZE), "k": (batch, SHARED, new, SIZE), "past_k": (batch, SHARED, past, SIZE)}
        sizes |= {"v": sizes["k"], "past_v": sizes["past_k"], "sinks": (HEADS,), "bias": (1, HEADS, 1, past + new)}
        made = {name: torch.zeros(size, device="meta") for name, size in sizes.items()}
        made["mask"] = torch.ones(batch, past + new, dtype=torch.bool, device="meta")
        samples.append(tuple(made[name] for name in names))
    model = lower_part(part, *samples, 21)
    inputs = [typed(name, sample.dtype, [None] * sample.dim()) for name, sample in zip(names, samples[0], strict=True)]
    joined = Joined(lambda name: pytest.fail(name))
    results = joined.stamp(model, "", dict(enumerate(inputs)))
    outputs = [typed(name, torch.float32, [None] * 4) for name in ("result", "keys", "values")]
    file = ir.to_proto(finish(joined, inputs, results, outputs, 21)).SerializeToString()
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("window", "sinks"),
        *(pytest.param(kind, extra, marks=pytest.mark.slow) for kind in OPTIONS for extra in ("", "sinks", "bias")),
    ],
)
def test_the_operator_computes_what_the_attention_node_does(kind: str, extra: str) -> None:
    """A prefill of three rows padded on the left, then a step; and one row that continues by several tokens."""
    session = operator_alone(OPTIONS[kind], sinks=extra == "sinks", bias=extra == "bias")
    for batch, schedule in ((3, (PAST, 1, 1)), (1, (PAST, NEW, 1))):
        total = sum(schedule)
        generator = torch.Generator().manual_seed(batch)
        mask = torch.ones(batch, total, dtype=torch.bool)
        for row in range(batch):
            mask[row, : 2 * row] = False
        q = torch.randn(batch, HEADS, total, SIZE, generator=generator)
        k, v = (torch.randn(batch, SHARED, total, SIZE, generator=generator) for _ in range(2))
        sinks = torch.randn(HEADS, generator=generator) if extra == "sinks" else None
        bias = torch.randn(1, HEADS, 1, total, generator=generator) if extra == "bias" else None
        expected = ops.attention(q, k, v, mask, bias, sinks, causal=True, **OPTIONS[kind])
        past_k, past_v, start, found = k[:, :, :0].numpy(), v[:, :, :0].numpy(), 0, []
        for new in schedule:
            end = start + new
            feed = {"q": q[:, :, start:end], "k": k[:, :, start:end], "v": v[:, :, start:end], "mask": mask[:, :end]}
            feed |= {"bias": bias[:, :, :, :end]} if bias is not None else {}
            feed |= {"sinks": sinks} if sinks is not None else {}
            arrays = {name: value.numpy() for name, value in feed.items()}
            result, past_k, past_v = session.run(None, {**arrays, "past_k": past_k, "past_v": past_v})
            found.append(result)
            start = end
        assert np.array_equal(past_k, k.numpy())
        difference = np.abs(np.concatenate(found, 2) - expected.numpy()).transpose(0, 2, 1, 3)[mask.numpy()]
        assert difference.max() < 2e-6
        assert not np.isnan(np.concatenate(found, 2)).any()


@pytest.mark.slow
def test_a_model_has_one_operator_per_layer_and_says_so(tmp_path: Path) -> None:
    """gpt-oss: sinks, windows in every other layer."""
    report = export.export_onnx(graphs.graph_of("gpt_oss"), tmp_path / "onnx", profile="ort")
    assert (report.attention, report.fallbacks, report.token_agreement) == ("gqa", {}, 1.0)
    nodes = [node for node in ir.load(report.folder / export.MODEL).graph if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == graphs.graph_of("gpt_oss").config.num_hidden_layers
    assert {"local_window_size" in node.attributes for node in nodes} == {True, False}
    said = json.loads((report.folder / export.MANIFEST).read_text())["attention"]
    assert said["operator"] == "com.microsoft.GroupQueryAttention"
    assert said["padding"] == "left or right"


def fallbacks(graph: Graph) -> dict[str, list[str]]:
    cached = run.apply(graph, make("kv_cache"))
    found = gqa.fuse(cached)
    assert found.fused == (found.graph is not cached) == (not found.reasons)
    return {why: list(paths) for why, paths in found.reasons.items()}


def test_what_the_operator_cannot_express_is_said() -> None:
    assert fallbacks(graphs.graph_of("llama")) == {}
    prefixed = fallbacks(run.apply(graphs.graph_of("llama"), make("prefix", tokens=2)))
    assert [why.startswith("virtual tokens are constants") for why in prefixed] == [True]
    assert [len(paths) for paths in prefixed.values()] == [4]


@pytest.mark.slow
def test_a_fallback_is_told_and_its_export_is_right(tmp_path: Path) -> None:
    graph = graphs.randomised(run.apply(graphs.graph_of("llama"), make("prefix", tokens=2)), std=0.5)
    report = export.export_onnx(graph, tmp_path / "onnx", profile="ort")
    assert report.attention == "standard"
    assert [why.startswith("virtual tokens") for why in report.fallbacks] == [True]
    assert report.token_agreement == 1.0
    said = json.loads((report.folder / export.MANIFEST).read_text())["attention"]
    assert (said["operator"], said["fallbacks"]) == ("standard", report.fallbacks)
    assert ort.open_session(report.folder / export.MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "mixtral", "mistral", "opt", "gpt_neox", "gpt2", "phi3", "llama4_text"])
def test_families(family: str, tmp_path: Path) -> None:
    report = export.export_onnx(graphs.graph_of(family), tmp_path / "onnx", profile="ort")
    assert report.attention == "gqa", report.fallbacks
    assert report.token_agreement == 1.0
