"""What stands beside the graph of an export: configs, the tokenizer and surgeon's own manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from surgeon.graph import Graph
from surgeon.lower.onnx import genai
from surgeon.lower.onnx.check import Replay
from surgeon.lower.onnx.profiles import FUSED, GQA, Profile
from surgeon.lower.onnx.verify import SCHEMA


def write_configs(graph: Graph, folder: Path, tokenizer: Any, dtype: torch.dtype) -> None:
    """config.json, generation_config.json of what generates, and the tokenizer, without a path of this machine."""
    config = type(graph.config).from_dict(graph.config.to_dict())
    config.dtype = dtype
    config._name_or_path = ""
    config.architectures = graph.config.architectures
    config.save_pretrained(folder)
    if tokenizer is not None:
        genai.write_tokenizer(tokenizer, folder)
    if graph.task not in ("causal-lm", "seq2seq-lm"):
        return
    stored = Path(graph.source, "generation_config.json") if graph.source else None
    if stored and stored.is_file():
        generation = transformers.GenerationConfig.from_pretrained(graph.source)
    else:
        generation = transformers.GenerationConfig.from_model_config(config)
    generation.save_pretrained(folder)


def manifest(graph: Graph, profile: Profile, precision: str, checked: Replay | None, model: str) -> dict[str, Any]:
    """What the export is, without a path of this machine."""
    return {
        "schema": SCHEMA,
        "target": "onnx",
        "model": model,
        "profile": profile.name,
        "precision": precision,
        "opset": profile.opset,
        "passes": [{"name": step.name, "options": step.options()} for step in graph.applied],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "agreement": "tokens agree if they are equal or their logits in torch differ by no more than twice the error",
        "verified": asdict(checked) if checked else None,
    }


def attention(kind: str, fallbacks: Mapping[str, list[str]], rotary: Mapping[str, list[str]]) -> dict[str, Any]:
    """The manifest's word on attention: what a runtime may do with the cache."""
    own = kind == GQA
    return {
        "operator": {GQA: "com.microsoft.GroupQueryAttention", FUSED: "Attention"}.get(kind, "standard"),
        "fallbacks": dict(fallbacks),
        "rotary": dict(rotary),
        "padding": "left or right",
        "past_present_share_buffer": own,
        "rows_that_continue_by_several_tokens": "one" if own else "any",
    }
