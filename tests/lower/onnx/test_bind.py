"""Exports whose weights are the checkpoint's own bytes: nothing is read or copied, and a cache's links hold."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgeon
from benchmarks.zoo.folders import base_of, folder_of, save_wide
from benchmarks.zoo.graphs import randomised
from surgeon import run
from surgeon.checkpoint import Checkpoint
from surgeon.errors import SurgeonError, UsageError
from surgeon.graph import Graph
from surgeon.lower.onnx import bind, export, ready
from surgeon.lower.onnx.files import FOLDER
from surgeon.lower.onnx.own_file import DTYPES
from surgeon.lower.onnx.profiles import PROFILES
from surgeon.passes import make
from surgeon.source import open_graph, open_source
from tests.lower.onnx.conftest import Bound, traces

ORT, WEB, FP32 = PROFILES["ort"], PROFILES["web"], torch.float32
OWN = export.DATA


def test_nothing_is_read_and_nothing_is_written(bound: Bound) -> None:
    report, snapshot, before = bound.report, bound.snapshot, bound.before
    assert before == []
    assert report.token_agreement == 1.0
    assert (report.weights.form, report.weights.written, report.weights.note) == ("bind", 0, "")
    sizes = sum(info.nbytes for info in Checkpoint.open(snapshot).tensors.values())
    assert report.weights.bound == sizes
    own = sum(size for name, size in report.files.items() if not name.startswith(FOLDER))
    assert own < 200_000


def test_no_file_tells_where_it_was_made(bound: Bound) -> None:
    assert traces(bound.report.folder) == []


def test_the_blob_is_linked_and_not_the_link(bound: Bound) -> None:
    report, snapshot = bound.report, bound.snapshot
    file = report.folder / FOLDER / "model.safetensors"
    assert not file.is_symlink()
    assert file.samefile((snapshot / "model.safetensors").resolve())


def test_the_model_reads_the_checkpoints_bytes(bound: Bound) -> None:
    report, snapshot = bound.report, bound.snapshot
    graph = ir.load(report.folder / export.MODEL).graph
    stored = load_file(snapshot / "model.safetensors")
    data = (report.folder / FOLDER / "model.safetensors").read_bytes()
    for name, value in stored.items():
        tensor = graph.initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert str(tensor.location) == "weights/model.safetensors"
        stop = int(tensor.offset or 0) + int(tensor.length or 0)
        assert data[tensor.offset : stop] == value.numpy().tobytes()
    kinds = [node.op_type for node in graph if any("weight" in str(given.name) for given in node.inputs if given)]
    assert "Transpose" not in kinds
    assert kinds.count("FusedMatMul") == len([name for name in stored if "proj" in name or "lm_head" in name])


def placed(graph: Graph, folder: Path, names: list[str], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model that only has initialisers and returns them, placed as `bind` says."""
    values, nodes = [], []
    for name in names:
        spec = graph.tensors[name]
        kind = DTYPES[spec.dtype or dtype]
        lazy = ir.LazyTensor(
            lambda name=name: ir.tensor(graph.inserted[name]().numpy() if name in graph.inserted else
                                        graph.values[name].to(dtype).numpy(), name=name),
            dtype=kind, shape=ir.Shape(spec.shape), name=name,
        )  # fmt: skip
        value = ir.Value(name=name, shape=ir.Shape(spec.shape), type=ir.TensorType(kind), const_value=lazy)
        node = ir.node("Identity", [value])
        node.outputs[0].name, node.outputs[0].type = f"out.{name}", value.type
        values.append(value)
        nodes.append(node)
    outputs = [node.outputs[0] for node in nodes]
    graph_ir = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 21}, name="model")
    model = ir.Model(graph_ir, ir_version=10)
    folder.mkdir()
    found = bind.place([(model, OWN)], graph, folder, "bind")
    ir.save(model, folder / "model.onnx")
    return found, model


def outputs_of(folder: Path) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [node.name for node in session.get_outputs()]
    return dict(zip((name.removeprefix("out.") for name in names), session.run(names, {}), strict=True))


def names_in(graph: Graph) -> list[str]:
    return [name for name, spec in graph.resident().items() if spec.parameter]


def test_what_was_merged_is_written_and_the_rest_is_bound(tmp_path: Path) -> None:
    graph = run.apply(base_of("llama")[1], make("lora", targets="*.{q,v}_proj", rank=2))
    graph = randomised(graph)
    plain = ready.exportable(graph)
    found, model = placed(plain, tmp_path / "out", names_in(plain))
    own = {
        name for name, value in model.graph.initializers.items()
        if value.const_value is not None and str(value.const_value.location) == OWN
    }  # fmt: skip
    assert own == {name for name in plain.tensors if name.endswith(("q_proj.weight", "v_proj.weight"))}
    assert found.written == (tmp_path / "out" / OWN).stat().st_size
    for name, value in outputs_of(tmp_path / "out").items():
        assert np.array_equal(value, plain.values[name].numpy())


def test_half_precision_is_cast_when_it_is_loaded_and_never_narrowed(tmp_path: Path) -> None:
    folder = tmp_path / "bf16"
    shutil.copytree(folder_of("llama"), folder)
    stored = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = (folder / "config.json").read_text().replace('"float32"', '"bfloat16"')
    (folder / "config.json").write_text(config)
    graph = open_graph(open_source(folder))
    found, model = placed(graph, tmp_path / "out", names_in(graph))
    assert found.written == 0
    assert {node.op_type for node in model.graph} == {"Cast", "Identity"}
    for name, value in outputs_of(tmp_path / "out").items():
        assert np.array_equal(value, graph.values[name].float().numpy())
    assert not bind.is_bindable(torch.float32, torch.float16)
    assert bind.is_bindable(torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("method", "form"), [("intq", "compressed-tensors"), ("nf4", "bitsandbytes")])
def test_codes_of_quantised_checkpoints_are_bound(method: str, form: str, tmp_path: Path, captured_once: None) -> None:
    options = {"zero": "symmetric", "group": 32} if method == "intq" else {"double": False}
    surgeon.quantise(save_wide(tmp_path / "base"), tmp_path / "codes", method, form=form, verify=False, **options)
    graph = open_graph(open_source(tmp_path / "codes"))
    names = [name for name in graph.inserted if name.endswith((".codes", ".scale", ".absmax"))]
    found, _ = placed(graph, tmp_path / "out", names)
    assert len(names) == 28
    assert found.written == 0
    for name, value in outputs_of(tmp_path / "out").items():
        assert np.array_equal(value.ravel(), graph.inserted[name]().numpy().ravel())


def test_the_form_is_chosen_by_what_the_runtime_and_the_disk_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = base_of("llama")[1]
    assert bind.choose("", ORT, graph, FP32, tmp_path / "not" / "there") == ("bind", "")
    assert list(tmp_path.iterdir()) == []
    assert bind.choose("copy", ORT, graph, FP32, tmp_path) == ("copy", "")
    form, why = bind.choose("", WEB, graph, FP32, tmp_path)
    assert form == "copy"
    assert "the profile web" in why
    with pytest.raises(UsageError, match="no weight can be bound: the profile web"):
        bind.choose("bind", WEB, graph, FP32, tmp_path)
    form, why = bind.choose("", ORT, graph, torch.float16, tmp_path)
    assert form == "copy"
    assert "none is in a checkpoint as the graph reads it" in why
    with pytest.raises(UsageError, match="no form of weights bindd"):
        bind.choose("bindd", ORT, graph, FP32, tmp_path)
    monkeypatch.setattr(os, "link", _another_disk)
    form, why = bind.choose("", ORT, graph, FP32, tmp_path)
    assert form == "copy"
    assert "model.safetensors cannot be linked to" in why


def test_over_another_file_system_the_files_are_copied_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, graph = base_of("llama")
    monkeypatch.setattr(os, "link", _another_disk)
    found, _ = placed(graph, tmp_path / "out", names_in(graph)[:3])
    size = (folder / "model.safetensors").stat().st_size
    assert found.written == size
    assert found.note.startswith(f"1 files of the checkpoint were copied ({size:,} bytes)")


def _another_disk(*_: Any) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may grow to 64 KB: the system refuses what is longer while the weights are written."""
    big = ir.tensor(np.zeros(1 << 18, np.float32), name="big")
    value = ir.Value(name="big", shape=ir.Shape(big.shape), type=ir.TensorType(big.dtype), const_value=big)
    graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21}, name="model")
    monkeypatch.setattr(export, "build", lambda *_, **__: ir.Model(graph, ir_version=10))
    base = base_of("llama")[1]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(SurgeonError, match="the disk is full"):
            export.export_onnx(base, tmp_path / "onnx", weights="copy", verify=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
