"""Random models that hide nothing: every weight, bias, norm, gate and sink differs from zero and from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

_TASKS = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "base": transformers.AutoModel,
}


def build(config: PretrainedConfig, task: str = "causal-lm", seed: int = 0) -> PreTrainedModel:
    """An fp32 CPU model in eval mode with eager attention; `task` is one of `TASKS`; equal seeds give equal weights."""
    torch.manual_seed(seed)
    model: PreTrainedModel = _TASKS[task].from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise(model, seed)
    return model.eval()


TASKS = tuple(_TASKS)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Matrices ~ N(0, 1/in), vectors moved by N(0, 0.1²), constant saved buffers (router corrections) too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
        if parameter.dim() < 2 or parameter.numel() == max(parameter.shape) or "A_log" in name:
            parameter.add_(noise * 0.1)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    saved = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in saved and _constant(buffer):
            buffer.add_(torch.randn(buffer.shape, generator=generator).to(buffer.dtype) * 0.05)


def _constant(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and buffer.numel() > 0 and bool(((buffer == 0) | (buffer == 1)).all())


def save(model: PreTrainedModel, folder: str | Path) -> Path:
    """Write config and safetensors as a Hugging Face folder and return it."""
    model.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tokens(config: PretrainedConfig, batch: int, length: int, seed: int = 0, padding: int = 0) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, [batch, length], the first row left-padded; ids avoid the special ones."""
    generator = torch.Generator().manual_seed(seed)
    text = config.get_text_config(decoder=True)
    vocab: Any = getattr(text, "vocab_size", None) or 128
    ids = torch.randint(8, max(vocab - 40, 9), (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    pad = getattr(text, "pad_token_id", None) or 0
    return {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
