"""Adapters learn a domain their base has not seen, and along the same curve as PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import surgeon
from surgeon.data import Collator
from surgeon.evaluate import evaluate
from surgeon.model import SurgeonModel
from surgeon.render import Rendered, load_data
from surgeon.train import train

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"options": {"rank": 8}, "lr": 3e-3},
    "vera": {"options": {"rank": 64}, "lr": 1e-1},
}


@pytest.fixture(scope="module")
def base(shared: Path) -> Path:
    return shared / "models/pystdlib-llama"


def adapted(base: Path, method: str) -> SurgeonModel:
    return surgeon.apply(base, method, targets="all-linear", **METHODS[method]["options"])


def samples(shared: Path, part: str, tokenizer: Any, count: int, length: int) -> Rendered:
    every = load_data(shared / f"data/c_headers.{part}.jsonl", tokenizer, length).samples
    return Rendered(every[:: len(every) // count][:count])  # the files stand one after the other


@pytest.mark.parametrize("method", METHODS)
def test_held_out_loss_falls(base: Path, shared: Path, tmp_path: Path, method: str) -> None:
    model = adapted(base, method)
    data = samples(shared, "train", model.tokenizer, 64, 64)
    held_out = samples(shared, "heldout", model.tokenizer, 16, 64)
    before = evaluate(model, model.tokenizer, held_out).loss
    report = train(
        model, model.tokenizer, data, out=tmp_path, eval_data=held_out, steps=16, batch_size=4, warmup=0,
        lr=METHODS[method]["lr"], progress=False,
    )  # fmt: skip
    assert report.eval_loss is not None
    assert report.eval_loss < before - 0.15
    assert report.loss < report.first_loss


def peft_twin(base: Path, method: str) -> Any:
    plain = AutoModelForCausalLM.from_pretrained(base)
    rank = METHODS[method]["options"]["rank"]
    if method == "lora":
        config: Any = peft.LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        config = peft.VeraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(plain, config)


def copy_start(twin: Any, model: SurgeonModel) -> None:
    """Our LoRA matrices into PEFT's; VeRA starts equal by its key."""
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                stem, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
                parameter.copy_(ours[f"{stem}.lora.{rest[0].lower()}"])


def curve(model: Any, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_same_curve_as_peft(base: Path, shared: Path, method: str) -> None:
    model, twin = adapted(base, method), peft_twin(base, method)
    copy_start(twin, model)
    data = samples(shared, "train", model.tokenizer, 20, 48)
    collate = Collator.of(model.tokenizer)
    batches = [collate([data[2 * i], data[2 * i + 1]]) for i in range(10)]
    ours, theirs = curve(model, batches), curve(twin, batches)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] != pytest.approx(ours[0], abs=1e-3)
