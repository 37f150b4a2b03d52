"""Checkpoints saved quantised: bitsandbytes, both versions of GPTQ, surgeon's own form; trained and merged over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.zoo.folders import save_wide
from benchmarks.zoo.graphs import randomised
from surgeon import api, run
from surgeon.errors import SurgeonError, UnsupportedError
from surgeon.fold import value_of
from surgeon.lower.into import merge_into
from surgeon.lower.quantised import write_quantised
from surgeon.model import load_model
from surgeon.numerics_int import Groups, dequantise_groups, quantise_groups
from surgeon.packing import pack, unpack
from surgeon.passes import make

NAME = "model.layers.1.mlp.down_proj.weight"
IDS = torch.arange(3, 21).reshape(2, 9)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("coded") / "base")


def with_config(folder: Path, **quantisation: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gptq(base: Path, out: Path, bits: int, form: str, order: torch.Tensor | None = None) -> dict[str, Groups]:
    """A checkpoint in GPTQ's layout, written word by word as its packing is published."""
    tensors, made = load_file(base / "model.safetensors"), {}
    out.mkdir()
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        stem, weight = name.removesuffix(".weight"), tensors.pop(name)
        stored = made[name] = quantise_groups(weight, bits, 32, dtype=torch.float16)
        codes = unpack(stored.codes, bits)
        zeros = (stored.zero.int() - (1 if form == "gptq" else 0)) % 2**bits
        words = pack(codes, bits).view(torch.int32)
        tensors[f"{stem}.qweight"] = words.t().contiguous()
        tensors[f"{stem}.qzeros"] = pack(zeros.to(torch.uint8).t().contiguous(), bits).view(torch.int32)
        tensors[f"{stem}.scales"] = stored.scale.t().contiguous()
        tensors[f"{stem}.g_idx"] = (order if order is not None else torch.arange(weight.shape[1]) // 32).int()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text((base / "config.json").read_text())
    with_config(out, quant_method="gptq", bits=bits, group_size=32, desc_act=False, sym=False, checkpoint_format=form)
    return made


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return api.load(folder)(input_ids=IDS).logits


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_checkpoints_of_transformers(base: Path, double: bool, tmp_path: Path) -> None:
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**options))
    quantised.save_pretrained(tmp_path / "saved")
    graph = api.read(tmp_path / "saved")
    assert [step.name for step in graph.applied] == ["nf4"]
    ours = run.apply(api.read(base), make("nf4", double=double))
    assert torch.equal(value_of(graph, NAME), value_of(ours, NAME))
    with torch.no_grad():
        assert torch.equal(load_model(graph)(input_ids=IDS).logits, load_model(ours)(input_ids=IDS).logits)


@pytest.mark.parametrize(("bits", "form"), [(4, "gptq"), (2, "gptq_v2"), (8, "gptq")])
def test_gptq_checkpoints_of_both_versions(base: Path, bits: int, form: str, tmp_path: Path) -> None:
    made = gptq(base, tmp_path / "saved", bits, form)
    graph = api.read(tmp_path / "saved")
    for name, stored in made.items():
        assert torch.equal(value_of(graph, name), dequantise_groups(stored))


def test_act_order_is_refused(base: Path, tmp_path: Path) -> None:
    gptq(base, tmp_path / "saved", 4, "gptq", torch.arange(64).flip(0) // 32)
    with pytest.raises(SurgeonError, match="act-order"):
        api.read(tmp_path / "saved")


def test_surgeons_own_form_comes_back(base: Path, tmp_path: Path) -> None:
    graph = run.apply(api.read(base), make("intq", bits=3))
    write_quantised(graph, api.base_of(graph), tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "saved"), load_model(graph)(input_ids=IDS).logits)


def test_an_adapter_over_a_quantised_checkpoint(base: Path, tmp_path: Path) -> None:
    """Saved beside it, opened again, merged into plain weights and into zero points."""
    gptq(base, tmp_path / "saved", 4, "gptq_v2")
    graph = randomised(run.apply(api.read(tmp_path / "saved"), make("qalora", rank=3)), std=0.02)
    work = load_model(graph).save(tmp_path / "work")
    expected = logits(work)
    source = api.base_of(graph)
    for way in ("dequant", "zero-points"):
        merge_into(api.read(work), source, tmp_path / way, into=way)
        assert (logits(tmp_path / way) - expected).abs().max() < 1e-4 * expected.abs().max()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dequant")
    with torch.no_grad():
        assert (plain(IDS).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(SurgeonError, match="its original weights are not in it"):
        merge_into(api.read(work), source, tmp_path / "original", into="original")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"quant_method": "aqlm"}, r"quantised \(aqlm\)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "none is"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is marlin"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}}, "widths of their own"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "float-quantized"),
    ],
)
def test_what_is_not_read_is_refused(base: Path, config: dict[str, Any], what: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((base / name).read_bytes())
    with pytest.raises((SurgeonError, UnsupportedError), match=what):
        api.read(with_config(folder, **config))
