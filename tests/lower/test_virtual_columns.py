"""A prompt as the keys and values it comes to: the same function, and refused where those are no constants."""

from __future__ import annotations

import pytest
import torch

from benchmarks.zoo.graphs import graph_of, inputs_of, randomised
from surgeon import fold, run
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph
from surgeon.lower.virtual_columns import as_columns
from surgeon.passes import make
from surgeon.stream import StreamingExecutor


def prompted(family: str, *first: str) -> Graph:
    steps = [make(name, tokens=3) for name in first]
    return randomised(run.apply(graph_of(family), *steps, make("prompt", tokens=4, init="normal")), std=0.5)


@pytest.mark.parametrize(
    ("family", "first"),
    [
        pytest.param("gemma2", (), id="gemma2"),
        pytest.param("gemma2", ("prefix",), id="prefix-gemma2", marks=pytest.mark.slow),
        pytest.param("bloom", (), id="bloom", marks=pytest.mark.slow),
        pytest.param("gpt2", (), id="gpt2", marks=pytest.mark.slow),
    ],
)
def test_columns_compute_what_the_rows_do(family: str, first: tuple[str, ...]) -> None:
    graph = prompted(family, *first)
    made = as_columns(graph)
    assert [step.name for step in made.applied] == [*first, "prefix"]
    assert fold.rows(made) == []
    inputs = inputs_of(graph)
    expected, found = (StreamingExecutor(one)(*inputs)[0] for one in (graph, made))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_left_padding_is_not_seen() -> None:
    made = as_columns(prompted("llama"))
    ids, mask, positions = inputs_of(made)
    mask[0, :3] = 0
    whole = StreamingExecutor(made)(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))[0]
    alone = StreamingExecutor(made)(ids[:1, 3:], mask[:1, 3:], positions[:1, :-3])[0]
    assert torch.allclose(whole[:1, 3:], alone, atol=1e-4)


def test_without_a_prompt_nothing_changes() -> None:
    graph = graph_of("gemma2")
    assert as_columns(graph) is graph


def test_rotary_embeddings_that_depend_on_the_length_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = prompted("gemma2")
    monkeypatch.setattr(graph.config, "rope_parameters", {"rope_type": "longrope"})
    with pytest.raises(UnsupportedError, match="depends on the length of the text") as caught:
        as_columns(graph)
    assert len(str(caught.value).splitlines()) == 3
    assert "prompt has no constant keys and values in gemma2" in caught.value.what
