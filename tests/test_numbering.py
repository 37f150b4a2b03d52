"""Positions where the user gives none: as Hugging Face's models count for themselves."""

from __future__ import annotations

import pytest
import torch

from benchmarks.zoo.graphs import graph_of, model_of, randomised
from surgeon import numbering, run
from surgeon.errors import UsageError
from surgeon.generate import generator
from surgeon.model import load_model
from surgeon.passes import make

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("family", "task", "padding"), [("llama", None, 0), ("opt", None, 0), ("roberta", "features", 1)]
)
@torch.no_grad()
def test_a_padded_batch_is_counted_as_the_model_does(family: str, task: str | None, padding: int) -> None:
    ids = torch.randint(3, 112, (2, 5)).masked_fill(MASK == 0, padding)
    given = {"input_ids": ids, "attention_mask": MASK}
    found = load_model(graph_of(family, task))(**given).to_tuple()
    expected = model_of(family, task)(**given)[0]
    assert (next(value for value in found if value is not None) - expected)[MASK.bool()].abs().max() <= 1e-5


def test_each_way_of_counting() -> None:
    ids = torch.tensor([[1, 1, 7, 8, 9], [7, 8, 9, 1, 1]])
    roberta, opt = graph_of("roberta", "features"), graph_of("opt")
    assert numbering.default(graph_of("llama"), MASK).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert numbering.default(opt, MASK).tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, -1, -1]]
    assert numbering.default(roberta, MASK, ids).tolist() == [[1, 1, 2, 3, 4], [2, 3, 4, 1, 1]]
    assert numbering.default(roberta, MASK, ids, virtual=3).tolist() == [[2, 3, 4, 5, 6]] * 2
    assert numbering.first(run.apply(roberta, make("prompt", tokens=3))) == 2


def test_virtual_tokens_are_not_counted_as_text() -> None:
    model = generator(load_model(randomised(run.apply(graph_of("llama"), make("prompt", tokens=3)))))
    ids, cache = torch.tensor([[5, 6, 7, 8]]), model.new_cache()
    whole = model(ids).logits
    model(ids[:, :3], past_key_values=cache)
    assert cache.get_seq_length() == 3
    assert cache.layers[0].keys.shape[2] == 6
    last = model(ids[:, 3:], past_key_values=cache).logits
    assert torch.allclose(last[:, -1], whole[:, -1], atol=1e-5)
    cache.crop(-2)
    assert cache.get_seq_length() == 2
    again = model(ids[:, 2:], past_key_values=cache).logits
    assert torch.allclose(again, whole[:, 2:], atol=1e-5)


def test_a_cache_that_would_count_them_is_refused() -> None:
    from transformers import DynamicCache

    model = generator(load_model(run.apply(graph_of("llama"), make("prompt", tokens=3))))
    with pytest.raises(UsageError, match="counts virtual tokens as text") as caught:
        model(torch.tensor([[5, 6]]), past_key_values=DynamicCache())
    assert caught.value.hint == "model.new_cache()"
