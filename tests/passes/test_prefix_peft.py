"""Prefixes against PEFT's, with the same table of columns: logits and generated tokens.

Where PEFT differs from what it says, or fails (0.21, transformers 5.23):

* T5 whose heads together are not as wide as its layers (T5 1.1 small, this one): PEFT takes the layers' width for the
  columns' and fails in `cat`, unless `token_dim` is given, as here.
* T5: the columns have the position bias of p tokens before the text, which is `biased` here.
* T5, BART: PEFT lays its table out twice, deals four rows of it to each layer and then empties the cache of the
  cross-attention. So a prefix reaches the decoder's self-attention alone, and layer i reads the keys in row 4i modulo
  all rows: with 2 layers both read the first layer's rows, and the second layer's are trained by nobody.
* Sliding windows hide the columns like tokens; those further back than the window are not even kept.
* Chunks (Llama 4) are counted from the first column, and no longer from the first token after the padding.
* Positions: PEFT adds p to the user's; where there are none, tokens are numbered from p on, pads counted, but for OPT,
  which counts its mask.
* What a pad computes is its own affair: pads see the columns here and there, but do not always have the same position.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model

from benchmarks.zoo.graphs import graph_of, model_of
from surgeon import run
from surgeon.generate import generator
from surgeon.graph import Graph
from surgeon.model import load_model
from surgeon.passes import make
from surgeon.replaced import Held
from surgeon.sites import ATTENTION, sites

TOKENS = 4
DECODERS = ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "gemma2", "gemma3_text", "mistral", "llama4_text", "mixtral"]
SEQ2SEQ = ["t5", "bart"]
FEW, slow = {"opt", "gemma2", "t5"}, pytest.mark.slow
TASKS = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM", "sequence-classification": "SEQ_CLS"}
GENERATE: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def families(names: list[str]) -> Any:
    return pytest.mark.parametrize("family", [pytest.param(n, marks=() if n in FEW else slow) for n in names])


def pair(family: str, task: str | None = None, hidden: int = 0) -> tuple[PeftModel, Graph]:
    """PEFT's prefix tuning of a family, and the same in a graph."""
    base = graph_of(family, task)
    torch.manual_seed(0)
    config = PrefixTuningConfig(
        task_type=TASKS[base.task], num_virtual_tokens=TOKENS, prefix_projection=bool(hidden),
        encoder_hidden_size=hidden or None, token_dim=48 if family == "t5" else None,
    )  # fmt: skip
    theirs = get_peft_model(copy.deepcopy(model_of(family, task)), config).eval()
    roles = "decoder" if base.task == "seq2seq-lm" else "encoder,decoder"
    ours = run.apply(base, make("prefix", tokens=TOKENS, hidden=hidden, sites=roles, biased=True))
    encoder = theirs.prompt_encoder["default"]
    if hidden:
        _copy_mlp(ours, encoder)
    else:
        _copy_table(ours, encoder.embedding.weight.detach(), theirs.active_peft_config)
    return theirs, ours


def _sites(graph: Graph) -> list[Any]:
    marked = {name.partition(".prefix.")[0] for name in graph.inserted}
    return [site for site in sites(graph, ATTENTION) if site.path in marked]


def _copy_table(graph: Graph, table: torch.Tensor, config: Any) -> None:
    rows = table.view(TOKENS, 2 * config.num_layers, config.num_attention_heads, -1).permute(1, 2, 0, 3)
    each = 4 if graph.task == "seq2seq-lm" else 2
    for number, site in enumerate(_sites(graph)):
        for word, row in (("k", each * number), ("v", each * number + 1)):
            graph.inserted[site.tensor("prefix", word)] = Held(rows[row % len(rows)].contiguous())


def _copy_mlp(graph: Graph, encoder: Any) -> None:
    first, _, last = encoder.transform
    tensors = {"table": encoder.embedding.weight, "weight": first.weight, "bias": first.bias}
    for name, tensor in tensors.items():
        graph.inserted[f"prefix.decoder_{name}"] = Held(tensor.detach())
    found, each = _sites(graph), 4 if graph.task == "seq2seq-lm" else 2
    weights = last.weight.detach().chunk(2 * len(found))
    biases = last.bias.detach().chunk(2 * len(found))
    for number, site in enumerate(found):
        for word, row in (("k", each * number), ("v", each * number + 1)):
            row %= len(weights)
            graph.inserted[site.tensor("prefix", f"{word}_weight")] = Held(weights[row])
            graph.inserted[site.tensor("prefix", f"{word}_bias")] = Held(biases[row])


def padded() -> dict[str, torch.Tensor]:
    """Three texts of different lengths, the padding to the left."""
    ids = torch.randint(3, 112, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 3 + [1] * 4, [0] + [1] * 6, [1] * 7])
    return {"input_ids": ids * mask, "attention_mask": mask}


@families(DECODERS)
@pytest.mark.parametrize("hidden", [0, pytest.param(6, marks=slow)])
@torch.no_grad()
def test_a_decoder_computes_what_it_computes_in_peft(family: str, hidden: int) -> None:
    theirs, ours = pair(family, hidden=hidden)
    given = padded()
    seen = given["attention_mask"].bool()
    found, expected = load_model(ours)(**given).logits, theirs(**given).logits
    assert (found - expected)[seen].abs().max() <= 1e-5
    assert (found - load_model(graph_of(family))(**given).logits)[seen].abs().max() > 1e-2
    positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    found, expected = (model(**given, position_ids=positions).logits for model in (load_model(ours), theirs))
    assert (found - expected)[seen].abs().max() <= 1e-5


@families(SEQ2SEQ)
@pytest.mark.parametrize("hidden", [0, pytest.param(6, marks=slow)])
@torch.no_grad()
def test_a_decoder_with_an_encoder_computes_what_it_computes_in_peft(family: str, hidden: int) -> None:
    theirs, ours = pair(family, hidden=hidden)
    target = torch.randint(3, 112, (3, 5), generator=torch.Generator().manual_seed(1))
    given = {**padded(), "decoder_input_ids": target, "decoder_attention_mask": torch.ones_like(target)}
    assert (load_model(ours)(**given).logits - theirs(**given).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("family", [pytest.param("bert", marks=slow), "roberta"])
@torch.no_grad()
def test_an_encoder_computes_what_it_computes_in_peft(family: str) -> None:
    theirs, ours = pair(family, "sequence-classification")
    given = {name: tensor.flip(1) for name, tensor in padded().items()}
    if family == "roberta":  # which tells padding by its id
        given["input_ids"] = given["input_ids"].where(given["attention_mask"] == 1, theirs.config.pad_token_id)
    assert (load_model(ours)(**given).logits - theirs(**given).logits).abs().max() <= 1e-5


@families([*(name for name in DECODERS if name != "llama4_text"), *SEQ2SEQ])
@torch.no_grad()
def test_generated_tokens_are_pefts(family: str) -> None:
    theirs, ours = pair(family)
    given = padded()
    model = load_model(ours)
    found = model.generate(**given, **GENERATE)
    assert generator(model).has_cache
    assert torch.equal(found, theirs.generate(**given, **GENERATE))
    assert torch.equal(found, model.generate(**given, **GENERATE, use_cache=False))
    assert len(set(found[:, -8:].flatten().tolist())) > 2
