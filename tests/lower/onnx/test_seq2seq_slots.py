"""Encoder-decoders whose adapters are inputs: a file for either model, swapped while they run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import peft
import pytest
import torch

from benchmarks.zoo.folders import base_of, folder_of, reference
from benchmarks.zoo.graphs import randomised
from surgeon import api, halves
from surgeon.cli.main import main
from surgeon.errors import CheckFailed, UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.lower.onnx import adapter, adapter_file, adapter_slots, adapters, export
from surgeon.lower.onnx.pair import DECODER, ENCODER, Pair, open_record
from surgeon.lower.onnx.verify import verify
from surgeon.passes import make
from surgeon.run import apply
from surgeon.stream import StreamingExecutor
from tests.lower.onnx.test_seq2seq import ERROR, texts
from tests.lower.onnx.test_verify import alone

ROLES = "encoder,decoder,cross"
TARGETS = "k_proj,fc2"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 3}),
    "rslora": ("lora", {"rank": 4, "rslora": True}),
    "dora": ("dora", {"rank": 2}),
    "dylora": ("dylora", {"rank": 4}),
    "adalora": ("adalora", {}),
    "vera": ("vera", {"rank": 5}),
    "ia3": ("ia3", {}),
    "loha": ("loha", {"rank": 2}),
    "prefix": ("prefix", {"tokens": 3, "sites": ROLES, "biased": True}),
    "prefix-mlp": ("prefix", {"tokens": 2, "hidden": 6, "sites": "decoder", "biased": True}),
    "ptuning_v2": ("ptuning_v2", {"tokens": 2, "biased": True}),
}
COLUMNS = ("prefix", "prefix-mlp", "ptuning_v2")
FEW = ("ia3", "prefix-mlp")
EACH = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in METHODS]
STEPS = 6
pytestmark = pytest.mark.usefixtures("lowered_once")


def adapted(method: str, family: str = "bart", targets: str = TARGETS) -> Graph:
    """The base with a method whose values were drawn."""
    name, options = METHODS[method]
    where = {} if method in COLUMNS else {"targets": targets}
    return randomised(apply(base_of(family)[1], make(name, **options, **where)), std=0.1)


def slotted(family: str, out: Path, **options: Any) -> Path:
    return export.export_onnx(base_of(family)[1], out, **{"adapters": "slots", **options}).folder


@pytest.fixture(scope="module")
def exported(lowered_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BART with optional slots, and two adapters that were proven with it."""
    given = {"mine": adapted("lora"), "before": adapted("prefix")}
    return slotted("bart", tmp_path_factory.mktemp("slots") / "onnx", given=given, targets=TARGETS)


@pytest.fixture(scope="module")
def record(exported: Path) -> dict[str, Any]:
    return adapter_file.read_export(exported)


@pytest.fixture(scope="module")
def pair(exported: Path, record: dict[str, Any]) -> Pair:
    return open_record(exported, record)


class Activated:
    """A session that runs with an adapter active, as applications do it."""

    def __init__(self, session: Any, file: Path) -> None:
        self.session, self.options, self.adapter = session, onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
        self.adapter.Load(str(file))
        self.options.add_active_adapter(self.adapter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, outputs: Any, feed: Any) -> Any:
        return self.session.run(outputs, feed, self.options)


def written(folder: Path) -> Any:
    """PEFT's own model with a DoRA that is moved at random, saved in a folder."""
    torch.manual_seed(0)
    names = ["fc2", "encoder_attn.k_proj"]
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, use_dora=True, target_modules=names)
    theirs: Any = peft.get_peft_model(reference(folder_of("bart")), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs.save_pretrained(folder)
    return theirs


def active(pair: Pair, file: Path, record: dict[str, Any]) -> Pair:
    """Both sessions with the adapter's own file of each."""
    encoder, decoder = adapter_file.files(file, record)
    return Pair(Activated(pair.encoder, encoder), Activated(pair.decoder, decoder), pair.pad)


def error_of(pair: Pair, graph: Graph, expect: Any = None) -> float:
    """The largest difference of a padded batch from torch, whose greedy tokens are the same, or it raises."""
    rows, given = texts(graph.config.vocab_size, pair.pad)
    ids, found = pair.decode(rows, [2], STEPS)
    target = torch.from_numpy(ids[:, :-1])
    if expect is None:
        given |= {halves.IDS: target, halves.MASK: torch.ones_like(target)}
        expected = StreamingExecutor(graph)(*(given[name] for name in graph.inputs))[0].numpy()
    else:
        with torch.no_grad():
            expected = expect(**given, decoder_input_ids=target).logits.numpy()
    assert expected.argmax(-1).tolist() == ids[:, 1:].tolist()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_base_and_adapters_are_proven_and_replayed_with_onnxruntime_alone(exported: Path) -> None:
    told = json.loads((exported / "surgeon.json").read_text())
    assert [told["slots"][word] for word in ("form", "prefix", "optional")] == ["slots", "slots", True]
    assert [entry["file"] for entry in told["adapters"]] == [
        "adapters/mine.onnx_adapter",
        "adapters/before.onnx_adapter",
    ]
    every = [told["verified"], *(entry["verified"] for entry in told["adapters"])]
    for verified in every:
        assert verified["token_agreement"] == 1.0
        assert 0 < verified["max_error"] <= verified["bound"]
        assert [len(batch["prompts"]) for batch in verified["batches"]] == [1, 3]
        assert all(len(row) == 20 for batch in verified["batches"] for row in batch["tokens"])
    assert len({str(verified["batches"][0]["best_logits"]) for verified in every}) == 3
    done = alone("verify", str(exported), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["token_agreement"], found["probes"]) == (True, 1.0, 12)


def test_later_an_adapter_that_computes_something_else_is_seen(exported: Path, tmp_path: Path) -> None:
    """The decoder's half of another adapter, its version and sizes right."""
    shutil.copytree(exported, tmp_path / "onnx")
    told = json.loads((tmp_path / "onnx" / "surgeon.json").read_text())
    record = adapter_file.read_export(exported)
    tensors = adapters.arrays(adapter_slots.compiled(adapted("lora"), record))
    name = "model.decoder.layers.1.encoder_attn.k_proj.lora_B"
    adapter_file.write({**tensors, name: 2 * tensors[name]}, record, tmp_path / "onnx/adapters/mine.onnx_adapter")
    told["files"] = {name: entry for name, entry in told["files"].items() if "mine" not in name}
    (tmp_path / "onnx" / "surgeon.json").write_text(json.dumps(told))
    with pytest.raises(CheckFailed, match="computes something else than when it was made"):
        verify(tmp_path / "onnx").require("here")


def test_each_model_has_the_slots_of_its_own_linears(exported: Path, record: dict[str, Any]) -> None:
    models = {name: ir.load(exported / f"{name}.onnx").graph for name in (ENCODER, DECODER)}
    inputs = {
        name: {str(v.name): [str(size) for size in v.shape or ()] for v in g.inputs} for name, g in models.items()
    }
    cross = "model.decoder.layers.1.encoder_attn.k_proj"
    assert inputs[DECODER][f"{cross}.lora_A"] == ["32", f"{cross}.rank"]
    assert inputs[DECODER]["prefix.1.cross.key"] == ["1", "4", "cross_prefix_length", "8"]
    assert inputs[DECODER]["prefix.1.decoder.value"] == ["1", "4", "prefix_length", "8"]
    assert inputs[ENCODER]["prefix.0.encoder.key"] == ["1", "4", "encoder_prefix_length", "8"]
    for part, names in record["slots"]["parts"].items():
        assert (
            set(names)
            == {name for name in inputs[part] if adapter_file.is_slot(name)}
            <= set(models[part].initializers)
        )
        word = part.partition("_")[0]
        assert all(name.startswith((f"model.{word}.layers.", "prefix.")) for name in names)
    counts = [len(names) for names in record["slots"]["parts"].values()]
    assert counts == [2 * (2 * 5 + 2), 2 * (3 * 5 + 4)]
    assert sum(counts) == len(record["slots"]["inputs"])


@pytest.mark.parametrize("method", EACH)
def test_every_method_is_swapped_in_the_same_sessions(
    method: str, pair: Pair, record: dict[str, Any], tmp_path: Path
) -> None:
    graph, file = adapted(method), tmp_path / "x.onnx_adapter"
    adapter_file.write(adapters.arrays(adapter_slots.compiled(graph, record)), record, file)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"x.{DECODER}.onnx_adapter", f"x.{ENCODER}.onnx_adapter"
    ]  # fmt: skip
    assert error_of(active(pair, file, record), graph) < ERROR
    assert error_of(pair, base_of("bart")[1]) < ERROR


@pytest.mark.usefixtures("captured_once")
def test_a_folder_of_peft_and_a_work_folder_are_compiled(
    exported: Path, tmp_path: Path, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = written(tmp_path / "dora")
    api.apply(folder_of("bart"), "prefix", tokens=2, sites="decoder,cross").save(tmp_path / "work")
    record = adapter_file.read_export(exported)
    for name, slots in (("dora", 6 * 4), ("work", 2 * 4)):
        out = tmp_path / f"{name}.onnx_adapter"
        assert main(["adapter", str(tmp_path / name), "--for", str(exported), "-o", str(out), "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert (made["slots"], made["steps"], made["token_agreement"]) == (slots, 20, 1.0)
        assert 0 < made["max_error"] <= made["bound"]
        assert [Path(file) for file in made["files"]] == [*adapter_file.files(out, record)]
        assert made["bytes"] == sum(Path(file).stat().st_size for file in made["files"])
    assert error_of(active(pair, tmp_path / "dora.onnx_adapter", record), base_of("bart")[1], theirs) < ERROR


def test_it_is_fed_by_hand_too(exported: Path, pair: Pair, record: dict[str, Any], tmp_path: Path) -> None:
    """A form with every slot, and each session those that it has; either file's name will do."""
    graph = adapted("prefix")
    adapter_file.write(adapters.arrays(adapter_slots.compiled(graph, record)), record, tmp_path / "x.safetensors")
    loaded = adapter_file.load(tmp_path / f"x.{DECODER}.safetensors", exported)
    assert set(loaded.inputs) == set(record["slots"]["inputs"])
    fed = loaded.feed(session=pair.encoder)
    assert set(fed) == set(record["slots"]["parts"][ENCODER])
    assert error_of(replace(pair, given=loaded), graph) < ERROR
    empty = adapter_file.as_loaded({}, record)
    assert error_of(replace(pair, given=empty), base_of("bart")[1]) < ERROR


def test_half_an_adapter_is_an_error(exported: Path, pair: Pair, record: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "x.onnx_adapter"
    adapter_file.write(adapters.arrays(adapter_slots.compiled(adapted("ia3"), record)), record, file)
    encoder, decoder = adapter_file.files(file, record)
    wrong = Pair(pair.encoder, Activated(pair.decoder, encoder), pair.pad)
    with pytest.raises(Exception, match="Invalid input name"):
        wrong.step(np.array([[2]]), wrong.encode([[5, 6]]))
    shutil.copyfile(encoder, decoder)
    assert set(adapter_file.load(file, exported).inputs) < set(record["slots"]["parts"][ENCODER])
    decoder.unlink()
    with pytest.raises(UsageError, match="no such adapter") as refused:
        adapter_file.load(file, exported)
    assert refused.value.where == str(decoder)


def test_prompts_have_no_slot(record: dict[str, Any]) -> None:
    """An encoder's see the text; a decoder's see the encoder's states."""
    for side in ("encoder", "decoder"):
        prompt = apply(base_of("bart")[1], make("prompt", tokens=2, init="normal", side=side))
        with pytest.raises(UnsupportedError, match="prompt has no constant keys and values in bart") as refused:
            adapter_slots.compiled(prompt, record, "prompts/")
        assert (refused.value.where, "a prefix" in refused.value.hint) == ("prompts/", True)
    head = apply(base_of("bart")[1], make("lora", targets="lm_head,v_proj"))
    with pytest.raises(UnsupportedError, match=r"v_proj \(linear\), model.*v_proj \(linear\) and 3 more"):
        adapter_slots.compiled(head, record)
    some = apply(base_of("bart")[1], make("prefix", tokens=2, targets="0.self_attn", sites="decoder"))
    with pytest.raises(UnsupportedError, match="no keys and values at some attentions") as refused:
        adapter_slots.compiled(some, record)
    assert refused.value.where == "model.decoder.layers.1.self_attn"


REFUSED: dict[str, tuple[str, Any, str]] = {
    "name": ("model.decoder.layers.9.fc1.out_scale", np.ones(48, np.float32), "no slot"),
    "shape": ("model.decoder.layers.0.fc2.out_scale", np.ones(47, np.float32), r"\[47\]"),
    "heads": ("prefix.0.cross.key", np.ones((1, 3, 2, 8), np.float32), r"\[1, 3, 2, 8\]"),
    "dtype": ("model.encoder.layers.0.fc2.out_scale", np.ones(32, np.float16), "float16"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_not_written(why: str, record: dict[str, Any], tmp_path: Path) -> None:
    name, value, said = REFUSED[why]
    with pytest.raises(UsageError, match=said):
        adapter_file.write({name: value}, record, tmp_path / "x.onnx_adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("why", ["base", "prompt"])
def test_what_is_refused_is_said_in_three_lines(
    why: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"base": "another checkpoint", "prompt": "virtual tokens see the text"}[why]
    graph = apply(base_of("bart")[1], make("prompt", tokens=2, init="normal"))
    given = graph if why == "prompt" else replace(adapted("lora"), source=str(folder_of("llama")))
    monkeypatch.setattr(adapter, "read", lambda *of: given)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["adapter", "mine/", "--for", str(exported)]) != 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert (len(lines), said in lines[0], "mine" in lines[1]) == (3, True, True)
    assert list(tmp_path.iterdir()) == []
