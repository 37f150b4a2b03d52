"""Adapters of every kind that PEFT trains, moved at random and written by PEFT itself, and its own models of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch

TOKENS = 3
STD = 0.1
_LINEARS = {
    "gpt2": (["c_attn", "c_proj"], ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_neox": (["query_key_value", "dense"], ["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "opt": (["q_proj", "fc2"], ["k_proj", "v_proj", "fc2"], ["fc2"]),
    "phi": (["q_proj", "fc2"], ["k_proj", "v_proj", "fc2"], ["fc2"]),
    "phi3": (["qkv_proj", "down_proj"], ["qkv_proj", "down_proj"], ["down_proj"]),
    "mixtral": (["q_proj", "o_proj"], ["k_proj", "v_proj"], []),
}
"""Family → the linears of factors, those of IA³, and those of IA³ whose input is scaled; others are as Llama's."""
_LLAMA = (["q_proj", "v_proj", "down_proj"], ["k_proj", "v_proj", "down_proj"], ["down_proj"])
KINDS = (
    "lora", "rslora", "dora", "adalora", "vera", "ia3", "loha", "prefix", "p-tuning-v2", "prompt", "p-tuning"
)  # fmt: skip


def config_of(kind: str, family: str) -> peft.PeftConfig:
    """PEFT's config of a kind of adapter for a family."""
    names, scaled, inputs = _LINEARS.get(family, _LLAMA)
    task = "CAUSAL_LM"
    if kind in ("lora", "rslora", "dora"):
        switches = {"use_rslora": kind == "rslora", "use_dora": kind == "dora"}
        return peft.LoraConfig(task_type=task, r=4, lora_alpha=8, target_modules=names, **switches)
    if kind == "adalora":
        return peft.AdaLoraConfig(task_type=task, init_r=4, target_r=2, total_step=10, target_modules=names)
    if kind == "vera":
        return peft.VeraConfig(task_type=task, r=8, target_modules=names[:1])
    if kind == "loha":
        return peft.LoHaConfig(task_type=task, r=2, alpha=4, target_modules=names)
    if kind == "ia3":
        return peft.IA3Config(task_type=task, target_modules=scaled, feedforward_modules=inputs)
    if kind in ("prefix", "p-tuning-v2"):
        wide: Any = {"prefix_projection": True, "encoder_hidden_size": 8} if kind != "prefix" else {}
        return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=TOKENS, **wide)
    if kind == "prompt":
        return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=TOKENS)
    return peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=TOKENS, encoder_hidden_size=8)


@torch.no_grad()
def made(model: Any, kind: str, family: str, folder: Path, *, seed: int = 0, std: float = STD) -> Any:
    """PEFT's model with an adapter of this kind, moved at random, and saved in a folder of its own."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    theirs: Any = peft.get_peft_model(model, config_of(kind, family)).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape) * std)
    theirs.save_pretrained(folder)
    return theirs


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """PEFT's logits of a text `[b, t]`, computed at once; those of virtual tokens left out."""
    found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found[:, -ids.shape[1] :]
