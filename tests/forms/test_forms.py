"""Every form of saved codes: written, read again, of the planned size; what others make of it; what has no place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GPTQConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.zoo.folders import folder_of
from surgeon import api
from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.forms import WRITERS, writer_of
from surgeon.lower.quantise import Quantised
from surgeon.numerics_int import Groups, dequantise_groups
from surgeon.packing import unpack
from surgeon.passes import make
from surgeon.planning import plan
from surgeon.safetensors_file import read_shard

pytestmark = pytest.mark.usefixtures("captured_once")
IDS = torch.arange(3, 21).reshape(2, 9)
NAME = "model.layers.1.mlp.down_proj"
CASES = [
    ("bitsandbytes", "nf4", {}),
    ("surgeon", "intq", {"bits": 3}),
    ("surgeon", "intq", {"bits": 2, "zero": "integer", "scales": "float16"}),
    ("gptq", "intq", {"zero": "symmetric"}),
    ("gptq_v2", "intq", {"bits": 2}),
    ("gptq_v2", "intq", {"bits": 3, "zero": "symmetric"}),
    ("gptq", "intq", {"bits": 8, "group": -1, "zero": "integer"}),
    ("compressed-tensors", "intq", {}),
    ("compressed-tensors", "intq", {"zero": "symmetric", "group": -1}),
    ("compressed-tensors", "intq", {"bits": 8}),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("forms") / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return api.load(folder)(input_ids=IDS).logits


def quantised(base: Path, out: Path, form: str, name: str = "intq", **options: Any) -> Quantised:
    return api.quantise(base, out, make(name, **options), form=form)


def stored(folder: Path) -> int:
    return sum(info.nbytes for file in folder.glob("*.safetensors") for info in read_shard(file).tensors)


def parts_of(folder: Path, path: str = NAME) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items() if name.startswith(f"{path}.")}


@pytest.mark.parametrize(("form", "name", "options"), CASES)
def test_what_is_written_comes_back(form: str, name: str, options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    done = quantised(base, tmp_path / "out", form, name, **options)
    assert done.comparison is not None
    assert done.comparison.max_error == 0
    assert done.written.nbytes == stored(tmp_path / "out")
    assert not done.skipped
    if form in ("bitsandbytes", "surgeon"):
        assert plan(api.read(base), done.step).bytes.quantised == done.written.nbytes
    if form == "compressed-tensors":
        model = transformers_reads(tmp_path / "out", dense=options.get("zero") != "symmetric")
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, logits(tmp_path / "out"))
    if form.startswith("gptq"):
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        theirs = GPTQConfig(**{key: value for key, value in config.items() if key != "quant_method"})
        assert (theirs.bits, theirs.format, theirs.desc_act) == (done.step.options()["bits"], form, False)


def transformers_reads(folder: Path, *, dense: bool) -> Any:
    """Left in codes, it expects zero points that are not packed: on meta the library leaves them as they are."""
    if not dense:
        return AutoModelForCausalLM.from_pretrained(folder)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    with pytest.warns(UserWarning, match="already has"):
        return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize(("form", "bits"), [("gptq", 4), ("gptq_v2", 3), ("gptq_v2", 2)])
def test_gptq_words_are_those_of_the_formula(form: str, bits: int, base: Path, tmp_path: Path) -> None:
    """Code i of a column is bits b·i … b·i + b − 1 of its words; w = scale · (code − zero), zero one less in v1."""
    quantised(base, tmp_path / "out", form, bits=bits, zero="integer")
    parts = parts_of(tmp_path / "out")

    def code(words: torch.Tensor, index: int) -> int:
        number = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
        return number >> (bits * index) & (2**bits - 1)

    value = next(iter(api.read(tmp_path / "out").applied))
    assert value.options()["bits"] == bits
    found = api.read(tmp_path / "out").values[f"{NAME}.weight"]
    for out, inp in ((0, 0), (5, 31), (63, 127), (17, 70)):
        group = int(parts["g_idx"][inp])
        zero = code(parts["qzeros"][group], out) + (1 if form == "gptq" else 0)
        expected = float(parts["scales"][group, out]) * (code(parts["qweight"][:, out], inp) - zero)
        assert float(found[out, inp]) == pytest.approx(expected, rel=1e-6)


def test_compressed_tensors_decompresses_the_same_weights(base: Path, tmp_path: Path) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    quantised(base, tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig(**config).config_groups["group_0"]
    theirs = PackedQuantizationCompressor.decompress(parts_of(tmp_path / "out"), scheme)["weight"]
    assert torch.equal(theirs, api.read(tmp_path / "out").values[f"{NAME}.weight"])


@pytest.mark.parametrize(("form", "name"), [("bitsandbytes", "nf4"), ("surgeon", "intq"), ("gptq", "intq")])
def test_weights_that_are_stored_input_first(form: str, name: str, tmp_path: Path) -> None:
    options = {"group": 8} if name == "intq" else {}
    done = quantised(folder_of("gpt2"), tmp_path / "out", form, name, **options)
    assert done.comparison is not None
    assert done.comparison.max_error == 0


def test_zero_points_of_gptq_models_first_version(base: Path, tmp_path: Path) -> None:
    """It takes 1 from all codes of a word at once: a zero point of 0 borrows from the next one."""
    quantised(base, tmp_path / "out", "gptq_v2")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    zeros = tensors[f"{NAME}.qzeros"]
    zeros[0, 0] &= ~0xF0  # the second zero point of the word is 0
    expected = Groups(
        tensors[f"{NAME}.qweight"].t().contiguous().view(torch.uint8), tensors[f"{NAME}.scales"].t().float(),
        unpack(zeros.view(torch.uint8), 4).t().float(), 4,
    )  # fmt: skip
    for name in [name for name in tensors if name.endswith("qzeros")]:
        tensors[name] = tensors[name] - 0x11111111
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"] |= {"checkpoint_format": "gptq", "format": "gptq"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert torch.equal(api.read(tmp_path / "out").values[f"{NAME}.weight"], dequantise_groups(expected))


def test_what_has_no_place_is_refused_and_nothing_is_written(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no form 'awq'"):
        quantised(base, tmp_path / "out", "awq")
    for form, name, options in (
        ("gptq", "nf4", {}), ("bitsandbytes", "intq", {}), ("surgeon", "nf4", {}),
        ("compressed-tensors", "intq", {"bits": 3}),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match=f"the form {form}"):
            quantised(base, tmp_path / "out", form, name, **options)
    with pytest.raises(UnsupportedError, match="Conv1D"):
        quantised(folder_of("gpt2"), tmp_path / "out", "compressed-tensors", group=8)
    with pytest.raises(UnsupportedError, match="no whole 32-bit words"):
        quantised(folder_of("llama"), tmp_path / "out", "gptq_v2", bits=3, group=8)
    quantised(base, tmp_path / "once", "surgeon")
    with pytest.raises(UsageError, match="quantised already"):
        quantised(tmp_path / "once", tmp_path / "out", "surgeon")
    assert not (tmp_path / "out").exists()


def test_zero_points_of_0_need_the_second_version(base: Path, tmp_path: Path) -> None:
    """Positive weights have a zero point of 0."""
    tensors = load_file(base / "model.safetensors")
    tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"].abs()
    other = tmp_path / "positive"
    other.mkdir()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(SurgeonError, match="do not fit the form gptq") as caught:
        quantised(other, tmp_path / "out", "gptq", zero="integer")
    assert caught.value.where == f"{NAME}.weight"
    assert "gptq_v2" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert quantised(other, tmp_path / "out", "gptq_v2", zero="integer").comparison is not None


def test_modules_that_are_left_out_are_named(base: Path, tmp_path: Path) -> None:
    for form, key in (("gptq_v2", "dynamic"), ("compressed-tensors", "ignore")):
        quantised(base, tmp_path / form, form, exclude="*.q_proj")
        config = json.loads((tmp_path / form / "config.json").read_text())["quantization_config"]
        assert any("layers" in name and "q_proj" in name for name in config[key])
        assert (tmp_path / form).exists()
        assert torch.isfinite(logits(tmp_path / form)).all()


def test_every_form_knows_its_bytes() -> None:
    for form, kind in WRITERS.items():
        step = make("nf4") if form == "bitsandbytes" else make("intq")
        writer = writer_of(kind.suited(step, torch.float16), torch.float16, form)
        assert writer.nbytes(64, 128) >= 64 * 128 // 2
