"""Quantised checkpoints: what transformers and bitsandbytes load, sizes, and what is refused with nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bitsandbytes
from transformers import AutoModelForCausalLM

from benchmarks.zoo.folders import folder_of, save_wide
from surgeon import api, run
from surgeon.errors import SurgeonError, UsageError
from surgeon.fold import value_of
from surgeon.lower.quantised import write_quantised
from surgeon.model import load_model
from surgeon.numerics_int import Groups, dequantise_groups
from surgeon.passes import make
from surgeon.safetensors_file import read_shard


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of widths that bitsandbytes' CPU kernel reads rightly, multiples of 64, in two files."""
    return save_wide(tmp_path_factory.mktemp("quantised") / "base", "200KB")


@pytest.mark.parametrize("options", [{}, {"double": False}, {"kind": "fp4"}])
def test_transformers_loads_what_is_written(base: Path, options: dict[str, object], tmp_path: Path) -> None:
    graph = run.apply(api.read(base), make("nf4", **options))
    written = write_quantised(graph, api.base_of(graph), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(written.folder)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(model.lm_head).__name__ == "Linear"
    for path, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            theirs = bitsandbytes.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(theirs, value_of(graph, f"{path}.weight"))
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():  # its CPU kernel computes in bf16
        found, expected = model(ids).logits, load_model(graph)(input_ids=ids).logits
    assert (found - expected).abs().max() < 2e-2 * expected.abs().max()
    stored = sum(info.nbytes for file in written.folder.glob("*.safetensors") for info in read_shard(file).tensors)
    assert stored == written.nbytes


def test_integers_are_written_in_surgeons_own_form(base: Path, tmp_path: Path) -> None:
    graph = run.apply(api.read(base), make("intq", bits=3))
    written = write_quantised(graph, api.base_of(graph), tmp_path / "out")
    config = json.loads((written.folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], len(config["modules"])) == ("surgeon", 3, 14)
    from safetensors.torch import load_file

    tensors = {name: t for file in written.folder.glob("*.safetensors") for name, t in load_file(file).items()}
    name = "model.layers.1.mlp.down_proj.weight"
    parts = [tensors[f"{name}.{part}"] for part in ("codes", "scale", "zero")]
    held = graph.tensors[name].held
    assert held is not None
    expected = held.decode({part: graph.inserted[full]() for part, full in held.parts.items()})
    assert torch.equal(dequantise_groups(Groups(*parts, 3)), expected)


def test_what_cannot_be_written_leaves_nothing(base: Path, tmp_path: Path) -> None:
    plain = api.read(base)
    with pytest.raises(UsageError, match="nothing is quantised"):
        write_quantised(plain, api.base_of(plain), tmp_path / "out")
    both = run.apply(plain, make("nf4"), make("lora", rank=3))
    with pytest.raises(UsageError, match="lora is applied too"):
        write_quantised(both, api.base_of(both), tmp_path / "out")
    values = type(plain.values)(plain.values.weights, dict(plain.values))
    values["model.layers.0.mlp.up_proj.weight"] = torch.full((128, 64), float("nan"))
    plain.values = values
    with pytest.raises(SurgeonError, match="not finite") as caught:
        write_quantised(run.apply(plain, make("nf4")), api.base_of(plain), tmp_path / "out")
    assert caught.value.where == "model.layers.0.mlp.up_proj.weight"
    assert not list(tmp_path.iterdir())


def test_tied_embeddings_stay_as_they_are(tmp_path: Path) -> None:
    graph = run.apply(api.read(folder_of("gpt2")), make("nf4"))
    written = write_quantised(graph, api.base_of(graph), tmp_path / "out")
    assert all("c_" in name for name in written.quantised)
