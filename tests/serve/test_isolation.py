"""What a request is told does not depend on who else is served, and the linears compute their equation in any mix."""

from __future__ import annotations

import random
from collections.abc import Sequence as Sized

import pytest
import torch

from benchmarks.zoo.graphs import graph_of, randomised
from surgeon import run
from surgeon.passes import make
from surgeon.serve.bypass import pooled_bypass, view
from surgeon.serve.engine import Engine
from surgeon.serve.packed import FIRST_A, FIRST_B, LOW, OUT, PARTS, RANK, WIDTH, Packed
from surgeon.serve.pool import Pool
from surgeon.serve.sequence import Sequence

NEW = 4
STEPS = (
    make("lora", rank=1, targets="all-linear"),
    make("lora", rank=5, targets="all-linear"),
    make("dora", rank=3, targets="*.{q,v}_proj"),
    make("vera", rank=4, targets="all-linear"),
    make("prefix", tokens=3),
    make("prompt", tokens=2),
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(graph_of("llama"), pool_bytes=1 << 23)


@pytest.fixture(scope="module")
def adapters(engine: Engine) -> list[Packed | None]:
    made = [randomised(run.apply(engine.base, step), seed=number) for number, step in enumerate(STEPS)]
    return [None, *(engine.loader._packed(graph, f"adapter {number}") for number, graph in enumerate(made))]


def logits(engine: Engine, texts: Sized[tuple[str, Packed | None, list[int]]], chunk: int) -> dict[str, torch.Tensor]:
    """The logits after the last tokens of each text, whatever the model would have said."""
    running = []
    for owner, packed, text in texts:
        sequence = Sequence.of(owner, packed, text, 1)
        engine.admit(sequence)
        running.append((sequence, len(sequence.tokens)))
    found: dict[str, list[torch.Tensor]] = {owner: [] for owner, *_ in texts}
    while True:
        pieces = []
        for sequence, goal in running:
            left = goal - sequence.done
            count = min(chunk, left - NEW) if left > NEW else min(1, left)
            pieces += [(sequence, count)] if count else []
        if not pieces:
            break
        for owner, values in engine.step(pieces).items():
            found[owner].append(values)
    for sequence, _ in running:
        engine.release(sequence)
    return {owner: torch.stack(values[-NEW:]) for owner, values in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_a_request_in_any_mix_is_within_1e4_of_itself_alone(
    engine: Engine, adapters: list[Packed | None], seed: int
) -> None:
    draw = random.Random(seed)
    texts = []
    for number in range(draw.randint(3, 24)):
        text = [draw.randint(3, 99) for _ in range(draw.randint(NEW + 1, 20))]
        texts.append((f"{seed} {number}", draw.choice(adapters), text))
    together = logits(engine, texts, draw.choice((2, 7, 30)))
    for one in draw.sample(texts, 3):
        alone = logits(engine, [one], draw.choice((2, 7, 30)))[one[0]]
        assert (together[one[0]] - alone).abs().max() <= 1e-4


def dense(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, rows: torch.Tensor, line: list[int], scale: float
) -> torch.Tensor:
    """The equation of one adapter for its tokens."""
    a, b = (rows[line[first] : line[first] + line[RANK]] for first in (FIRST_A, FIRST_B))
    low = x @ view(pool, x.shape[-1])[a].T * scale
    if line[LOW] >= 0:
        low = low * view(pool, line[RANK])[rows[line[LOW]]]
    delta = low @ view(pool, y.shape[-1])[b]
    return y + (delta * view(pool, y.shape[-1])[rows[line[OUT]]] if line[OUT] >= 0 else delta)


@pytest.mark.parametrize("neighbours", [True, False], ids=["neighbours", "scattered"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_ranks_of_all_sizes_in_one_batch(neighbours: bool, dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(3)
    inp, out, ranks, counts = 12, 20, [1, 3, 0, 8, 33, 64], [1, 9, 2, 1, 1, 20]
    pool = torch.randn(60_000, generator=generator).to(dtype)
    lines, rows, scales = [], [], []
    for number, rank in enumerate(ranks):
        line = [-1] * WIDTH
        line[FIRST_A], line[FIRST_B], line[RANK], line[PARTS] = len(rows), len(rows) + rank, rank, 1
        for width in (inp, out):
            places = torch.randperm(60_000 // width - rank, generator=generator)
            rows += list(range(int(places[0]), int(places[0]) + rank)) if neighbours else places[:rank].tolist()
        if rank and number % 2:
            line[LOW], line[OUT] = len(rows), len(rows) + 1
            rows += [number, 7 * number]
        lines.append(line)
        scales.append(0.5 + number)
    owners = torch.tensor([-1, -1, *(who for who, count in enumerate(counts) for _ in range(count))])
    x, y = (torch.randn(len(owners), width, generator=generator).to(dtype) for width in (inp, out))
    numbers, table = torch.tensor(rows), torch.tensor(lines)
    found = pooled_bypass(y.clone(), x, None, pool, numbers, table, torch.tensor(scales), owners)
    assert torch.equal(found[:2], y[:2])
    exact = [t.double() for t in (y, x, pool)]
    for who, line in enumerate(lines):
        mine = owners == who
        wanted = dense(exact[0][mine], exact[1][mine], exact[2], numbers, line, scales[who])
        assert (found[mine].double() - wanted).abs().max() <= bound * wanted.abs().max(), ranks[who]


def test_a_pool_begins_with_zeros_and_may_be_written() -> None:
    pool = Pool(3, 700, torch.bfloat16)
    assert pool.data.shape == (2100,)
    assert not pool.data.any()
    pool.data[-1] = 2
    assert float(pool.data.sum()) == 2
