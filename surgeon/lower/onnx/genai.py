"""The files that ONNX Runtime GenAI reads beside the graph: genai_config.json and a tokenizer with its chat template.

The type "decoder" is GenAI's own for a graph with the usual names, whatever the architecture. Keys that GenAI does not
know are errors, so what surgeon knows of the export is in surgeon.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgeon import positions
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph, val
from surgeon.lower.onnx.adapter_file import is_slot
from surgeon.wiring import inputs_of

CONFIG = "genai_config.json"
ROOM = 4096
"""Tokens that GenAI makes room for unless it is told otherwise: it takes all of a shared cache at once."""
_PAST, _PRESENT = "past_key_values.", "present."


def check(graph: Graph) -> None:
    """Raise UnsupportedError for a model that GenAI does not generate with."""
    if graph.task == "seq2seq-lm":
        what = f"ONNX Runtime GenAI runs no encoder-decoder like {graph.config.model_type}"
        raise UnsupportedError(what, "--profile genai", "--profile ort, web or openvino")
    if graph.task != "causal-lm":
        what = f"ONNX Runtime GenAI generates text; {graph.config.model_type} is read for {graph.task}"
        raise UnsupportedError(what, "--profile genai", "--profile ort runs any model")


def write(graph: Graph, folder: Path, *, model: str, shared: bool) -> None:
    """Write genai_config.json.

    Args:
        graph: what was lowered, with its K/V cache.
        folder: where the graph's file is.
        model: the name of that file.
        shared: whether past and present may be one buffer, which GroupQueryAttention can and standard operators cannot.
    """
    (folder / CONFIG).write_text(json.dumps(config(graph, folder, model, shared), indent=2) + "\n")


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer's files; GenAI reads the chat template from tokenizer_config.json."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def config(graph: Graph, folder: Path, model: str, shared: bool) -> dict[str, Any]:
    """What genai_config.json says; special tokens are those of the folder's generation_config.json."""
    text = graph.config.get_text_config()
    named = dict(zip(graph.inputs, inputs_of(graph.trunk), strict=True))
    keys = [val(node) for name, node in named.items() if name.startswith(_PAST) and name.endswith(".key")]
    length = int(positions.limit(graph) or ROOM)
    decoder: dict[str, Any] = {
        "session_options": {"provider_options": []},
        "filename": model,
        "head_size": int(keys[0].shape[3]),
        "hidden_size": int(text.hidden_size),
        "num_attention_heads": int(text.num_attention_heads),
        "num_hidden_layers": len(keys),
        "num_key_value_heads": int(keys[0].shape[1]),
        "inputs": {name: name for name in named if not (name.startswith(_PAST) or is_slot(name))}
        | {f"past_{word}_names": f"{_PAST}%d.{word}" for word in ("key", "value")},
        "outputs": {"logits": "logits"}
        | {f"present_{word}_names": f"{_PRESENT}%d.{word}" for word in ("key", "value")},
    }
    search = {
        "do_sample": False,
        "max_length": min(length, ROOM),
        "past_present_share_buffer": shared,
    }
    made = {"type": "decoder", "vocab_size": int(text.vocab_size), "context_length": length}
    return {"model": {**made, **_special(graph, folder), "decoder": decoder}, "search": search}


def _special(graph: Graph, folder: Path) -> dict[str, Any]:
    """The special tokens; where none pads, the first that ends."""
    file = folder / "generation_config.json"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    text = graph.config.get_text_config()
    found = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = stored.get(name)
        value = getattr(text, name, None) if value is None else value
        if value is not None:
            found[name] = value
    ends = found.get("eos_token_id")
    if "pad_token_id" not in found and ends is not None:
        found["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    return found
