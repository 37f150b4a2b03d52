"""Calibration: one linear after another on what the earlier ones leave it, on any captured model; kept in folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.zoo.folders import folder_of
from benchmarks.zoo.graphs import graph_of, outputs_of
from surgeon import api, calibration, eva, run, store
from surgeon.errors import UsageError
from surgeon.fold import value_of
from surgeon.gptq import Hessian
from surgeon.graph import Graph
from surgeon.passes import make
from surgeon.passes.intq import IntQ
from surgeon.run import chosen_sites
from surgeon.verification import Probe, outputs


def batches(*_: Any, count: int = 6) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        mask = torch.ones(4, 9, dtype=torch.long)
        mask[1, 6:] = 0
        ids = torch.randint(3, 90, (4, 9), generator=generator)
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids}


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(calibration, "batches", batches)
    return "data.jsonl"


@pytest.fixture(scope="module")
def llama(shared: Path) -> Graph:
    return api.read(shared / "models" / "pystdlib-llama")


@pytest.mark.parametrize("bits", [3, 2])
def test_the_shared_llama_is_nearer_than_with_the_nearest_codes(llama: Graph, shared: Path, bits: int) -> None:
    train, heldout = (shared / "data" / f"pystdlib_long.{part}.jsonl" for part in ("train", "heldout"))
    rows = [batch["input_ids"][0].tolist() for batch in islice(eva.batches(llama, heldout, 1, 128), 3)]
    probes = [Probe("", tuple(ids)) for ids in rows]
    expected = outputs(llama, probes)

    def error(**options: Any) -> float:
        step = make("intq", bits=bits, targets="*.mlp.*", **options)
        found = outputs(run.apply(llama, step), probes)
        return sum(float((f[0] - e[0]).norm()) for f, e in zip(found, expected, strict=True))

    assert error(calibration=str(train), samples=16, length=256) < 0.9 * error()


def seen_by(graph: Graph, path: str) -> torch.Tensor:
    """The Hessian's factor of what a linear reads in a graph."""
    site = next(site for site in chosen_sites(graph, make("intq", group=8))[0] if site.path == path)
    rows, read = [], run.apply(graph, eva.ReadInputs((path,)))
    from surgeon.module import load

    model = load(read, dtype=torch.float32)
    for batch in batches():
        with torch.no_grad():
            results = dict(zip(read.outputs, model(*eva.inputs_of(read, batch)), strict=True))
        rows.append(eva.rows_of(results[f"{path}.x"], batch["attention_mask"]))
    found = Hessian(site.inp)
    found.add(torch.cat(rows))
    return found.factor()


def test_a_linear_sees_what_the_quantised_ones_before_it_make(data: str) -> None:
    base = graph_of("llama")
    step = IntQ(bits=2, group=8, calibration=data)
    whole = run.apply(base, step)
    path = "model.layers.1.mlp.down_proj"
    others = [site for site in chosen_sites(base, step)[0] if site.path != path]
    before = others[: [site.path for site in others].index("model.layers.1.mlp.up_proj") + 1]
    part = run.apply(base, dataclasses.replace(step, targets=",".join(site.path for site in before)))
    assert all(torch.equal(value_of(part, s.weight), value_of(whole, s.weight)) for s in before)
    expected = step.calibrated(base.values[f"{path}.weight"], seen_by(part, path))
    held = whole.tensors[f"{path}.weight"].held
    assert held is not None
    found = whole.inserted[held.parts["codes"]]()
    assert (found != expected["codes"]).float().mean() < 0.02
    plain = step.calibrated(base.values[f"{path}.weight"], seen_by(base, path))
    assert (found != plain["codes"]).float().mean() > 0.1


@pytest.mark.parametrize(("family", "task"), [("gpt2", None), ("bert", None), ("t5", "seq2seq-lm")])
@pytest.mark.parametrize("zero", ["float", "symmetric"])
def test_any_captured_model(family: str, task: str | None, zero: str, data: str) -> None:
    base = graph_of(family, task)
    options = {"bits": 2, "group": 8, "zero": zero}
    plain, ours = (run.apply(base, make("intq", **options, **more)) for more in ({}, {"calibration": data}))
    expected = outputs_of(base)
    assert (outputs_of(ours) - expected).norm() < 1.2 * (outputs_of(plain) - expected).norm()
    assert not torch.equal(outputs_of(ours), outputs_of(plain))
    assert [step.calibration for step in ours.applied if isinstance(step, IntQ)] == ["stored"]


def test_a_work_folder_keeps_the_codes(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = run.apply(
        api.read(folder_of("llama")), make("intq", bits=3, group=8, calibration=data), make("qalora", rank=3)
    )
    store.save(graph, tmp_path / "work")
    monkeypatch.setattr(calibration, "batches", None)  # the file is not read again
    again = api.read(tmp_path / "work")
    assert torch.equal(outputs_of(again), outputs_of(graph))
    assert [step.spec() for step in again.applied] == [step.spec() for step in graph.applied]


def test_files_go_with_the_codes() -> None:
    spill = calibration.Spill()
    read = spill.put({"codes": torch.arange(6).view(2, 3).t()})["codes"]
    folder = spill.folder
    assert torch.equal(read(), torch.arange(6).view(2, 3).t())
    del spill
    assert folder.exists()  # as long as something may still be read
    del read
    assert not folder.exists()


def test_what_cannot_be_calibrated_is_refused(llama: Graph, data: str) -> None:
    base = graph_of("llama")
    with pytest.raises(UsageError, match="0 samples"):
        make("intq", samples=0)
    values = dict(base.values)
    name = "model.layers.1.mlp.up_proj.weight"
    values[name] = torch.full_like(values[name], float("nan"))
    with pytest.raises(UsageError, match="not finite") as caught:
        run.apply(dataclasses.replace(base, values=values), make("intq", group=8, calibration=data))
    assert caught.value.where == name


def test_a_file_that_is_not_there_is_named(llama: Graph, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such data file") as caught:
        run.apply(llama, make("intq", calibration=str(tmp_path / "none.jsonl")))
    assert "none.jsonl" in caught.value.where
    with pytest.raises(UsageError, match="no tokenizer"):
        run.apply(graph_of("llama"), make("intq", group=8, calibration="data.jsonl"))
