"""First values from data: the directions of a layer's inputs, and how ranks are shared out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.zoo.graphs import close, graph_of, model_of, outputs_of, randomised
from surgeon import eva, fold, run
from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.passes import make
from surgeon.passes.lora import Lora
from surgeon.planning import plan
from surgeon.run import chosen_sites

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"


def batches(*_: Any, count: int = 6) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        mask = torch.ones(4, 9, dtype=torch.long)
        mask[1, 6:] = 0
        ids = torch.randint(3, 112, (4, 9), generator=generator)
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids}


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(eva, "batches", batches)
    return "eva:data.jsonl"


def seen(path: str) -> torch.Tensor:
    """What transformers' module sees of these batches, without padding."""
    rows: list[torch.Tensor] = []
    model = model_of("llama")
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, y: rows.append(args[0]))
    masks = []
    for batch in batches():
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        masks.append(batch["attention_mask"].flatten().bool())
    handle.remove()
    return torch.cat([x.flatten(0, 1)[mask] for x, mask in zip(rows, masks, strict=True)])


@pytest.mark.parametrize("path", [Q, DOWN])
def test_directions_are_the_right_singular_vectors(path: str) -> None:
    graph = graph_of("llama")
    chosen, _ = chosen_sites(graph, Lora(targets=path))
    size = chosen[0].inp
    found = eva.directions(graph, chosen, {path: size}, batches())[path]  # all of them: nothing is forgotten
    _, s, vt = torch.linalg.svd(seen(path).double(), full_matrices=False)
    assert torch.allclose(found.values.double(), s, rtol=1e-3, atol=1e-3)
    assert ((found.vectors[:4].double() * vt[:4]).sum(1).abs() > 0.999).all()
    assert sum(found.shares) == pytest.approx(1, rel=1e-4)


def test_few_directions_of_many_batches_are_nearly_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 5, generator=generator) @ torch.randn(5, 40, generator=generator) * 3
    rows += torch.randn(300, 40, generator=generator) * 0.1
    one = eva.Directions.of(5, 40)
    for part in rows.split(50):
        one.add(part)
    _, s, vt = torch.linalg.svd(rows, full_matrices=False)
    assert torch.allclose(one.values[:5], s[:5], rtol=1e-2)
    assert torch.allclose((one.vectors[:5] @ vt[:5].t()).abs().diagonal(), torch.ones(5), atol=1e-2)
    for _ in range(2):
        one.add(rows)
    assert one.settled


def test_ranks_go_where_directions_explain_most() -> None:
    shares = {"a": [0.5, 0.3, 0.1], "b": [0.2, 0.01, 0.0], "c": [0.9, 0.05, 0.04]}
    assert eva.distributed(shares, 6) == {"a": 3, "b": 1, "c": 2}
    assert eva.distributed(shares, 3) == {"a": 1, "b": 1, "c": 1}


def applied(init: str, **options: Any) -> Graph:
    step = make("lora", **{"rank": 4, "targets": "q_proj k_proj up_proj down_proj", "init": init, **options})
    return run.apply(graph_of("llama"), step)


def test_the_adapter_begins_in_these_directions(data: str) -> None:
    graph = applied(data)
    step = graph.applied[0]
    assert isinstance(step, Lora)
    assert step.init == "eva"
    ranks = {n.removesuffix(".lora.a"): s.shape[0] for n, s in graph.trainable().items() if n.endswith(".a")}
    assert sum(ranks.values()) == 4 * len(ranks)
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    _, _, vt = torch.linalg.svd(seen(Q), full_matrices=False)
    a = graph.inserted[f"{Q}.lora.a"]()
    assert torch.allclose(a @ a.t(), torch.eye(len(a)), atol=1e-4)
    assert abs(float(a[0] @ vt[0])) > 0.99
    assert close(outputs_of(graph), outputs_of(graph_of("llama")))
    assert {round(item.step.scale, 6) for item in fold.folds(graph)} == {4.0}  # type: ignore[attr-defined]
    trained = randomised(graph)
    assert close(outputs_of(fold.fold(trained)), outputs_of(trained))
    assert not [name for name in graph.inserted if name.endswith(eva.FIRST)]


def test_rho_of_one_leaves_the_ranks(data: str) -> None:
    graph = applied(data, rho=1.0)
    assert {s.shape[0] for n, s in graph.trainable().items() if n.endswith(".a")} == {4}


def test_read_again_it_needs_no_data(data: str) -> None:
    graph = applied(data)
    again = run.apply(graph_of("llama"), make("lora", **graph.applied[0].options()))
    assert again.text() == graph.text()
    assert again.tensors == graph.tensors


def test_a_plan_of_a_config_alone_has_the_ranks_as_they_are(data: str) -> None:
    import dataclasses

    bare = dataclasses.replace(graph_of("llama"), values={})
    step = make("lora", rank=4, init=data, targets="q_proj")
    assert {site.rank for site in plan(bare, step).sites} == {4}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"init": "eva"}, "init is 'eva'"),
        ({"init": "eva:x.jsonl", "rho": 0.5}, "rho 0.5"),
        ({"init": "eva:nowhere.jsonl"}, "no tokenizer"),
    ],
)
def test_what_cannot_be_is_said_in_three_lines(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        applied(**options)
    assert len(str(caught.value).splitlines()) == 3


def test_more_directions_than_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    monkeypatch.setattr(eva, "batches", lambda graph, file: iter([few]))
    with pytest.raises(UsageError, match="the data has 2 tokens, and 8 directions are wanted"):
        applied("eva:data.jsonl")


def test_a_file_of_samples(shared: Path, tmp_path: Path) -> None:
    from benchmarks.zoo.folders import captured
    from surgeon.source import open_source

    graph = captured(open_source(shared / "models" / "pystdlib-llama"))
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join((shared / "data" / "c_headers.train.jsonl").read_text().splitlines()[:4]))
    made = run.apply(graph, make("lora", rank=2, init=f"eva:{file}", targets="model.layers.0.self_attn.q_proj"))
    a = made.inserted["model.layers.0.self_attn.q_proj.lora.a"]()
    assert torch.allclose(a @ a.t(), torch.eye(2), atol=1e-4)
