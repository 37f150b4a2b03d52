"""AWQ checkpoints, packed here word by word from known codes: read, run, trained over, merged, exported to ONNX."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import surgeon
from benchmarks.zoo.graphs import randomised
from surgeon import api, run
from surgeon.cli.main import main
from surgeon.coded import CodedCheckpoint
from surgeon.errors import SurgeonError, UnsupportedError
from surgeon.fold import value_of
from surgeon.lower.into import merge_into
from surgeon.model import load_model
from surgeon.passes import make

pytestmark = pytest.mark.usefixtures("captured_once")
IDS = torch.arange(3, 21).reshape(2, 9)
NAME = "model.layers.1.mlp.down_proj"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs the nibbles of a word hold, the lowest first."""
Array = npt.NDArray[Any]


def packed(values: Array) -> Array:
    """Integers of 4 bits `[n, out]` as int32 words `[n, out / 8]`."""
    words = np.zeros((len(values), values.shape[1] // 8), np.uint32)
    for column in range(words.shape[1]):
        for nibble, output in enumerate(ORDER):
            words[:, column] |= values[:, column * 8 + output].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


@dataclass(frozen=True)
class Made:
    """A checkpoint and what its linears are by the formula, `[out, in]`."""

    folder: Path
    weights: Mapping[str, Array]

    def decoded(self, out: Path) -> Path:
        """The same model in floating point."""
        tensors = load_file(self.folder / "model.safetensors")
        plain = {name: v for name, v in tensors.items() if not name.endswith(("qweight", "qzeros", "scales"))}
        out.mkdir()
        save_file({**plain, **self.weights}, out / "model.safetensors", {"format": "pt"})
        config = json.loads((self.folder / "config.json").read_text())
        del config["quantization_config"]
        (out / "config.json").write_text(json.dumps(config))
        return out


def made(base: Path, out: Path, group: int = 32, left: tuple[str, ...] = (), **config: Any) -> Made:
    """Random codes, zero points (0 and 15 among them) and scales for the linears of a model, but for those `left`."""
    tensors, numbers = load_file(base / "model.safetensors"), np.random.default_rng(0)
    weights = {}
    for name in [name for name in tensors if name.endswith("_proj.weight") and not name.startswith(left or "-")]:
        stem, (wide, inp) = name.removesuffix(".weight"), tensors.pop(name).shape
        groups = 1 if group == -1 else inp // group
        codes, zeros = numbers.integers(0, 16, (inp, wide)), numbers.integers(0, 16, (groups, wide))
        scales = numbers.uniform(0.002, 0.01, (groups, wide)).astype(np.float16)
        tensors |= {f"{stem}.qweight": packed(codes), f"{stem}.qzeros": packed(zeros), f"{stem}.scales": scales}
        each = np.arange(inp) * groups // inp
        weights[name] = np.ascontiguousarray(((codes - zeros[each]) * scales.astype(np.float32)[each]).T, np.float32)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    said = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True} | config
    whole = json.loads((base / "config.json").read_text()) | {"quantization_config": said}
    (out / "config.json").write_text(json.dumps(whole))
    return Made(out, weights)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, value in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(value, std=0.1)
    folder = tmp_path_factory.mktemp("awq") / "base"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def awq(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(base, tmp_path_factory.mktemp("awq") / "saved")


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return api.load(folder)(input_ids=IDS).logits


@torch.no_grad()
def transformers_logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


@pytest.mark.parametrize("group", [16, 64, -1])
def test_weights_are_those_of_the_formula(group: int, base: Path, tmp_path: Path) -> None:
    found = made(base, tmp_path / "saved", group, version="GEMM")
    graph = api.read(found.folder)
    assert [(step.name, step.options()["group"]) for step in graph.applied] == [("intq", group)]
    assert len(found.weights) == 14
    for name, expected in found.weights.items():
        assert np.array_equal(value_of(graph, name).numpy(), expected)


def test_logits_are_those_of_the_decoded_model(awq: Made, tmp_path: Path) -> None:
    expected = transformers_logits(awq.decoded(tmp_path / "plain"))
    assert (logits(awq.folder) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_codes_stay_codes(awq: Made) -> None:
    """Half a byte for a weight, and no float weight; with scales and zero points a linear is under a fifth of one."""
    graph = api.read(awq.folder)
    own = [name for name in graph.resident() if name.startswith(NAME)]
    assert sorted(name.removeprefix(f"{NAME}.intq.") for name in own) == ["codes", "scale", "zero"]
    values = {name: graph.inserted[name]() for name in own}
    assert values[f"{NAME}.intq.codes"].nbytes == 64 * 128 // 2
    assert sum(value.nbytes for value in values.values()) < 64 * 128 * 4 / 5


def test_an_adapter_is_trained_saved_and_merged(awq: Made, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = api.apply(awq.folder, "qalora", rank=3).train()
    optimiser = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=3e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    work = model.eval().save(tmp_path / "work")
    expected = logits(work)
    assert (expected - logits(awq.folder)).abs().max() > 0.1
    for way in ("dequant", "zero-points"):
        merge_into(api.read(work), api.base_of(api.read(work)), tmp_path / way, into=way)
        assert (logits(tmp_path / way) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (transformers_logits(tmp_path / "dequant") - expected).abs().max() < 1e-4 * expected.abs().max()


def test_onnx_has_the_same_codes(awq: Made, tmp_path: Path) -> None:
    """MatMulNBits over the codes as they were chosen: by the operator's formula they are AWQ's weights, row by row."""
    graph = randomised(run.apply(api.read(awq.folder), make("lora", targets="*.down_proj", rank=2)), std=0.05)
    load_model(graph).save(tmp_path / "work")
    report = surgeon.export(tmp_path / "work", tmp_path / "onnx", weights="copy")
    assert report.replay.token_agreement == 1
    assert report.replay.max_error <= report.replay.bound
    nodes = [node for node in ir.load(tmp_path / "onnx" / "model.onnx").graph if node.op_type == "MatMulNBits"]
    found = np.concatenate([decoded_by_the_operator(node) for node in nodes if node.attributes["K"].as_int() == 64])
    names = [name for name in awq.weights if not name.endswith("down_proj.weight")]
    assert sorted(map(tuple, found)) == sorted(tuple(row) for name in names for row in awq.weights[name])


def decoded_by_the_operator(node: ir.Node) -> Array:
    """B `[N, K/32, 16]`, low nibbles first; scales `[N, K/32]`; zero points packed alike along their row."""
    given = [value.const_value.numpy() for value in node.inputs[1:4] if value is not None and value.const_value]
    assert node.attributes["bits"].as_int() == 4
    assert node.attributes["block_size"].as_int() == 32
    codes, zeros = (np.stack([part & 15, part >> 4], -1).reshape(len(part), -1) for part in (given[0], given[2]))
    scales = given[1].reshape(len(codes), -1)
    each = np.arange(codes.shape[1]) // 32
    zeros = zeros.reshape(len(codes), -1)
    return (codes.astype(np.float32) - zeros[:, each]) * scales[:, each]


def test_modules_that_are_not_converted_are_floats(base: Path, tmp_path: Path) -> None:
    """Named by the end of a path or by its beginning, as transformers matches it."""
    left = ("model.layers.1.mlp", "model.layers.0.self_attn.q_proj")
    found = made(base, tmp_path / "saved", left=left, modules_to_not_convert=["layers.0.self_attn.q_proj", left[0]])
    checkpoint = api.base_of(api.read(found.folder)).checkpoint
    assert isinstance(checkpoint, CodedCheckpoint)
    assert set(checkpoint.coded) == set(found.weights)
    assert len(found.weights) == 10
    expected = transformers_logits(found.decoded(tmp_path / "plain"))
    assert (logits(found.folder) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_codes_of_a_module_that_is_not_converted_are_left_alone(awq: Made, base: Path, tmp_path: Path) -> None:
    """transformers reads its weight, which is there too; without one the file and its config contradict each other."""
    found = made(base, tmp_path / "saved", modules_to_not_convert=[NAME])
    with pytest.raises(SurgeonError, match=f"names {NAME}, which is stored in codes alone"):
        api.read(found.folder)
    tensors = load_file(found.folder / "model.safetensors")
    weight = load_file(base / "model.safetensors")[f"{NAME}.weight"]
    save_file({**tensors, f"{NAME}.weight": weight}, found.folder / "model.safetensors", {"format": "pt"})
    assert np.array_equal(value_of(api.read(found.folder), f"{NAME}.weight").numpy(), weight)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"version": "gemv"}, "its version of AWQ is gemv"),
        ({"version": "marlin"}, "its version of AWQ is marlin"),
        ({"version": "exllama"}, "its version of AWQ is exllama"),
        ({"version": None, "format": "gemv_fast"}, "its version of AWQ is gemv_fast"),
        ({"backend": "llm-awq"}, "its version of AWQ is llm-awq"),
        ({"bits": 3}, "its AWQ codes have 3 bits"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "widths of their own"),
    ],
)
def test_other_versions_and_widths_are_refused_by_name(
    config: dict[str, Any], what: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = made(base, tmp_path / "saved", **config)
    assert main(["export", str(found.folder), "--target", "onnx", "-o", str(tmp_path / "onnx")]) == 3
    said = capsys.readouterr().err
    assert what in said
    assert "where: quantization_config" in said
    assert "try:   quantise it in the version gemm with 4 bits, or take the original weights" in said
    assert not (tmp_path / "onnx").exists()


def rewritten(found: Made, change: Mapping[str, Array | None]) -> Path:
    file = found.folder / "model.safetensors"
    tensors = {**load_file(file), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, file, {"format": "pt"})
    return found.folder


def test_tensors_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    folder = rewritten(made(base, tmp_path / "short"), {f"{NAME}.qzeros": np.zeros((3, 8), np.int32)})
    with pytest.raises(SurgeonError, match=r"down_proj.weight has \[128, 8\] words, \[3, 8\] of zero points"):
        value_of(api.read(folder), f"{NAME}.weight")
    folder = made(base, tmp_path / "other", 32, group_size=64).folder
    with pytest.raises(SurgeonError, match="in groups of 64"):
        api.read(folder)
    folder = rewritten(made(base, tmp_path / "none"), {f"{NAME}.scales": None})
    with pytest.raises(SurgeonError, match="a qweight and no scales"):
        api.read(folder)


def test_scaled_activations_are_refused(base: Path, tmp_path: Path) -> None:
    """Falcon, MPT, GPT-NeoX and others: what AWQ multiplied a linear's inputs by stays behind the activation."""
    found = made(base, tmp_path / "saved")
    rewritten(found, {"model.layers.0.mlp.act.scales": np.ones(128, np.float16)})
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.act\.scales divides an activation"):
        api.read(found.folder)
