"""The training loop: it learns, logs, checkpoints, resumes to the bit, calls its hooks, and stops on bad input.

Run as a program it trains the small model of these tests and is killed in the middle of its second checkpoint.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from surgeon import run_state
from surgeon.errors import CheckFailed, SurgeonError, UnsupportedError, UsageError
from surgeon.hook import Hook
from surgeon.loss import causal_cross_entropy
from surgeon.loss_log import read_log
from surgeon.render import Rendered, Sample, load_data
from surgeon.train import train
from surgeon.trainer import checkpoints

TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=2)


class StandIn(torch.nn.Module):
    """What the graph runtime promises: loss and logits from a model of which only some parameters train."""

    def __init__(self, llama: Any, trained: str) -> None:
        super().__init__()
        self.llama, self.config = llama, llama.config
        for name, parameter in llama.named_parameters():
            parameter.requires_grad_(trained in name)

    def forward(
        self, input_ids: Any, attention_mask: Any, position_ids: Any = None, labels: Any = None, **kwargs: Any
    ) -> CausalLMOutput:
        hidden = self.llama.model(input_ids, attention_mask, position_ids).last_hidden_state
        head = self.llama.lm_head.weight
        if labels is None:
            return CausalLMOutput(logits=hidden @ head.t())
        return CausalLMOutput(causal_cross_entropy(hidden, head, None, labels, num_items=kwargs["num_items_in_batch"]))


def small(trained: str = "q_proj") -> StandIn:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, num_key_value_heads=1, attention_dropout=0.2, **sizes)
    return StandIn(LlamaForCausalLM(config), trained)


def samples(count: int = 10) -> Rendered:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 40, (5 + i % 4,), generator=generator).tolist() for i in range(count)]
    return Rendered(tuple(Sample(ids, [-100, *ids[1:]]) for ids in rows))


class Noise(Hook):
    """Draws random numbers, changes the loss and keeps state: all of it must survive a resume."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls: list[str] = []
        self.drawn, self.stop_at = torch.zeros(3), stop_at

    def before_step(self, model: Any, step: int, total: int) -> None:
        self.calls.append(f"before {step}/{total}")
        self.drawn = torch.rand(3)

    def extra_loss(self, model: Any) -> torch.Tensor:
        return 0.01 * self.drawn.sum() * sum(p.square().sum() for p in model.parameters() if p.requires_grad)

    def after_step(self, model: Any, optimizer: Any, step: int, total: int) -> None:
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        self.calls.append(f"after {step}")
        if step == self.stop_at:
            raise KeyboardInterrupt

    def state_dict(self) -> dict[str, Any]:
        return {"calls": list(self.calls), "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls, self.drawn = list(state["calls"]), state["drawn"]


# 5 batches of 2 in accumulations of 2: an epoch is 3 steps, the last of them of one batch.
OPTIONS: dict[str, Any] = {
    "batch_size": 2,
    "gradient_accumulation": 2,
    "steps": 10,
    "lr": 1e-2,
    "weight_decay": 0.1,
    "warmup": 2,
    "progress": False,
}


def run(out: Path, model: StandIn, hook: Noise, **options: Any) -> Any:
    return train(model, TOKENIZER, samples(), out=out, eval_data=samples(4), hooks=[hook], **{**OPTIONS, **options})


def state(model: StandIn) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def curve(out: Path) -> list[dict[str, Any]]:
    lines = read_log(out / "loss.jsonl")
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def assert_same_run(a: tuple[Path, StandIn, Noise], b: tuple[Path, StandIn, Noise]) -> None:
    for (name, x), y in zip(state(a[1]).items(), state(b[1]).values(), strict=True):
        assert torch.equal(x, y), name
    assert curve(a[0]) == curve(b[0])
    assert a[2].calls == b[2].calls
    for part in ("optimizer", "random"):
        trees = [run_state.load_tree(checkpoints(x[0])[-1], part) for x in (a, b)]
        assert str(trees[0]) == str(trees[1])


# ---- resuming


def test_a_paged_run_is_the_plain_one_and_resumes_to_it(tmp_path: Path) -> None:
    whole, out = (tmp_path / "whole", small(), Noise()), tmp_path / "paged"
    run(*whole, save_every=4)
    with pytest.raises(KeyboardInterrupt):
        run(out, small(), Noise(stop_at=6), save_every=4, optimizer="paged")
    resumed = (out, small(), Noise())
    assert run(*resumed, save_every=4, optimizer="paged", resume=True).resumed_from == 4
    assert_same_run(whole, resumed)
    with pytest.raises(UsageError, match="optimizer = paged, not adamw"):
        run(out, small(), Noise(), resume=True)


@pytest.mark.parametrize("save_every", [3, 4], ids=["at the end of an epoch", "in the middle of an epoch"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, save_every: int) -> None:
    whole = (tmp_path / "whole", small(), Noise())
    assert run(*whole, save_every=save_every, eval_every=2).resumed_from is None
    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        run(out, small(), Noise(stop_at=6), save_every=save_every, eval_every=2)
    assert [line["step"] for line in curve(out) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    resumed = (out, small(), Noise())
    torch.rand(5)
    report = run(*resumed, save_every=save_every, eval_every=2, resume=True)
    assert report.resumed_from == {3: 6, 4: 4}[save_every]
    assert report.steps == 10
    assert_same_run(whole, resumed)


def test_killed_in_the_middle_of_a_checkpoint(tmp_path: Path) -> None:
    whole = (tmp_path / "whole", small(), Noise())
    run(*whole, save_every=4)
    out = tmp_path / "killed"
    program = [sys.executable, __file__, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in checkpoints(out)] == ["checkpoint-4"], "the second one was not whole"
    assert len(read_log(out / "loss.jsonl")) == 8
    resumed = (out, small(), Noise())
    assert run(*resumed, save_every=4, resume="auto").resumed_from == 4
    assert_same_run(whole, resumed)
    assert not [path for path in out.iterdir() if path.name.startswith(".")], "nothing is left of the killed write"


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    first = small()
    done = run(tmp_path, first, Noise(), save_every=5)
    again = small()
    report = run(tmp_path, again, Noise(), save_every=5, resume="auto")
    assert (report.resumed_from, report.steps, report.loss) == (10, 10, done.loss)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_resume_is_refused_where_it_would_not_be_the_same_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint to resume from"):
        run(tmp_path, small(), Noise(), resume=True)
    assert list(tmp_path.iterdir()) == []
    run(tmp_path, small(), Noise(), save_every=10)
    before = curve(tmp_path)
    with pytest.raises(UsageError, match="an earlier run is here, at step 10"):
        run(tmp_path, small(), Noise())
    with pytest.raises(UsageError, match=r"began with lr = 0\.01, not 0\.5"):
        run(tmp_path, small(), Noise(), resume=True, lr=0.5)
    with pytest.raises(UsageError, match="began with data = "):
        train(small(), TOKENIZER, samples(8), out=tmp_path, eval_data=samples(4), resume=True, **OPTIONS)
    with pytest.raises(UsageError, match=r"of another model: llama.*k_proj.*absent there"):
        run(tmp_path, small("k_proj"), Noise(), resume=True)
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{")
    with pytest.raises(UsageError, match=r"model.safetensors is missing or corrupt"):
        run(tmp_path, small(), Noise(), resume=True)
    assert curve(tmp_path) == before


def test_checkpoints_hold_no_pickle_and_only_what_trains(tmp_path: Path) -> None:
    run(tmp_path, small(), Noise(), save_every=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-10"]
    files = list(checkpoints(tmp_path)[-1].iterdir())
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "checkpoint-10" / "model.safetensors")
    assert sorted(stored) == [f"llama.model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]


# ---- what a run does


def test_hooks_log_and_report(tmp_path: Path) -> None:
    model, hook = small(), Noise()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    report = run(tmp_path, model, hook, eval_every=4)
    assert hook.calls == [call for step in range(10) for call in (f"before {step}/10", f"after {step}")]
    lines = curve(tmp_path)
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, 11))
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8, 10]
    assert losses[0]["lr"] == 0.0
    assert losses[2]["lr"] == OPTIONS["lr"]
    assert all(line["grad_norm"] > 0 for line in losses)
    assert (report.steps, report.first_loss, report.loss) == (10, losses[0]["loss"], losses[-1]["loss"])
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.checkpoint is None
    assert report.plot.read_bytes().startswith(b"\x89PNG")
    assert model.config.use_cache is True
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())


def test_accumulated_batches_equal_one_batch(tmp_path: Path) -> None:
    """The same 10 samples, unequal in length, as one batch and as two and a half: one step, the same step."""
    models = []
    for name, size, accumulation in (("one", 10, 1), ("parts", 4, 3)):
        model = small()
        model.config.attention_dropout = 0.0
        for layer in model.llama.model.layers:
            layer.self_attn.attention_dropout = 0.0
        settings = {**OPTIONS, "batch_size": size, "gradient_accumulation": accumulation, "steps": 1, "warmup": 0}
        train(model, TOKENIZER, samples(), out=tmp_path / name, **settings)
        models.append(model)
    assert curve(tmp_path / "one")[0]["grad_norm"] == pytest.approx(curve(tmp_path / "parts")[0]["grad_norm"], rel=1e-5)
    assert curve(tmp_path / "one")[0]["loss"] == pytest.approx(curve(tmp_path / "parts")[0]["loss"], rel=1e-6)


def test_bf16_autocast_keeps_parameters_in_fp32(tmp_path: Path) -> None:
    model, fp32 = small(), small()
    forward = model.forward
    report = run(tmp_path / "bf16", model, Noise(), precision="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.forward == forward, "the model's forward is not wrapped"
    assert run(tmp_path / "fp32", fp32, Noise()).loss == pytest.approx(report.loss, rel=0.02)


def test_it_learns_real_text(shared: Path, tmp_path: Path) -> None:
    folder = shared / "models" / "pystdlib-llama"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (shared / "data" / "c_headers.train.jsonl").read_text().splitlines()[:24]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    model = StandIn(LlamaForCausalLM.from_pretrained(folder), "q_proj")
    data = load_data(tmp_path / "d.jsonl", tokenizer, 64)
    report = train(
        model,
        tokenizer,
        data,
        out=tmp_path / "out",
        eval_data=data,
        eval_every=4,
        steps=8,
        lr=2e-3,
        progress=False,
    )
    held_out = [line["eval_loss"] for line in curve(tmp_path / "out") if "eval_loss" in line]
    assert held_out[1] < held_out[0] - 0.02
    assert held_out[1] == report.eval_loss


# ---- what stops a run


def test_a_loss_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    class Poison(Noise):
        def after_step(self, model: Any, optimizer: Any, step: int, total: int) -> None:
            if step == 3:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    with pytest.raises(CheckFailed, match="the loss is nan") as caught:
        run(tmp_path, small(), Poison(), save_every=2)
    assert caught.value.where == "step 5 of 10"
    assert [line["step"] for line in curve(tmp_path)] == [1, 2, 3, 4]


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    class Fill(Noise):
        def before_step(self, model: Any, step: int, total: int) -> None:
            super().before_step(model, step, total)
            if step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(SurgeonError, match="the disk is full"):
            run(tmp_path, small(), Fill(), save_every=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "loss.jsonl"]


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"learning_rate": 1.0}, {"resume": "maybe"}])
def test_bad_options_write_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        run(tmp_path / "out", small(), Noise(), **options)
    assert not (tmp_path / "out").exists()


def test_models_and_data_that_cannot_train(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no parameter of the model trains"):
        run(tmp_path / "out", small("nothing"), Noise())
    with pytest.raises(UnsupportedError, match="no gradient checkpointing"):
        run(tmp_path / "out", small(), Noise(), gradient_checkpointing=True)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(UsageError, match="not a line of JSON") as caught:
        train(small(), TOKENIZER, tmp_path / "bad.jsonl", out=tmp_path / "out", **OPTIONS)
    assert caught.value.where.endswith("bad.jsonl:2")
    assert not (tmp_path / "out").exists()


def test_steps_from_epochs(tmp_path: Path) -> None:
    options = {name: value for name, value in OPTIONS.items() if name != "steps"}
    assert train(small(), TOKENIZER, samples(), out=tmp_path, epochs=2, **options).steps == 6


def _train_until_killed(out: Path) -> None:
    write, saved = run_state.save_tree, []

    def killing(tree: Any, folder: Path, name: str) -> None:
        saved.append(name)
        if saved.count("random") == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write(tree, folder, name)

    run_state.save_tree = killing
    run(out, small(), Noise(), save_every=4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _train_until_killed(Path(sys.argv[1]))


def test_the_method_says_how_fast_it_learns() -> None:
    from benchmarks.zoo.graphs import graph_of
    from surgeon import passes, run
    from surgeon.model import SurgeonModel
    from surgeon.train import learning_rate

    lora = run.apply(graph_of("llama"), passes.make("lora", rank=2))
    both = run.apply(lora, passes.make("vera", rank=2))
    assert learning_rate(SurgeonModel(lora)) == passes.find("lora").learning_rate
    assert learning_rate(SurgeonModel(both)) == passes.find("vera").learning_rate > passes.find("lora").learning_rate
    assert learning_rate(torch.nn.Linear(2, 2)) == passes.find("lora").learning_rate
