"""IA³: its formula, PEFT's files both ways, and PEFT's own merge bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.zoo.folders import base_of, captured, folder_of, reference
from benchmarks.zoo.graphs import inputs_of, randomised
from surgeon import api, convert, fold, planning, run
from surgeon.errors import UnsupportedError, UsageError
from surgeon.passes import make
from surgeon.peft_files import write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    "qwen3": {"target_modules": ".*(k|v|up)_proj", "feedforward_modules": r".*\.up_proj"},
}


@pytest.fixture(autouse=True)
def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture is not what is tested here."""
    monkeypatch.setattr("surgeon.peft_load.open_graph", lambda source, **_: captured(source))


def saved(family: str, folder: Path) -> Any:
    """PEFT's model with trained vectors, and its files."""
    torch.manual_seed(0)
    model = peft.get_peft_model(reference(folder_of(family)), peft.IA3Config(task_type="CAUSAL_LM", **CONFIGS[family]))
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_pefts_files_are_read_merged_and_written_back(family: str, tmp_path: Path) -> None:
    """GPT-2's fused projection has a bias, which is scaled; its feed-forward's input is."""
    theirs = saved(family, tmp_path / "theirs")
    loaded = api.load(tmp_path / "theirs", base=folder_of(family))
    ids = inputs_of(loaded.graph)[0]
    assert torch.equal(loaded(input_ids=ids).logits, theirs(input_ids=ids).logits)
    write_adapter(loaded.graph, "ia3", loaded.graph.applied[0], tmp_path / "ours")  # type: ignore[arg-type]
    for part in ("theirs", "ours"):
        again = peft.PeftModel.from_pretrained(reference(folder_of(family)), tmp_path / part)
        assert torch.equal(again(input_ids=ids).logits, theirs(input_ids=ids).logits)
    files = [load_file(tmp_path / part / "adapter_model.safetensors") for part in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert "bias" not in json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    merged, expected = fold.fold(loaded.graph), theirs.merge_and_unload().state_dict()
    assert all(torch.equal(merged.values[name], expected[name]) for name in merged.tensors if name in expected)


def test_a_row_is_not_taken_for_a_column(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"feedforward_modules": ["k_proj"]}))
    with pytest.raises(UsageError, match="the vector is") as caught:
        api.load(tmp_path, base=folder_of("llama"))
    assert "feedforward_modules" in caught.value.where


def test_one_number_per_output_or_input() -> None:
    base = base_of("llama")[1]
    planned = planning.plan(base, make("ia3"))
    assert planned.trainable_parameters == 4 * (2 * 16 + 48)  # K and V of 16, a feed-forward of 48
    assert planned.site_count == 3 * 4


def test_biases_that_train_have_no_place_in_peft(tmp_path: Path) -> None:
    graph = run.apply(base_of("gpt2")[1], make("ia3", targets="*.c_attn", bias="sites"))
    with pytest.raises(UnsupportedError, match="trains no biases"):
        write_adapter(graph, "ia3", graph.applied[0], tmp_path)  # type: ignore[arg-type]


def test_as_lora_it_is_an_approximation_or_refused() -> None:
    graph = randomised(run.apply(base_of("llama")[1], make("ia3", targets="*.k_proj *.down_proj")))
    with pytest.raises(UnsupportedError, match="a whole matrix"):
        convert.to_lora(graph)
    found = convert.to_lora(graph, rank=16)
    assert {site.rank for site in found.sites} == {16}
    assert all(0 <= site.error < 1 for site in found.sites)
