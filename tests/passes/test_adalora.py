from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator

from benchmarks.zoo.folders import base_of, captured, reference
from benchmarks.zoo.graphs import graph_of, inputs_of, randomised
from benchmarks.zoo.oracles import assert_merged_alike
from surgeon import fold, run, store
from surgeon.allocation import AllocateRanks
from surgeon.errors import UsageError
from surgeon.fuse import fused
from surgeon.lean import bypassed
from surgeon.model import load_model
from surgeon.module import load
from surgeon.normal import Base
from surgeon.passes import make
from surgeon.passes.base import Adapter

ROOT = "base_model.model."


@pytest.mark.parametrize("left", [2, 0])
def test_it_is_the_formula_in_numpy(left: int) -> None:
    step = make("adalora", rank=4, alpha=6, targets="all-linear", ranks=(("*.h.0.*", left),))
    graph = randomised(run.apply(graph_of("gpt2"), step))
    rng = np.random.default_rng(0)
    seen = set()
    for item in fold.folds(graph):
        site, p = item.site, {name: read().double().numpy() for name, read in item.params.items()}
        x, weight = rng.normal(size=(5, site.inp)), rng.normal(size=(site.out, site.inp))
        expected = x @ weight.T + 6 / (4 + 1e-5) * (((x @ p["a"].T) * p["e"].T) @ p["b"].T)
        merged = item.normal(Base(lambda: torch.empty(0))).merged(torch.from_numpy(weight))
        assert np.abs(x @ merged.numpy().T - expected).max() <= 1e-6 * np.abs(expected).max()
        seen.add(len(p["e"]))
    assert seen == {4, left}
    with torch.no_grad():
        found, merged = (load(g)(*inputs_of(graph))[0] for g in (graph, fold.fold(graph)))
    assert (found - merged).abs().max() <= 2e-5 * merged.abs().max()


def test_first_values_are_those_of_the_reference_code() -> None:
    graph = run.apply(graph_of("llama"), make("adalora", rank=8, targets="*.q_proj"))
    values = {name: read() for name, read in graph.inserted.items()}
    drawn = torch.cat([v.flatten() for name, v in values.items() if not name.endswith(".e")])
    assert 0.018 < drawn.std() < 0.022
    assert all(not v.any() for name, v in values.items() if name.endswith(".e"))


def test_training_fuses_it_as_it_fuses_lora() -> None:
    graph = run.apply(graph_of("llama"), make("adalora", rank=4, targets="all-linear"))
    layer = next(iter(graph.layers.values()))
    calls = [len(node.args[1]) for node in fused(layer).nodes if node.target is bypassed]
    assert sorted(calls) == [1, 1, 2, 3]  # o, down, gate and up, q k v


def pair(**options: Any) -> tuple[Any, Any, AllocateRanks, Any]:
    """Surgeon's model and PEFT's with the same values, and the hook."""
    folder, base = base_of("llama")
    graph = run.apply(base, make("adalora", rank=6, alpha=8, targets="q_proj,down_proj", shrink="end", **options))
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=4, tfinal=6, deltaT=3, total_step=36, lora_alpha=8, orth_reg_weight=0.1,
        target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    model, theirs = load_model(graph).train(), peft.get_peft_model(reference(folder), config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.copy_(model.get_parameter(our_name(name)))
    (step,) = graph.applied
    assert isinstance(step, Adapter)
    (hook,) = step.hooks(graph, "adalora", 0)
    assert isinstance(hook, AllocateRanks)
    return model, theirs, hook, config


def our_name(name: str) -> str:
    stem, _, word = name.removeprefix(ROOT).removesuffix(".default").rpartition(".lora_")
    return f"{stem}.adalora.{word.lower()}"


@pytest.mark.filterwarnings("ignore")
def test_masks_are_those_of_peft_and_shrinking_keeps_the_function() -> None:
    model, theirs, hook, _ = pair(target_rank=2, t_init=4, t_final=6, interval=3)
    allocator = RankAllocator(theirs.base_model.model, theirs.peft_config["default"], "default")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    inputs = inputs_of(model.graph)
    before = None
    for done in range(1, 31):
        hook.before_step(model, done - 1, 36)
        loss = model(input_ids=inputs[0], labels=inputs[0]).loss
        extra = hook.extra_loss(model)
        assert extra is not None
        (loss + extra).backward()
        optimizer.step()
        twins = [(our_name(n), p) for n, p in theirs.named_parameters() if p.requires_grad]
        for name, p in twins:
            own = model.get_parameter(name)
            p.data, p.grad = own.detach().clone(), own.grad.clone()
        _, pattern = allocator.update_and_allocate(theirs.base_model.model, done, force_mask=done == 30)
        if done == 30:
            with torch.no_grad():
                for path, mask in pattern.items():
                    model.get_parameter(our_name(path)).masked_fill_(~torch.tensor(mask)[:, None], 0)
                before = model.eval()(input_ids=inputs[0]).logits
                model.train()
        hook.after_step(model, optimizer, done - 1, 36)
        if done < 30:
            for name, p in twins:
                assert torch.equal(model.get_parameter(name) != 0, p != 0), (done, name)
        optimizer.zero_grad()
    kept = {path.removeprefix(ROOT).removesuffix(".lora_E.default"): sum(mask) for path, mask in pattern.items()}
    assert hook.ranks == kept
    assert sum(kept.values()) == 2 * 8
    assert len(set(kept.values())) > 1
    with torch.no_grad():
        after = model.eval()(input_ids=inputs[0]).logits
    assert before is not None
    assert torch.allclose(before, after, atol=1e-6)
    assert {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad} == {
        n: spec.shape for n, spec in model.graph.trainable().items()
    }
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert optimizer.state[p]["exp_avg"].shape == p.shape
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    trained = model.trained()
    with torch.no_grad():
        again = load(trained)(*inputs_of(trained))[0]
    assert torch.allclose(again, after, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shrink": "ende"}, "shrink is 'ende'"),
        ({"rank": 0}, "rank is 0"),
        ({"ranks": (("*.q_proj", -1),)}, "rank is -1"),
        ({"target_rank": 13}, "target_rank 13 is not between 0 and rank 12"),
        ({"rslora": True}, "scale is alpha / rank"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"interval": 0}, "interval is 0"),
        ({"t_init": -1.0}, "t_init is -1.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make("adalora", **options)


def test_a_rank_above_the_layers_size_is_refused() -> None:
    with pytest.raises(UsageError, match="above the size of the layer"):
        run.apply(graph_of("llama"), make("adalora", rank=10_000))


# ---- PEFT


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "pruned"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_peft_loads_what_surgeon_writes(
    family: str, pruned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("surgeon.peft_load", "surgeon.store"):
        monkeypatch.setattr(f"{module}.open_graph", captured)
    folder, base = base_of(family)
    ranks = (("*.0.*", 2), ("*.1.*", 0)) if pruned else ()
    targets = "c_attn,c_fc" if family == "gpt2" else "q_proj,down_proj"
    graph = randomised(run.apply(base, make("adalora", rank=3, alpha=7.0, targets=targets, ranks=ranks)))
    store.save(graph, tmp_path / "work")
    theirs = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "work").eval()
    ids = inputs_of(graph)[0]
    with torch.no_grad():
        ours, other = load_model(graph)(input_ids=ids).logits, theirs(input_ids=ids).logits
    assert torch.allclose(ours, other, atol=1e-5)
    again = store.load_adapter(tmp_path / "work")
    assert again.text() == graph.text()
    assert all(torch.equal(again.inserted[name](), graph.inserted[name]()) for name in graph.inserted)
    assert_merged_alike(theirs, graph)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pruned", [False, True])
def test_surgeon_loads_and_merges_what_peft_writes(pruned: bool, tmp_path: Path) -> None:
    folder, _ = base_of("llama")
    config = peft.AdaLoraConfig(
        init_r=5, target_r=2, total_step=20, lora_alpha=11, target_modules=["q_proj", "up_proj"]
    )
    theirs = peft.get_peft_model(reference(folder), config).eval()
    torch.manual_seed(4)
    masks = {}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.1)
            if pruned and ".lora_E." in name:
                mask = torch.rand(len(p)) > (1 if "layers.1." in name else 0.5)
                p.masked_fill_(~mask[:, None], 0)
                masks[name.removeprefix(ROOT)] = mask.tolist()
    if pruned:
        theirs.peft_config["default"].rank_pattern = masks
    theirs.save_pretrained(tmp_path)
    graph = store.load_adapter(tmp_path, folder, "causal-lm")
    ids = inputs_of(graph)[0]
    with torch.no_grad():
        assert torch.allclose(load_model(graph)(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)
    ranks = {spec.shape[0] for name, spec in graph.tensors.items() if name.endswith(".adalora.e")}
    assert (0 in ranks and len(ranks) > 2) if pruned else ranks == {5}
    fresh = peft.PeftModel.from_pretrained(reference(folder), tmp_path)
    assert_merged_alike(fresh, graph)
