"""Two processes that share a model say what one says, with adapters of every kind."""

from __future__ import annotations

import multiprocessing
import os
import socket
from typing import Any

import pytest
import torch

from benchmarks.zoo.graphs import graph_of
from surgeon.errors import UnsupportedError, UsageError
from surgeon.serve import partition
from surgeon.serve.engine import Engine
from surgeon.serve.open import engine_of
from surgeon.serve.parallel import Follower, Told
from surgeon.serve.partition import COLUMN, ROW, Share
from surgeon.serve.shared import join
from tests.serve.test_engine import METHODS, NEW, adapted, go

POOL = 112_000
CHOSEN = (0, 1, 2, 4, 7, 8, 9, 11, 13, 14, 15)
PROMPTS = [[3 + (7 * i + j) % 90 for j in range(2 + i % 5)] for i in range(len(CHOSEN))]


def said(engine: Engine, share: bool) -> list[list[int]]:
    """Greedy tokens of batches with every adapter, some of which come back to the pool."""
    from surgeon.serve.sequence import Sequence

    packed = [adapted(engine, METHODS[i], i)[1] for i in CHOSEN]
    if share:
        assert isinstance(engine, Told)
        packed = [engine.loader.splitter.cut(one) if one is not None else None for one in packed]
    found = []
    for turn, chosen in enumerate((range(7), range(6, 11), (2, 4, 5, 7), (10, 1, 9, 5, 0))):
        sequences = [Sequence.of(f"{turn} {i}", packed[i], list(PROMPTS[i]), NEW) for i in chosen]
        for sequence in sequences:
            engine.admit(sequence)
        go(engine, sequences)
        found += [sequence.tokens for sequence in sequences]
        for sequence in sequences:
            engine.release(sequence)
    first = next(one for one in packed if one is not None)
    engine.memory.drop(first.key)
    assert engine.memory.prefetch(first)
    assert engine.memory.promised == 0
    return found


def process(rank: int, port: int, results: Any) -> None:
    """One of two processes."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    engine = engine_of(graph_of("llama"), share=join(2), pool_bytes=POOL)
    if rank:
        Follower(engine).run()
        results.put(("resident", sorted(engine.memory.residents)))
        return
    tokens = said(engine, share=True)
    results.put(("resident", sorted(engine.memory.residents)))
    results.put(("tokens", tokens, engine.memory.evictions))
    engine.stop()


def test_two_processes_say_what_one_says() -> None:
    graph_of("llama")  # captured once, before the processes part
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    running = [context.Process(target=process, args=(rank, port, results), daemon=True) for rank in range(2)]
    for one in running:
        one.start()
    found = [results.get(timeout=150) for _ in range(3)]
    for one in running:
        one.join(60)
        assert one.exitcode == 0
    residents = [line[1] for line in found if line[0] == "resident"]
    assert residents[0] == residents[1]
    _, tokens, evictions = next(line for line in found if line[0] == "tokens")
    assert evictions > 0
    assert tokens == said(Engine(graph_of("llama"), pool_bytes=1 << 24), share=False)


def test_who_is_split_how() -> None:
    found = partition.roles(graph_of("llama"), 2)
    layer = {path.removeprefix("model.layers.0."): role for path, role in found.items() if ".0." in path}
    assert layer == {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), COLUMN),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), COLUMN),
        **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), ROW),
    }


@pytest.mark.slow
def test_experts_are_whole_and_norms_of_a_head_are_no_hindrance() -> None:
    experts = partition.roles(graph_of("mixtral"), 2)
    assert experts
    assert not any("experts" in path or "gate" in path for path in experts)
    assert partition.roles(graph_of("qwen3"), 2)["model.layers.0.self_attn.o_proj"] == ROW


@pytest.mark.parametrize("family", ["gpt2", pytest.param("olmo2", marks=pytest.mark.slow)])
def test_attentions_that_cannot_be_split_are_refused(family: str) -> None:
    """GPT-2 has q, k and v in one matrix, OLMo 2 a norm over all heads."""
    with pytest.raises(UnsupportedError, match="cannot be split by heads"):
        partition.roles(graph_of(family), 2)


def test_what_does_not_divide_or_is_alone_is_refused_in_three_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError) as refused:
        partition.roles(graph_of("llama"), 3)
    assert refused.value.what == "4 query heads and 2 K/V heads cannot be split over 3"
    assert refused.value.where == "model.layers.0.self_attn"
    assert "a number that divides both" in refused.value.hint
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError) as alone:
        join(2)
    assert alone.value.what == "2 processes are needed, and this one is alone"
    assert alone.value.hint.startswith("torchrun --nproc-per-node 2 -m surgeon serve")
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="torchrun started 4 processes, and 2 were asked for"):
        join(2)
    with pytest.raises(UsageError, match="leave --targets out"):
        Engine(graph_of("llama"), pool_bytes=1 << 20, targets="*.q_proj", share=Share(0, 2))
    with pytest.raises(UnsupportedError, match="leave --quantise out"):
        engine_of(graph_of("llama"), "nf4", pool_bytes=1 << 20, share=Share(1, 2))
