from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.zoo.folders import base_of, folder_of, reference
from benchmarks.zoo.graphs import randomised
from surgeon import api, run, store
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph
from surgeon.lower.bake import bake
from surgeon.model import load_model
from surgeon.passes import make
from surgeon.source import open_source

TOKENS = 3
FAMILIES = ["llama", "gpt2", "gemma2", "t5", "bart"]


@functools.cache
def prompted(family: str) -> Graph:
    return randomised(run.apply(base_of(family)[1], make("prompt", tokens=TOKENS)))


def texts(family: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 112, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 4 + [0] * 2, [1] * 6])
    more = {"decoder_input_ids": ids[:, :4]} if family in ("t5", "bart") else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_plain_model_computes_it_from_the_new_words(family: str, tmp_path: Path) -> None:
    graph, given = prompted(family), texts(family)
    baked = bake(graph, open_source(folder_of(family)), tmp_path / "baked")
    assert baked.ids == tuple(range(112, 112 + TOKENS))
    assert baked.max_error <= 1e-5
    model: Any = reference(tmp_path / "baked")
    assert model.config.vocab_size == 112 + TOKENS
    words = torch.tensor(baked.ids).expand(2, -1)
    mask = torch.nn.functional.pad(given["attention_mask"], (TOKENS, 0), value=1)
    theirs = model(**given | {"input_ids": torch.cat([words, given["input_ids"]], 1), "attention_mask": mask}).logits
    ours = load_model(graph)(**given).logits
    found = theirs[:, -ours.shape[1] :, :112]
    seen = given["attention_mask"].bool() if family not in ("t5", "bart") else torch.ones(2, 4).bool()
    assert (found - ours)[seen].abs().max() <= 1e-5
    generated = model.generate(torch.cat([words, given["input_ids"]], 1), max_new_tokens=6, pad_token_id=0)
    new = generated[:, 1:] if family in ("t5", "bart") else generated[:, TOKENS + 6 :]
    assert not torch.isin(new, words.contiguous()).any()


def test_what_has_no_words_is_refused(tmp_path: Path) -> None:
    base, source = base_of("llama")[1], open_source(folder_of("llama"))
    both = randomised(run.apply(base, make("prompt", tokens=TOKENS), make("lora")))
    with pytest.raises(UnsupportedError, match="one prompt can be baked") as caught:
        bake(both, source, tmp_path / "baked")
    assert "adapter beside" in caught.value.hint
    t5 = run.apply(base_of("t5")[1], make("prompt", tokens=TOKENS, side="decoder"))
    with pytest.raises(UnsupportedError, match="prompt of the decoder"):
        bake(t5, open_source(folder_of("t5")), tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_what_folds_is_merged_before(tmp_path: Path) -> None:
    both = randomised(run.apply(base_of("llama")[1], make("lora"), make("prompt", tokens=TOKENS)))
    store.save(both, tmp_path / "work")
    merged = api.bake(tmp_path / "work", tmp_path / "merged")
    assert merged.tokens == ("<prompt_0>", "<prompt_1>", "<prompt_2>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "work"]
    given = texts("llama")
    words = torch.tensor(merged.ids).expand(2, -1)
    with torch.no_grad():
        ours = load_model(both)(input_ids=given["input_ids"]).logits
        theirs = reference(tmp_path / "merged")(torch.cat([words, given["input_ids"]], 1)).logits
    assert (theirs[:, TOKENS:, :112] - ours).abs().max() <= 1e-5
