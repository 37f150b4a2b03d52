"""Merging over quantised bases: every way's error, told before anything is written; refusals; what each way writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.zoo.folders import folder_of
from benchmarks.zoo.graphs import randomised
from surgeon import api, calibration, run
from surgeon.cli.main import main
from surgeon.errors import CheckFailed, UsageError
from surgeon.forms.own import OwnWriter
from surgeon.graph import Graph
from surgeon.lower.into import merge_into
from surgeon.lower.ways import WAYS, WayError, errors
from surgeon.model import load_model
from surgeon.passes import make
from surgeon.verification import make_probes

pytestmark = pytest.mark.usefixtures("captured_once")


def adapted(*steps: tuple[str, dict[str, object]], std: float = 0.02) -> Graph:
    graph = run.apply(api.read(folder_of("llama")), *(make(name, **options) for name, options in steps))
    return randomised(graph, std=std)


@pytest.fixture(scope="module")
def qlora() -> Graph:
    return adapted(("nf4", {}), ("lora", {"rank": 3, "targets": "all-linear"}))


@pytest.fixture(scope="module")
def qalora() -> Graph:
    return adapted(("intq", {"group": 8}), ("qalora", {"rank": 3}))


def by_way(found: tuple[WayError, ...]) -> dict[str, WayError]:
    return {item.way: item for item in found}


def test_the_errors_of_every_way(qlora: Graph, qalora: Graph) -> None:
    lora, pooled = (by_way(errors(graph, make_probes(graph))) for graph in (qlora, qalora))
    assert tuple(lora) == tuple(pooled) == WAYS
    assert lora["dequant"].error < 1e-5
    assert "no zero points" in lora["zero-points"].why
    assert 0.01 < lora["original"].error < 1
    assert pooled["zero-points"].error < 1e-5
    assert max(pooled["zero-points"].weights.values()) < 1e-6  # type: ignore[union-attr]
    assert lora["requant"].worst[1] > 0.03
    assert pooled["requant"].worst[1] < 1e-6  # min–max of what was moved as a whole has the same codes
    for found in (lora, pooled):
        assert found["dequant"].token_agreement == 1


def test_the_default_is_what_the_adapter_was_trained_on(qlora: Graph, tmp_path: Path) -> None:
    told: list[tuple[WayError, ...]] = []

    def tell(found: tuple[WayError, ...]) -> None:
        assert not (tmp_path / "out").exists()
        told.append(found)

    done = merge_into(qlora, api.base_of(qlora), tmp_path / "out", tell=tell)
    assert told == [done.errors]
    assert done.merged is not None
    assert done.merged.comparison is not None
    assert done.merged.comparison.ok


def test_a_way_that_is_far_off_is_refused_unless_it_is_accepted(qlora: Graph, tmp_path: Path) -> None:
    source = api.base_of(qlora)
    for way in ("original", "requant"):
        with pytest.raises(CheckFailed, match=f"--into {way} changes the outputs") as caught:
            merge_into(qlora, source, tmp_path / way, into=way)
        assert "--into dequant" in caught.value.hint
        assert not list(tmp_path.glob(f"*{way}*"))
        assert merge_into(qlora, source, tmp_path / way, into=way, accept_error=True).way == way
    config = json.loads((tmp_path / "requant" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert "quantization_config" not in json.loads((tmp_path / "original" / "config.json").read_text())


def test_a_way_that_cannot_be_done_says_what_can(qlora: Graph, tmp_path: Path) -> None:
    source = api.base_of(qlora)
    with pytest.raises(UsageError, match="cannot be done") as caught:
        merge_into(qlora, source, tmp_path / "out", into="zero-points", accept_error=True)
    assert caught.value.hint == "one of dequant, original, requant"
    with pytest.raises(UsageError, match="no way to merge into 'fp8'"):
        merge_into(qlora, source, tmp_path / "out", into="fp8")
    plain = adapted(("lora", {"rank": 3}))
    with pytest.raises(UsageError, match="the base is not quantised"):
        merge_into(plain, source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_zero_points_that_a_form_has_no_place_for_are_refused_with_the_damage(qalora: Graph, tmp_path: Path) -> None:
    source = api.base_of(qalora)
    with pytest.raises(CheckFailed, match=r"zero points do not fit the form gptq_v2.*the outputs change by") as caught:
        merge_into(qalora, source, tmp_path / "out", into="zero-points", form="gptq_v2")
    assert "--format surgeon" in caught.value.hint
    assert not list(tmp_path.iterdir())
    done = merge_into(qalora, source, tmp_path / "out", into="zero-points", form="gptq_v2", accept_error=True)
    assert done.comparison is not None
    assert done.comparison.max_error == 0  # the files hold the rounded ones
    own = merge_into(qalora, source, tmp_path / "own", into="zero-points")
    assert own.comparison is not None
    assert own.comparison.max_error == 0


def test_requantised_on_a_calibration_in_another_form(
    qalora: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(3, 90, (4, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    monkeypatch.setattr(calibration, "batches", lambda *_: iter([batch] * 6))
    source = api.base_of(qalora)
    plain, ours = (
        merge_into(qalora, source, tmp_path / name, into="requant", form="gptq_v2", accept_error=True, **more)
        for name, more in (("plain", {}), ("ours", {"calibration": "data.jsonl"}))
    )
    assert plain.quantised is not None
    assert plain.quantised.form == "gptq_v2"
    again = api.read(tmp_path / "ours")
    assert [step.name for step in again.applied] == ["intq"]
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(again.values[name], api.read(tmp_path / "plain").values[name])
    assert by_way(ours.errors)["requant"].error < 1.2 * by_way(plain.errors)["requant"].error


def test_files_that_do_not_read_as_what_was_meant_do_not_get_their_name(
    qalora: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = OwnWriter.tensors

    def wrong(self: OwnWriter, stored: str, parts: Any, out: int, inp: int) -> dict[str, torch.Tensor]:
        made = written(self, stored, parts, out, inp)
        return {name: tensor * 2 if name.endswith("scale") else tensor for name, tensor in made.items()}

    monkeypatch.setattr(OwnWriter, "tensors", wrong)
    with pytest.raises(CheckFailed, match="not the same function"):
        merge_into(qalora, api.base_of(qalora), tmp_path / "out", into="zero-points")
    assert not list(tmp_path.iterdir())


def test_the_command_shows_the_errors_first(qalora: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = load_model(qalora).save(tmp_path / "work")
    assert main(["merge", str(work), "-o", str(tmp_path / "out"), "--into", "zero-points"]) == 0
    said = capsys.readouterr().err
    assert all(way in said for way in WAYS)
    assert "→ zero-points" in said
    assert main(["merge", str(work), "-o", str(tmp_path / "other"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["into"] == "dequant"
    assert found["errors"]["zero-points"]["outputs"] < 1e-5
    assert main(["merge", str(work), "-o", str(tmp_path / "third"), "--into", "original"]) == 1
    assert "--accept-error" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()
    assert main(["merge", str(work), "-o", str(tmp_path / "x"), "--into", "requant", "--dtype", "bfloat16"]) == 2
    assert main(["merge", str(work), "-o", str(tmp_path / "x"), "--format", "gptq"]) == 2
    assert "--into requant or zero-points" in capsys.readouterr().err
    assert (
        main(["merge", str(work), "-o", str(tmp_path / "x"), "--into", "zero-points", "--calibration", "x.jsonl"]) == 2
    )
    assert not (tmp_path / "x").exists()


def test_trained_tensors_of_the_base_are_written_beside_codes(tmp_path: Path) -> None:
    graph = adapted(("intq", {"group": 8}), ("qalora", {"rank": 3, "modules_to_save": "lm_head"}))
    graph.inserted["lm_head.weight"] = lambda: torch.full((112, 32), 0.5)
    done = merge_into(graph, api.base_of(graph), tmp_path / "out", into="zero-points")
    from safetensors.torch import load_file

    assert done.quantised is not None
    assert bool((load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"] == 0.5).all())
