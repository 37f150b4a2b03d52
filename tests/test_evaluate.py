"""Evaluation is the token-weighted mean, whatever the batches, and leaves the model as it was."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from surgeon.errors import CheckFailed, UsageError
from surgeon.evaluate import evaluate
from surgeon.render import Rendered, Sample, load_data

TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=2)


def small() -> Any:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, attention_dropout=0.5, **sizes))


def samples() -> Rendered:
    rows = [torch.randint(3, 40, (3 + 2 * i,)).tolist() for i in range(5)]
    return Rendered(tuple(Sample(ids, [-100, *ids[1:-1], -100] if len(ids) > 5 else list(ids)) for ids in rows))


def expected(model: Any, data: Rendered) -> tuple[float, int, float]:
    nll, hits, count = 0.0, 0, 0
    model.eval()
    for sample in data.samples:
        with torch.no_grad():
            logits = model(torch.tensor([sample.input_ids])).logits[0, :-1]
        labels = torch.tensor(sample.labels[1:])
        nll += F.cross_entropy(logits, labels, reduction="sum").item()
        hits += int((logits.argmax(-1) == labels).sum())
        count += int((labels != -100).sum())
    return nll / count, count, hits / count


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_token_weighted_whatever_the_batches(batch_size: int) -> None:
    model, data = small(), samples()
    loss, tokens, accuracy = expected(model, data)
    report = evaluate(model, TOKENIZER, data, batch_size=batch_size)
    assert report.loss == pytest.approx(loss, rel=1e-6)
    assert report.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert (report.tokens, report.accuracy) == (tokens, accuracy)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_mode_and_random_numbers_alone(training: bool) -> None:
    model, data = small().train(training), samples()
    state = torch.get_rng_state()
    evaluate(model, TOKENIZER, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_bf16_is_close() -> None:
    model, data = small(), samples()
    exact = evaluate(model, TOKENIZER, data).loss
    assert evaluate(model, TOKENIZER, data, precision="bf16").loss == pytest.approx(exact, rel=0.01)


def test_a_trained_model_predicts_its_domain(shared: Path, tmp_path: Path) -> None:
    folder = shared / "models" / "pystdlib-llama"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    losses = {}
    for name in ("pystdlib_long", "c_headers"):
        lines = (shared / "data" / f"{name}.heldout.jsonl").read_text().splitlines()[:8]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        data = load_data(tmp_path / f"{name}.jsonl", tokenizer, 128)
        losses[name] = evaluate(model, tokenizer, data, batch_size=4).loss
    assert losses["pystdlib_long"] < 3.2 < losses["c_headers"]


def test_bad_input(tmp_path: Path) -> None:
    model = small()
    with pytest.raises(UsageError, match="a batch of 0 samples"):
        evaluate(model, TOKENIZER, samples(), batch_size=0)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UsageError, match="the data is empty"):
        evaluate(model, TOKENIZER, tmp_path / "empty.jsonl")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(CheckFailed, match="the evaluation loss is nan"):
        evaluate(model, TOKENIZER, samples())
