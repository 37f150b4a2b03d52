"""Prompts against PEFT's, with the same table of rows: logits and generated tokens.

Where PEFT differs from what it says, or fails (0.21, transformers 5.23):

* OPT whose embedding is narrower than its layers: PEFT takes the layers' width for the rows' and fails in `cat`, unless
  `token_dim` is given, as here.
* T5, BART: PEFT makes rows for the decoder too (`num_transformer_submodules=2`), saves them, and never reads them.
* Gemma 3n looks up a second embedding for every id: PEFT drops that of the text too. Surgeon refuses.
* Llama for sequence classification takes the last position whatever the padding is, since it sees no ids.
* Positions: PEFT drops what the user gives. Real tokens are numbered from p on, pads in between counted, but for OPT,
  which counts its mask.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model

from benchmarks.zoo.graphs import graph_of, model_of, randomised
from surgeon import run
from surgeon.graph import Graph
from surgeon.model import load_model
from surgeon.passes import make

pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported")
TOKENS = 4
DECODERS = ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "gemma2", "gemma3_text", "mistral"]
SEQ2SEQ = ["t5", "bart"]
FEW, slow = {"llama", "opt"}, pytest.mark.slow
GENERATE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
HEADS = {"sequence-classification": "SEQ_CLS", "token-classification": "TOKEN_CLS", "features": "FEATURE_EXTRACTION"}


def families(names: list[str]) -> Any:
    return pytest.mark.parametrize("family", [pytest.param(n, marks=() if n in FEW else slow) for n in names])


@functools.cache
def prompted(family: str, layout: str = "tokens", task: str | None = None) -> Graph:
    return randomised(run.apply(graph_of(family, task), make("prompt", tokens=TOKENS, layout=layout)))


def peft_of(graph: Graph, family: str, task_type: str, task: str | None = None) -> PeftModel:
    """PEFT's prompt tuning of the same base, with the graph's rows."""
    (name,) = [name for name in graph.trainable() if name.endswith("rows")]
    rows = graph.inserted[name]()
    config = PromptTuningConfig(task_type=task_type, num_virtual_tokens=TOKENS, token_dim=rows.shape[1])
    model = get_peft_model(copy.deepcopy(model_of(family, task)), config).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight[:TOKENS] = rows
    return model


def padded(side: str = "left") -> dict[str, torch.Tensor]:
    """Three texts of different lengths."""
    ids = torch.randint(3, 112, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 3 + [1] * 4, [0] + [1] * 6, [1] * 7])
    mask = mask if side == "left" else mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


@families(DECODERS)
@torch.no_grad()
def test_a_decoder_computes_what_it_computes_in_peft(family: str) -> None:
    given = padded()
    for layout, first in (("tokens", TOKENS), ("peft", 0)):
        graph = prompted(family, layout)
        expected = peft_of(graph, family, "CAUSAL_LM")(**given).logits[:, first:]
        found = load_model(graph)(**given).logits
        assert found.shape == expected.shape
        seen = torch.nn.functional.pad(given["attention_mask"], (TOKENS - first, 0), value=1).bool()
        assert (found - expected)[seen].abs().max() <= 1e-5
        base = load_model(graph_of(family))(**given).logits
        assert (found[:, -1] - base[:, -1]).abs().max() > 1e-3


@families(DECODERS + SEQ2SEQ)
def test_it_generates_the_same_tokens(family: str) -> None:
    graph, given = prompted(family), padded()
    model = load_model(graph)
    peft = peft_of(graph, family, "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "CAUSAL_LM")
    expected = peft.generate(**given, **GENERATE)
    assert torch.equal(model.generate(**given, **GENERATE), expected)
    assert torch.equal(model.generate(**given, use_cache=False, **GENERATE), expected)
    beams = peft.generate(**given, num_beams=3, **GENERATE)
    assert torch.equal(model.generate(**given, num_beams=3, **GENERATE), beams)


@families(SEQ2SEQ)
@torch.no_grad()
def test_an_encoder_decoder_is_prompted_at_its_encoder(family: str) -> None:
    given = {**padded(), "decoder_input_ids": padded()["input_ids"].flip(0)[:, :5]}
    for layout in ("tokens", "peft"):
        graph = prompted(family, layout)
        expected = peft_of(graph, family, "SEQ_2_SEQ_LM")(**given).logits
        assert (load_model(graph)(**given).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "sequence-classification"),
        pytest.param("bert", "token-classification", marks=slow),
        ("roberta", "features"),
        pytest.param("roberta", "sequence-classification", marks=slow),
    ],
)
@torch.no_grad()
def test_an_encoder_computes_what_it_computes_in_peft(family: str, task: str) -> None:
    given = padded("right")
    if family == "roberta":
        given["input_ids"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, 1)
    elif task != "features":
        given["token_type_ids"] = given["attention_mask"].cumsum(1).gt(3).long()
    whole, cut = prompted(family, "peft", task), prompted(family, "tokens", task)
    theirs = peft_of(whole, family, HEADS[task], task)(**given)
    seen = torch.nn.functional.pad(given["attention_mask"], (TOKENS, 0), value=1).bool()
    found, short = load_model(whole)(**given), load_model(cut)(**given)
    if task == "sequence-classification":
        assert (found.logits - theirs.logits).abs().max() <= 1e-5
        assert (short.logits - theirs.logits).abs().max() > 1e-4  # BERT's pooler takes the first position: a row there
        return
    name = "last_hidden_state" if task == "features" else "logits"
    ours, cut_off, peft = found[name], short[name], theirs[name]
    assert (ours - peft)[seen].abs().max() <= 1e-5
    assert (cut_off - peft[:, TOKENS:])[seen[:, TOKENS:]].abs().max() <= 1e-5


@torch.no_grad()
def test_the_loss_is_that_of_peft_in_its_layout() -> None:
    given = padded("right")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    graph = prompted("llama", "peft")
    expected = peft_of(graph, "llama", "CAUSAL_LM")(**given, labels=labels).loss
    assert abs(load_model(graph)(**given, labels=labels).loss - expected) <= 1e-5
    tokens = load_model(prompted("llama"))(**given)
    target = labels[:, 1:].reshape(-1)
    cut = torch.nn.functional.cross_entropy(tokens.logits[:, :-1].flatten(0, 1), target, ignore_index=-100)
    assert abs(load_model(prompted("llama"))(**given, labels=labels).loss - cut) <= 1e-5
