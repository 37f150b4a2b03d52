from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import surgeon
from benchmarks.zoo.graphs import graph_of, inputs_of, randomised
from surgeon import fold, run
from surgeon.errors import UsageError
from surgeon.module import load
from surgeon.normal import Base
from surgeon.passes import make
from surgeon.passes.dylora import DrawRank, DyLora, drawn
from surgeon.ranks import at_rank
from surgeon.replaced import Held


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_rank_is_the_lora_of_that_rank(rank: int, rslora: bool) -> None:
    options = {"alpha": 6.0, "rslora": rslora, "targets": "all-linear"}
    wide = randomised(run.apply(graph_of("llama"), make("dylora", rank=5, **options)))
    narrow = run.apply(graph_of("llama"), make("lora", rank=rank, **options))
    for item in fold.folds(wide):
        p, site = item.tensors(), item.site
        narrow.inserted[site.tensor("lora", "a")] = Held(p["a"][:rank])
        narrow.inserted[site.tensor("lora", "b")] = Held(p["b"][:, :rank])
    with torch.no_grad():
        found, expected = (load(g)(*inputs_of(g))[0] for g in (at_rank(wide, rank), narrow))
        merged = load(fold.fold(at_rank(wide, rank)))(*inputs_of(wide))[0]
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (merged - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_it_is_the_formula_in_numpy() -> None:
    graph = at_rank(randomised(run.apply(graph_of("gpt2"), make("dylora", rank=4, alpha=8, targets="all-linear"))), 3)
    rng = np.random.default_rng(0)
    for item in fold.folds(graph):
        site, p = item.site, {name: read().double().numpy() for name, read in item.params.items()}
        x, weight = rng.normal(size=(5, site.inp)), rng.normal(size=(site.out, site.inp))
        expected = x @ weight.T + 8 / 3 * (x @ p["a"][:3].T @ p["b"][:, :3].T)
        merged = item.normal(Base(lambda: torch.empty(0))).merged(torch.from_numpy(weight))
        assert np.abs(x @ merged.numpy().T - expected).max() <= 1e-6 * np.abs(expected).max()


def test_the_draw_depends_on_seed_and_step_alone_and_has_its_distribution() -> None:
    counts = collections.Counter(drawn(step, 7, 8, "uniform") for step in range(8000))
    assert set(counts) == set(range(1, 9))
    assert max(counts.values()) / min(counts.values()) < 1.3
    geometric = collections.Counter(drawn(step, 7, 8, "geometric") for step in range(8000))
    weights = np.array([0.2 * 0.8 ** (b - 1) for b in range(1, 9)])
    assert np.allclose([geometric[b] / 8000 for b in range(1, 9)], weights / weights.sum(), atol=0.02)
    mild = collections.Counter(drawn(step, 7, 8, "geometric:0.05") for step in range(8000))
    assert np.allclose([mild[b] / 8000 for b in (1, 8)], (0.05 * 0.95 ** np.array([0, 7])) / (1 - 0.95**8), atol=0.02)
    assert [drawn(step, 7, 8, "uniform") for step in range(50)] != [drawn(step, 8, 8, "uniform") for step in range(50)]


@pytest.mark.parametrize(("update", "first"), [("frozen", 2), ("nested", 0)])
def test_rows_that_rest_keep_their_bits_under_adamw(update: str, first: int) -> None:
    graph = randomised(run.apply(graph_of("llama"), make("dylora", rank=6, update=update)))
    model = load(graph).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    (step,) = graph.applied
    assert isinstance(step, DyLora)
    (hook,) = step.hooks(graph, "dylora", 0)
    assert isinstance(hook, DrawRank)
    warm = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for number in range(55):
        hook.before_step(model, number, 55)
        if number >= 5:  # five steps at any rank fill AdamW's moments, then b is fixed
            hook.rank = 3
            hook._activate(model, 3)
        if number == 5:
            warm = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        model(*inputs_of(graph))[0].square().mean().backward()
        hook.before_update(model, optimizer, number, 55)
        optimizer.step()
        hook.after_step(model, optimizer, number, 55)
        optimizer.zero_grad()
    hook.finish(model)
    for name, before in warm.items():
        after = dict(model.named_parameters())[name].detach()
        before, after = (before, after) if name.endswith(".a") else (before.T, after.T)
        assert torch.equal(after[:first], before[:first])
        assert torch.equal(after[3:], before[3:])
        assert not torch.equal(after[first:3], before[first:3])
    assert torch.equal(model.get_buffer("dylora.active"), torch.ones(6))


def test_training_fuses_it_as_it_fuses_lora() -> None:
    from surgeon.fuse import fused
    from surgeon.lean import bypassed

    graph = run.apply(graph_of("llama"), make("dylora", rank=4, targets="all-linear"))
    layer = next(iter(graph.layers.values()))
    calls = [len(node.args[1]) for node in fused(layer).nodes if node.target is bypassed]
    assert sorted(calls) == [1, 1, 2, 3]  # o, down, gate and up, q k v


def test_a_run_draws_resumes_and_ends_with_every_rank(shared: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "def add(a, b):\\n    return a + b\\n"}\n' * 8)
    from surgeon.train import train

    def model() -> Any:
        return surgeon.apply(shared / "models/pystdlib-llama", "dylora", rank=4, alpha=8, update="frozen")

    whole, halves = model(), model()
    options: dict[str, Any] = {"batch_size": 2, "lr": 1e-2, "progress": False, "steps": 6, "save_every": 3}
    train(whole, whole.tokenizer, data, out=tmp_path / "whole", **options)
    train(halves, halves.tokenizer, data, out=tmp_path / "halves", **options)
    import shutil

    shutil.rmtree(tmp_path / "halves/checkpoint-6")
    again = model()
    train(again, again.tokenizer, data, out=tmp_path / "halves", resume=True, **options)
    for name, p in whole.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name
    assert torch.equal(whole.get_buffer("dylora.active"), torch.ones(4))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"update": "froze"}, "update is 'froze'"),
        ({"distribution": "normal"}, "distribution is 'normal'"),
        ({"distribution": "geometric:1.5"}, "distribution is 'geometric:1.5'"),
        ({"ranks": (("*.q_proj", 2),)}, "one rank for all layers"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make("dylora", **options)
