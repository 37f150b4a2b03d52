"""Slots over a base in integers, in every profile: the runtimes swap adapters, each beside the same codes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.zoo.folders import base_of
from surgeon.graph import Graph
from surgeon.lower.onnx import adapter_file, adapter_slots, adapter_stack, adapters, export
from surgeon.lower.onnx.unrounded import open_unrounded
from tests.lower.onnx.runtimes import by_genai
from tests.lower.onnx.test_adapter_file import expected_of, prompt
from tests.lower.onnx.test_slots import decoded
from tests.lower.onnx.test_slots_precision import ERROR, STEPS, adapted, agreed, in_codes

PROFILES = {"genai": "MatMulNBits", "web": "MatMulNBits", "openvino": "DequantizeLinear"}


def exported(folder: Path, profile: str, form: str, precision: str) -> tuple[Path, dict[str, Any]]:
    """An export that is not replayed, and its manifest."""
    options: dict[str, Any] = {"profile": profile, "adapters": form, "precision": precision, "verify": False}
    out = export.export_onnx(base_of("llama")[1], folder / "onnx", **options).folder
    return out, adapter_file.read_export(out)


def values_of(graph: Graph, record: dict[str, Any]) -> dict[str, Any]:
    return adapters.arrays(adapter_slots.compiled(graph, record))


def dora() -> Graph:
    return adapted("dora", {"rank": 2}, std=0.1)


@pytest.mark.parametrize(
    "profile", [pytest.param(name, marks=() if name == "web" else pytest.mark.slow) for name in PROFILES]
)
def test_every_profile_has_its_operators_and_its_slots(profile: str, tmp_path: Path) -> None:
    out, record = exported(tmp_path, profile, "slots", "int8")
    file = out / record["model"]
    nodes = Counter(node.op_type for node in ir.load(file).graph)
    assert nodes[PROFILES[profile]] == len(record["quantised"]["linears"])
    session = open_unrounded(file)
    for graph, given in (
        (dora(), adapter_file.as_loaded(values_of(dora(), record), record)),
        (base_of("llama")[1], adapter_file.as_loaded({}, record)),
    ):
        agreed(session, in_codes(graph, record), given)


@pytest.mark.slow
def test_openvino_swaps_them(tmp_path: Path) -> None:
    import openvino

    out, record = exported(tmp_path, "openvino", "slots", "int4")
    hints = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": 1,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "KV_CACHE_PRECISION": "f32",
    }
    compiled = openvino.Core().compile_model(str(out / export.MODEL), "CPU", hints)

    def run(feed: Any) -> dict[str, Any]:
        return {node.get_any_name(): value for node, value in compiled(dict(feed)).items()}

    for graph, values in ((dora(), values_of(dora(), record)), (base_of("llama")[1], {})):
        ids, found = decoded(run, adapter_file.as_loaded(values, record).feed(), prompt(), record)
        expected = expected_of(in_codes(graph, record), ids)[:, :-1]
        assert np.abs(found - expected).max() <= 10 * ERROR * np.abs(expected).max()


@pytest.mark.slow
def test_genai_swaps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rounding of activations, so that the tokens are torch's."""
    import onnxruntime_genai as og

    monkeypatch.setattr(export, "FAST", 1)
    out, record = exported(tmp_path, "genai", "slots", "int4")
    file = tmp_path / "dora.onnx_adapter"
    adapter_file.write(values_of(dora(), record), record, file)
    model: Any = og.Model(str(out))
    known: Any = og.Adapters(model)
    known.load(str(file), "dora")
    texts = []
    for name, graph in (("", base_of("llama")[1]), ("dora", dora())):
        given = prompt()[0].tolist()
        ids = np.array([given + by_genai(model, given, STEPS, known, name)])
        expected = expected_of(in_codes(graph, record), ids)[0, prompt().shape[1] - 1 : -1]
        assert expected.argmax(-1).tolist() == ids[0, prompt().shape[1] :].tolist()
        texts.append(ids.tolist())
    assert texts[0] != texts[1]


def test_rows_of_a_batch_have_adapters_of_their_own(tmp_path: Path) -> None:
    out, record = exported(tmp_path, "ort", "stacked", "int4")
    graphs = [dora(), adapted("ia3", {}, std=0.1)]
    stack = adapter_stack.stacked([values_of(graph, record) for graph in graphs], record)
    session, base = open_unrounded(out / export.MODEL), base_of("llama")[1]
    for number, graph in enumerate([base, *graphs]):
        given = adapter_file.Loaded(adapter_file.as_loaded(stack, record).inputs, {}, (number,))
        agreed(session, in_codes(graph, record), given)
