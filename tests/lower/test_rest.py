"""A merge of what folds and what does not: the weights, the rest beside them, and the two opened together again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from benchmarks.zoo.folders import base_of, reference
from benchmarks.zoo.graphs import inputs_of, randomised
from surgeon import api, fold, run, store
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph
from surgeon.lower import rest
from surgeon.model import load_model
from surgeon.passes import make
from surgeon.source import open_source

pytestmark = pytest.mark.usefixtures("one_capture_per_config")


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "modules_to_save": "lm_head"},
    "prefix": {"tokens": 3, "hidden": 6},
    "prompt": {"tokens": 4, "init": "normal"},
}
STACKS = {
    "lora-prefix": ("lora", "prefix"),
    "prompt-lora": ("prompt", "lora"),
    "prefix-lora-prompt": ("prefix", "lora", "prompt"),
}


def stacked(names: tuple[str, ...]) -> Graph:
    graph = base_of("llama")[1]
    return randomised(run.apply(graph, *(make(name, **OPTIONS[name]) for name in names)))


@torch.no_grad()
def logits(graph: Graph) -> torch.Tensor:
    result: torch.Tensor = load_model(graph).run(graph.trunk, *inputs_of(graph))[0]
    return result


@pytest.mark.parametrize("stack", STACKS)
def test_the_rest_lies_beside_and_is_put_on_again(stack: str, tmp_path: Path) -> None:
    graph, out = stacked(STACKS[stack]), tmp_path / "merged"
    left = tuple(name for name in STACKS[stack] if name != "lora")
    merged = api.merge_folder(graph, open_source(graph.source), out)
    assert merged.rest == left
    assert merged.comparison is not None
    assert merged.comparison.ok
    record = json.loads((out / "surgeon.json").read_text())
    assert record["rest"] == {"folder": "adapter", "adapters": list(left)}
    again = api.read(out)
    assert [step.name for step in again.applied] == list(left)
    assert torch.allclose(logits(again), logits(graph), atol=1e-4)
    assert not fold.folds(again)
    assert again.trainable()  # the MLP too: what was left can be trained on
    moved = out.rename(tmp_path / "moved")
    assert torch.equal(logits(api.read(moved)), logits(again))
    base = open_source(graph.source).checkpoint
    with torch.no_grad():
        plain = reference(moved)(**dict(zip(graph.inputs, inputs_of(graph), strict=True))).logits
    assert not torch.allclose(plain, logits(graph), atol=1e-3)
    assert json.loads((moved / "config.json").read_text())["architectures"] == base.config["architectures"]


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_peft_puts_the_rest_on_the_merged_weights(tmp_path: Path) -> None:
    graph, out = stacked(("lora", "prefix")), tmp_path / "merged"
    api.merge_folder(graph, open_source(graph.source), out, verify=False)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out)
    model = peft.PeftModel.from_pretrained(reference(out), out / "adapter").eval()
    ids, mask = inputs_of(graph)[:2]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids, attention_mask=mask).logits, logits(graph), atol=1e-4)


def test_a_prefix_alone_is_a_copy_and_an_adapter(tmp_path: Path) -> None:
    graph, out = stacked(("prefix",)), tmp_path / "merged"
    merged = api.merge_folder(graph, open_source(graph.source), out)
    assert (merged.rest, merged.written.merged) == (("prefix",), ())
    assert torch.equal(logits(api.read(out)), logits(graph))


def test_strict_refuses_and_writes_nothing(tmp_path: Path) -> None:
    graph, out = stacked(("lora", "prefix")), tmp_path / "merged"
    with pytest.raises(UnsupportedError, match="prefix cannot be folded") as caught:
        api.merge_folder(graph, open_source(graph.source), out, strict=True)
    assert len(str(caught.value).splitlines()) == 3
    assert not out.exists()
    assert rest.left_over(graph) == ("prefix",)


def test_an_adapter_of_other_weights_is_refused(tmp_path: Path) -> None:
    graph, out = stacked(("lora", "prefix")), tmp_path / "merged"
    api.merge_folder(graph, open_source(graph.source), out, verify=False)
    with pytest.raises(Exception, match="not the base that the adapter was made for"):
        store.load(out / "adapter", base=graph.source)


def test_a_trained_head_is_in_both(tmp_path: Path) -> None:
    base = base_of("bert")[1]
    graph, out = randomised(run.apply(base, make("ptuning_v2", tokens=3))), tmp_path / "merged"
    merged = api.merge_folder(graph, open_source(graph.source), out)
    assert merged.rest == ("ptuning_v2",)
    assert set(merged.written.merged) == {"classifier.weight", "classifier.bias"}
    again = api.read(out)
    assert torch.allclose(logits(again), logits(graph), atol=1e-5)
    assert any(name.startswith("classifier") for name in again.trainable())
