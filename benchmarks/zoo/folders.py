"""The tiny families as Hugging Face folders on disk, one per family and process, and their graphs, captured once."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.zoo import build, families
from benchmarks.zoo.graphs import config_of
from surgeon.graph import Graph
from surgeon.source import Source, open_graph, open_source

_GRAPHS: dict[Path, Graph] = {}


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="surgeon-zoo-")


@functools.cache
def folder_of(name: str, task: str = "") -> Path:
    """The family's random model on disk; `<family>-tied` is the same with its embeddings tied.

    `task` is the family's own if not given.
    """
    family = name.removesuffix("-tied")
    config = config_of(family, task) if task else families.tiny_config(family)
    config.tie_word_embeddings = config.tie_word_embeddings or family != name
    kind = "base" if task == "features" else task or families.task_of(family)
    return build.save(build.build(config, kind), Path(_root().name) / f"{name}{task}")


def save_wide(folder: Path, shard: str = "5GB") -> Path:
    """A Llama whose widths are multiples of 64, as bitsandbytes' blocks are, in files of at most a size."""
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard)
    return folder


def captured(source: Source, *, seed: int = 0) -> Graph:
    """The graph of a base with its values, as `surgeon.source.open_graph` gives it, captured once per folder.

    These models lack nothing that `seed` would be for; one with chosen classes or another context is captured anew.
    """
    if source.labels or source.context:
        return open_graph(source, seed=seed)
    if source.folder not in _GRAPHS:
        _GRAPHS[source.folder] = open_graph(source)
    return _GRAPHS[source.folder].copy()


def base_of(name: str, task: str = "") -> tuple[Path, Graph]:
    """The family's folder and graph."""
    return folder_of(name, task), captured(open_source(folder_of(name, task)))


def reference(folder: Path) -> Any:
    """The model that transformers loads from a folder."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder).eval()
