"""NF4 weights in graphs: bytes as planned and measured, work folders, merges into what the adapter was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bitsandbytes
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.zoo.folders import folder_of
from benchmarks.zoo.graphs import graph_of, randomised
from surgeon import api, fold, run
from surgeon.errors import UsageError
from surgeon.hold import is_held
from surgeon.model import load_model
from surgeon.module import load
from surgeon.numerics import dequantise_4bit, quantise_4bit
from surgeon.passes import make
from surgeon.planning import plan

GB = 1_000_000_000
# hidden, inner, layers, heads → bytes of the weights with NF4, double quantisation and 16-bit embeddings, head, norms
LLAMA = {"7B": (4096, 11008, 32, 32, 3.87), "65B": (8192, 22016, 80, 64, 34.46)}


def llama(hidden: int, inner: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=32000, dtype=torch.bfloat16, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.mark.parametrize("size", ["7B", pytest.param("65B", marks=pytest.mark.slow)])
def test_the_planned_bytes_are_the_known_ones(size: str) -> None:
    """C-44, C-47, C-57; C-53, C-54: the second quantisation saves 0.373 bits per weight."""
    *shape, expected = LLAMA[size]
    config = llama(*shape)
    found = plan(config, make("nf4"), make("lora", targets="all-linear", rank=64), task="causal-lm")
    assert round(found.bytes.memory / GB, 2) == expected
    assert found.trainable_parameters == {"7B": 159_907_840, "65B": 799_539_200}[size]
    single = plan(config, make("nf4", double=False), task="causal-lm")
    weights = found.base_parameters - sum(p for p in (2 * 32000 * shape[0], (2 * shape[2] + 1) * shape[0]))
    assert abs((single.bytes.memory - found.bytes.memory) * 8 / weights - 0.373046875) < 1e-4


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_planned_bytes_are_the_measured_ones(family: str, double: bool) -> None:
    graph, step = graph_of(family), make("nf4", double=double)
    quantised = run.apply(graph, step)
    model = load(quantised)
    held = {full for spec in quantised.tensors.values() if spec.held for full in spec.held.parts.values()}
    codes = sum(model.get_buffer(full).nbytes for full in held)
    floats = sum(p.nbytes for p in load(graph).parameters()) - codes
    kept = sum(p.nbytes for p in model.parameters())
    found = plan(graph, step).bytes
    assert found.base - found.memory == floats - kept


def test_the_codes_are_those_of_bitsandbytes() -> None:
    graph = run.apply(graph_of("llama"), make("nf4"))
    for name in (name for name in graph.tensors if is_held(graph, name)):
        codes, state = bitsandbytes.quantize_4bit(
            graph.values[name], blocksize=64, quant_type="nf4", compress_statistics=True
        )
        stem = name.removesuffix(".weight")
        assert torch.equal(graph.inserted[f"{stem}.nf4.codes"](), codes[:, 0])
        assert torch.equal(graph.inserted[f"{stem}.nf4.absmax"](), state.absmax)
        if graph.values[name].shape[1] % 64 == 0:  # bitsandbytes' own CPU kernel is wrong for other widths
            assert torch.equal(fold.value_of(graph, name), bitsandbytes.dequantize_4bit(codes, state))
        else:
            assert torch.equal(
                fold.value_of(graph, name), dequantise_4bit(quantise_4bit(graph.values[name], double=True))
            )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder of LoRA over NF4."""
    model = api.apply(folder_of("llama"), "nf4")
    adapted = randomised(run.apply(model.graph, make("lora", rank=3, targets="*.{q,down}_proj")))
    return load_model(adapted).save(tmp_path_factory.mktemp("nf4") / "work")


def test_a_work_folder_holds_no_codes_and_opens_to_the_same_model(work: Path) -> None:
    assert sorted(path.name for path in work.iterdir() if path.suffix == ".safetensors") == [
        "adapter_model.safetensors"
    ]
    first, second = api.load(work), api.load(work)
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)
    assert [step.name for step in first.graph.applied] == ["nf4", "lora"]


def test_a_merge_is_into_the_weights_that_the_adapter_was_trained_on(work: Path, tmp_path: Path) -> None:
    merged = api.merge(work, tmp_path / "merged")
    assert merged.comparison is not None
    assert merged.comparison.max_error < 1e-4
    model = AutoModelForCausalLM.from_pretrained(merged.written.folder)
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        found, expected = model(ids).logits, api.load(work)(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    graph = api.read(work)
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[untouched], fold.value_of(graph, untouched))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="no 4-bit type 'nf3'"):
        make("nf4", kind="nf3")


def test_a_weight_that_two_modules_read_stays() -> None:
    graph = graph_of("gpt2")
    with pytest.raises(UsageError, match="no weight to quantise") as caught:
        run.apply(graph, make("nf4", targets="lm_head"))
    assert "read by other modules" in caught.value.where
