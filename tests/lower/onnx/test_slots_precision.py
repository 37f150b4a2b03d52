"""Slots over a base that the export itself puts in integers: decided, proven, swapped, and compiled for later."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from benchmarks.zoo.folders import base_of, folder_of
from benchmarks.zoo.graphs import randomised
from benchmarks.zoo.oracles import nudged
from surgeon import api, run
from surgeon.errors import CheckFailed, UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.lower.onnx import (
    adapter,
    adapter_file,
    adapter_slots,
    adapters,
    check,
    effective,
    export,
    precision,
    ready,
    verify,
)
from surgeon.lower.onnx.profiles import find
from surgeon.lower.onnx.unrounded import open_unrounded
from surgeon.passes import make, parse
from surgeon.verification import make_probes
from tests.lower.onnx.test_adapter_file import Activated, expected_of, prompt

STEPS, ERROR = 6, 1e-5
SMALL = ("lora", {"rank": 2, "targets": "*.{q,v}_proj"})
"""Of this one 4-bit codes would hold nothing."""


def adapted(method: str, options: dict[str, Any], std: float, family: str = "llama") -> Graph:
    return randomised(run.apply(base_of(family)[1], make(method, **options)), std=std)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> export.OnnxReport:
    """A Llama in int4 with a small LoRA, replayed."""
    out = tmp_path_factory.mktemp("coded") / "onnx"
    given = {"small": adapted(*SMALL, std=0.02)}
    return export.export_onnx(base_of("llama")[1], out, precision="int4", adapters="slots", given=given)


@pytest.fixture(scope="module")
def record(report: export.OnnxReport) -> dict[str, Any]:
    return adapter_file.read_export(report.folder)


def in_codes(graph: Graph, record: dict[str, Any]) -> Graph:
    """What the export computes with an adapter, in torch."""
    step: Any = parse(record["quantised"]["codes"])
    return effective.adapted(graph, step)


def agreed(session: Any, graph: Graph, given: adapter_file.Loaded | None = None) -> None:
    """The greedy tokens are torch's, with the same logits at every step."""
    ids, _, found = check.decode(session, prompt(), np.ones_like(prompt()), STEPS, given)
    expected = expected_of(graph, ids)[:, :-1]
    assert np.abs(found - expected).max() <= ERROR * np.abs(expected).max()
    start = prompt().shape[1] - 1
    assert expected[:, start:].argmax(-1).tolist() == ids[:, start + 1 :].tolist()


def test_the_base_is_in_codes_and_every_adapter_is_whole_beside_them(
    report: export.OnnxReport, record: dict[str, Any]
) -> None:
    nodes = Counter(node.op_type for node in ir.load(report.folder / export.MODEL).graph)
    assert nodes["MatMulNBits"] == len(report.linears)
    rows = {linear.path: linear for linear in report.linears}
    assert (rows.pop("lm_head").how, {(row.how, row.bits, row.retention) for row in rows.values()}) == (
        "quantise",
        {("side", 4, 1.0)},
    )
    assert report.change is not None
    assert 0.05 < report.change < 0.6
    assert record["base"]["codes"] == []
    (entry,) = record["adapters"]
    for verified in (record["verified"], entry["verified"]):
        assert verified["token_agreement"] == 1.0
        assert verified["max_error"] <= verified["bound"]
        assert 0 < verified["unrounded"] <= ERROR * verified["largest"]
    assert verify.verify(report.folder).token_agreement == 1.0


def test_adapters_are_swapped_in_one_session(report: export.OnnxReport, record: dict[str, Any], tmp_path: Path) -> None:
    """By ONNX Runtime's own adapters; DoRA's norms are those of the base that it was trained over."""
    session, base = open_unrounded(report.folder / export.MODEL), base_of("llama")[1]
    for name, options in (("dora", {"rank": 2}), ("ia3", {})):
        graph, file = adapted(name, options, std=0.1), tmp_path / f"{name}.onnx_adapter"
        adapter_file.write(adapters.arrays(adapter_slots.compiled(graph, record)), record, file)
        agreed(Activated(session, file), in_codes(graph, record))
        agreed(session, in_codes(base, record))
    prompted = adapted("prompt", {"tokens": 4, "init": "normal"}, std=0.1)
    tensors = adapters.arrays(adapter_slots.compiled(prompted, record))
    agreed(session, in_codes(prompted, record), adapter_file.as_loaded(tensors, record))


def test_an_adapter_is_compiled_for_it_later(report: export.OnnxReport, tmp_path: Path) -> None:
    nudged(api.apply(folder_of("llama"), "lora", rank=2), 0.05).save(tmp_path / "work")
    made = adapter.compile_file([tmp_path / "work"], report.folder, tmp_path / "x.onnx_adapter")
    (replay,) = made.replays
    assert replay.unrounded is not None
    assert replay.unrounded <= ERROR * replay.largest < replay.max_error
    assert adapter_file.load(made.file, report.folder).inputs.keys()


def test_a_small_adapter_that_is_wrong_is_seen(report: export.OnnxReport, record: dict[str, Any]) -> None:
    """The rounding of activations alone may change more than this one does, whose sign is turned."""
    graph, file = adapted(*SMALL, std=0.002), report.folder / export.MODEL
    tensors = adapters.arrays(adapter_slots.compiled(graph, record))
    wrong = {name: -value if name.endswith("lora_B") else value for name, value in tensors.items()}
    probes, expected = make_probes(graph, length=8), in_codes(graph, record)

    def replayed(values: dict[str, Any]) -> check.Replay:
        given = adapter_file.as_loaded(values, record)
        return check.replay(expected, file, probes, torch.float32, 2, given, precision.ACTIVATIONS)

    replayed(tensors).require("x.onnx_adapter")
    found = replayed(wrong)
    assert found.max_error < found.bound
    with pytest.raises(CheckFailed, match="where no activation is rounded") as failed:
        found.require("x.onnx_adapter")
    assert len(str(failed.value).splitlines()) == 3


def test_one_file_fits_the_exports_of_every_precision(record: dict[str, Any]) -> None:
    plain = ready.ready(
        base_of("llama")[1], find("ort"), export.PRECISIONS["fp32"], "fp32", True, "standard", "slots", "all-linear"
    )
    assert plain.record["slots"]["model_version"] == record["slots"]["model_version"]


def test_what_stays_refused(report: export.OnnxReport, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": "int4", "adapters": "slots"}
    with pytest.raises(UnsupportedError, match="stacked adapters are for models that generate") as failed:
        export.export_onnx(base_of("bert")[1], tmp_path / "onnx", **{**options, "adapters": "stacked"})
    assert "--adapters slots" in str(failed.value)
    moved = api.apply(folder_of("llama"), "intq", group=16).graph
    moved = run.apply(moved, make("lora", rank=2, init="loftq_iter_2"))
    with pytest.raises(UnsupportedError, match="changed the codes of the base") as failed:
        export.export_onnx(moved, tmp_path / "onnx", **options)
    assert len(str(failed.value).splitlines()) == 3
    nudged(api.apply(folder_of("mistral"), "lora", rank=2), 0.05).save(tmp_path / "other")
    with pytest.raises(UsageError, match="another base"):
        adapter.compile_file([tmp_path / "other"], report.folder, tmp_path / "x.onnx_adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2", "phi3", "opt"])
@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_families(family: str, bits: str, tmp_path: Path) -> None:
    given = {"dora": adapted("dora", {"rank": 2, "targets": "all-linear"}, 0.05, family)}
    out = tmp_path / "onnx"
    made = export.export_onnx(base_of(family)[1], out, precision=bits, adapters="slots", given=given)
    (entry,) = json.loads((out / "surgeon.json").read_text())["adapters"]
    assert entry["verified"]["unrounded"] <= 1e-4 * entry["verified"]["largest"]
    assert {row.how for row in made.linears} <= {"side", "quantise"}


@pytest.mark.slow
def test_an_nf4_base_goes_to_eight_bits_with_the_adapters_that_it_was_trained_with(tmp_path: Path) -> None:
    nudged(api.apply(folder_of("llama"), "qlora", rank=2), 0.05).save(tmp_path / "work")
    made = api.export(tmp_path / "work", tmp_path / "onnx", precision="int4", adapters="slots")
    assert {row.bits for row in made.linears} == {8}
    (entry,) = json.loads((tmp_path / "onnx" / "surgeon.json").read_text())["adapters"]
    assert entry["verified"]["unrounded"] <= ERROR * entry["verified"]["largest"]
