"""Adapters of one kind are read by the moves that the first one taught: the same rows, or the same refusal."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.zoo.graphs import graph_of, randomised
from surgeon import peft_files, run
from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.passes import make
from surgeon.passes.base import Adapter, Pass
from surgeon.serve.adapters import Loader
from surgeon.serve.engine import Engine
from surgeon.serve.layout import Layout
from surgeon.serve.packed import Packed

MOVED = {
    "lora": make("lora", rank=3, targets="all-linear"),
    "rslora": make("lora", rank=2, rslora=True, targets="*.{q,v}_proj"),
    "ranks": make("lora", rank=2, ranks=(("*.q_proj", 4),), targets="*.{q,v}_proj"),
    "biases": make("lora", rank=2, bias="sites"),
    "dylora": make("dylora", rank=4),
    "prompt": make("prompt", tokens=3, init="normal"),
}
COMPUTED = {
    "dora": make("dora", rank=2),
    "vera": make("vera", rank=4),
    "adalora": make("adalora", rank=3),
    "prefix": make("prefix", tokens=3),
}


@pytest.fixture(scope="module")
def base() -> Graph:
    return graph_of("opt")


@functools.cache
def layout() -> Layout:
    return Engine(graph_of("opt"), pool_bytes=1 << 20).loader.layout


def loader(base: Graph, dtype: torch.dtype = torch.float32) -> Loader:
    return Loader(base, layout(), dtype)


def written(base: Graph, step: Pass, seed: int, folder: Path) -> Path:
    graph = randomised(run.apply(base, step), seed=seed, std=0.05)
    applied = graph.applied[-1]
    assert isinstance(applied, Adapter)
    (owner,) = (owner for owner in run.owners(graph.applied))
    peft_files.write_adapter(graph, owner, applied, folder)
    return folder


def same(first: Packed, second: Packed) -> None:
    assert list(first.rows) == list(second.rows)
    assert all(torch.equal(first.rows[width], second.rows[width]) for width in first.rows)
    assert torch.equal(first.table, second.table)
    assert torch.equal(first.scales, second.scales)
    assert (first.key, first.virtual, first.shift, first.column_bias) == (
        second.key, second.virtual, second.shift, second.column_bias,
    )  # fmt: skip
    assert first.columns.keys() == second.columns.keys()
    assert first.nbytes == second.nbytes


@pytest.mark.parametrize("name", [*MOVED, *COMPUTED])
def test_the_second_of_a_kind_is_what_it_is_alone(base: Graph, name: str, tmp_path: Path) -> None:
    folders = [written(base, {**MOVED, **COMPUTED}[name], seed, tmp_path / str(seed)) for seed in range(3)]
    taught = loader(base)
    for folder in folders:
        same(taught.load(folder, "one"), loader(base).load(folder, "one"))
    (known,) = taught._moves.values()
    assert (known is not None) == (name in MOVED)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pool", [torch.float32, torch.bfloat16])
def test_numbers_of_half_precision(base: Graph, stored: torch.dtype, pool: torch.dtype, tmp_path: Path) -> None:
    taught = loader(base, pool)
    for seed in range(2):
        folder = written(base, MOVED["lora"], seed, tmp_path / str(seed))
        file = folder / peft_files.WEIGHTS
        save_file({key: tensor.to(stored) for key, tensor in load_file(file).items()}, file)
        same(taught.load(folder, "one"), loader(base, pool).load(folder, "one"))
    assert all(taught._moves.values())


def test_another_rank_or_scale_is_another_kind(base: Graph, tmp_path: Path) -> None:
    taught = loader(base)
    steps = [make("lora", rank=2), make("lora", rank=3), make("lora", rank=3, alpha=7.0)]
    for number, step in enumerate(steps):
        for seed in range(2):
            folder = written(base, step, seed, tmp_path / f"{number} {seed}")
            same(taught.load(folder, "one"), loader(base).load(folder, "one"))
    assert len(taught._moves) == 3


@pytest.mark.parametrize("bad", ["nan", "inf", "cut", "longer", "gone"])
def test_a_bad_file_is_refused_as_ever(base: Graph, bad: str, tmp_path: Path) -> None:
    taught = loader(base)
    for seed in range(2):
        folder = written(base, MOVED["lora"], seed, tmp_path / str(seed))
        taught.load(folder, "one") if not seed else None
    file = folder / peft_files.WEIGHTS
    if bad in ("nan", "inf"):
        tensors = load_file(file)
        list(tensors.values())[-1].view(-1)[-1] = float(bad)
        save_file(tensors, file, metadata={"format": "pt"})
    elif bad == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-4] if bad == "cut" else file.read_bytes() + b"four")
    with pytest.raises(UsageError) as refused:
        taught.load(folder, "one")
    with pytest.raises(UsageError) as alone:
        loader(base).load(folder, "one")
    assert str(refused.value) == str(alone.value)
