"""Hugging Face's Trainer with what surgeon needs of it: hooks, exact resuming without pickles, whole checkpoints."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from surgeon import run_state
from surgeon.atomic import atomic_folder
from surgeon.errors import CheckFailed, UsageError
from surgeon.evaluate import evaluate
from surgeon.evaluate_tasks import TaskReport
from surgeon.hook import Hook
from surgeon.loss_log import LossLog, ProgressBar
from surgeon.offload import OffloadedAdamW
from surgeon.rates import grouped
from surgeon.render import Rendered
from surgeon.task_loss import count_items

STATE, RUN = "trainer_state.json", "run.json"
KEPT = 2
"""Checkpoints that stay: the newest, and the one before it."""


class SurgeonTrainer(transformers.Trainer):
    """The loop, its data order and schedule are Trainer's. `run` describes the run that a checkpoint belongs to."""

    def __init__(
        self,
        *,
        hooks: Sequence[Hook],
        log: LossLog,
        bar: ProgressBar,
        run: Mapping[str, Any],
        tokenizer: Any,
        **options: Any,
    ) -> None:
        self.hooks, self.log_file, self.bar, self.run, self.tokenizer = hooks, log, bar, run, tokenizer
        self.bf16 = run["precision"] == "bf16"
        self.tokens_seen = self.tokens_logged = 0
        args = options["args"]
        if run["optimizer"] == "paged" and "paged" not in args.optim:
            _, given = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
            options["optimizer_cls_and_kwargs"] = (OffloadedAdamW, {**given, "folder": args.output_dir})
        super().__init__(callbacks=[_HookCalls(hooks)], **options)
        self.remove_callback(transformers.PrinterCallback)
        self.began = time.perf_counter()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimiser, with a group of its own for every learning rate that the methods ask for."""
        made: torch.optim.Optimizer = super().create_optimizer(model)
        groups = grouped(self.model, made.param_groups, self.args.learning_rate)
        if groups is not made.param_groups:
            made.param_groups = []
            for group in groups:
                made.add_param_group(group)
        return made

    def compute_loss_context_manager(self) -> Any:
        """Autocast here and not through Accelerate, which would rewrite the model's forward and make logits fp32."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.bf16)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss plus the hooks' losses, which count once however many batches make a step.

        Theirs have a gradient and no value here: the loss stays in nats per token.
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # A model that takes no item count returns a mean, which Trainer divides by the number of batches itself.
        share = self.current_gradient_accumulation_steps if self.model_accepts_loss_kwargs else 1
        for hook in self.hooks:
            extra = hook.extra_loss(model)
            if extra is not None:
                loss = loss + (extra - extra.detach()) / share
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward pass. Raises CheckFailed if the loss is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.tokens_seen += int(inputs["attention_mask"].sum())
        if not math.isfinite(loss.item()):
            raise self._diverged("loss", loss.item(), self.state.global_step + 1)
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        shifted = isinstance(self.train_dataset, Rendered)
        count = sum(count_items(batch, shifted=shifted) for batch in batch_samples)
        return torch.tensor(max(count, 1), device=device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of loss.jsonl and a step of the bar; nothing is kept in memory."""
        step = self.state.global_step
        if "loss" not in logs:
            return
        now = time.perf_counter()
        rate = (self.tokens_seen - self.tokens_logged) / (now - self.began)
        self.tokens_logged, self.began = self.tokens_seen, now
        norm = logs.get("grad_norm", 0.0)
        self.log_file.add(
            step=step, loss=logs["loss"], lr=logs["learning_rate"], grad_norm=norm, tokens_per_second=round(rate, 1)
        )
        if not math.isfinite(norm):
            raise self._diverged("gradient norm", norm, step)
        self.bar.step(step, logs["loss"], rate)

    def _diverged(self, name: str, value: float, step: int) -> CheckFailed:
        where = f"step {step} of {self.state.max_steps}"
        return CheckFailed(f"the {name} is {value}", where, "lower --lr, raise --warmup, or train in fp32")

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss on the held-out data, also written to loss.jsonl."""
        size, precision = self.args.per_device_eval_batch_size, "bf16" if self.bf16 else "fp32"
        report = evaluate(self.model, self.tokenizer, self.eval_dataset, batch_size=size, precision=precision)
        measured = report.metrics if isinstance(report, TaskReport) else {"accuracy": report.accuracy}
        named = {f"eval_{name}": value for name, value in measured.items()}
        self.log_file.add(step=self.state.global_step, eval_loss=report.loss, **named)
        self.began = time.perf_counter()
        return {"eval_loss": report.loss}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.state.stateful_callbacks["TrainerControl"] = self.control.state()
        out = Path(self.args.output_dir)
        with atomic_folder(out / f"checkpoint-{self.state.global_step}", overwrite=True) as folder:
            run_state.save_trainable(self.model, folder)
            run_state.save_tree(self.optimizer.state_dict(), folder, "optimizer")
            run_state.save_tree(self.lr_scheduler.state_dict(), folder, "scheduler")
            run_state.save_tree(run_state.random_state(), folder, "random")
            run_state.save_tree([hook.state_dict() for hook in self.hooks], folder, "hooks")
            (folder / RUN).write_text(json.dumps(self.run, indent=1))
            self.state.save_to_json(str(folder / STATE))
        for old in checkpoints(out)[:-KEPT]:
            _remove(old)
        self.began = time.perf_counter()

    def load_finished(self, checkpoint: Path) -> None:
        """Takes the model and the hooks of a run that had made all its steps (Trainer would make one more)."""
        self.state = transformers.TrainerState.load_from_json(str(checkpoint / STATE))
        self._load_from_checkpoint(str(checkpoint))
        self._load_hooks(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        for hook, state in zip(self.hooks, run_state.load_tree(folder, "hooks"), strict=True):
            hook.reshape(self.model, state)
        run_state.load_trainable(self.model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        self.optimizer.load_state_dict(run_state.load_tree(folder, "optimizer"))
        self.lr_scheduler.load_state_dict(run_state.load_tree(folder, "scheduler"))
        self._load_hooks(folder)

    def _load_hooks(self, folder: Path) -> None:
        for hook, state in zip(self.hooks, run_state.load_tree(folder, "hooks"), strict=True):
            hook.load_state_dict(state)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is no scaler: fp16 training is not offered."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            run_state.restore_random_state(run_state.load_tree(Path(checkpoint), "random"))


class _HookCalls(transformers.TrainerCallback):
    """Calls the hooks at Trainer's events."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = hooks

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first batch of a step."""
        for hook in self.hooks:
            hook.before_step(kwargs["model"], state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the optimiser's step, after clipping."""
        for hook in self.hooks:
            hook.before_update(kwargs["model"], kwargs["optimizer"], state.global_step, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimiser's step, before the gradients are cleared."""
        for hook in self.hooks:
            hook.after_step(kwargs["model"], kwargs["optimizer"], state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step is evaluated too, whatever the interval."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer would repeat here what the epoch's last step has evaluated and saved."""
        control.should_evaluate = control.should_save = False


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; what a killed process left unfinished has another name."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in out.iterdir()] if out.is_dir() else []
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def check_same_run(checkpoint: Path, run: Mapping[str, Any]) -> None:
    """Raises UsageError unless `checkpoint` belongs to the run described by `run`."""
    try:
        stored = json.loads((checkpoint / RUN).read_text())
    except (OSError, ValueError) as error:
        hint = "delete this checkpoint and resume from the one before it"
        raise UsageError(f"the checkpoint's {RUN} is missing or corrupt: {error}", str(checkpoint), hint) from error
    for key in sorted(stored.keys() | run.keys()):
        if stored.get(key) != run.get(key):
            what = f"the run to resume began with {key} = {stored.get(key)}, not {run.get(key)}"
            hint = "resume with the options it began with, or begin anew in another folder"
            raise UsageError(what, str(checkpoint), hint)


def _remove(folder: Path) -> None:
    """Renames first: a folder that is half removed must not look like a checkpoint."""
    aside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)
