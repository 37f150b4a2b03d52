"""Training what the passes inserted: one call around Hugging Face's Trainer, resumable to the bit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from surgeon.errors import UnsupportedError, UsageError
from surgeon.hook import Hook, hooks_of
from surgeon.loss_log import LossLog, ProgressBar, plot_log, read_log
from surgeon.offload import paged_name
from surgeon.passes.base import Pass
from surgeon.recipe import SCHEDULERS, Recipe, make_recipe
from surgeon.resident import peak_bytes
from surgeon.samples import Data, collator_for, samples_for
from surgeon.trainer import SurgeonTrainer, check_same_run, checkpoints


@dataclass(frozen=True)
class TrainReport:
    """What a run did. Losses are nats per trained token; `loss` is the mean over the last tenth of the steps.

    `data` is one line about the samples. For other tasks than language models losses are per label, and `eval_metrics`
    are those of TaskReport.
    """

    steps: int
    first_loss: float
    loss: float
    eval_loss: float | None
    eval_metrics: dict[str, float]
    data: str
    trainable_parameters: int
    tokens_per_second: float
    seconds: float
    peak_rss_bytes: int
    resumed_from: int | None
    log: Path
    plot: Path
    checkpoint: Path | None


def train(
    model: nn.Module,
    tokenizer: Any,
    data: Data | str | Path,
    *,
    out: str | Path,
    eval_data: Data | str | Path | None = None,
    resume: bool | str = False,
    hooks: Sequence[Hook] = (),
    progress: bool = True,
    recipe: Recipe | None = None,
    **options: Any,
) -> TrainReport:
    """Trains the parameters of `model` that require gradients, on the device it is on, and leaves them trained.

    `data` is a file or rendered samples; `options` are the fields of Recipe. Writes to `out`: loss.jsonl, loss.png and
    checkpoint-N every `save_every` steps and at the end. `resume` continues from the newest checkpoint there (True:
    there must be one; "auto": if there is one), and equals the run that was never interrupted, bit for bit on CPU.
    Raises UsageError for bad options, data or checkpoints, CheckFailed when the loss or the gradient is not finite.
    """
    recipe = recipe or make_recipe(options)
    if recipe.lr is None:
        recipe = replace(recipe, lr=learning_rate(model))
    trainable = _trainable(model)
    samples = samples_for(model, tokenizer, data, recipe.max_length)
    held_out = None if eval_data is None else samples_for(model, tokenizer, eval_data, recipe.max_length)
    out = Path(out)
    hooks = [*_hooks(model, recipe.seed), *hooks]
    for hook in hooks:
        hook.check(recipe.total_steps(len(samples)))
    run = {**_run(recipe, samples, held_out), "hooks": [type(hook).__name__ for hook in hooks]}
    checkpoint = _checkpoint(out, resume, run)
    done = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    _set_checkpointing(model, recipe.gradient_checkpointing)
    began = time.perf_counter()
    log, bar = LossLog(out / "loss.jsonl", done), ProgressBar(run["total_steps"], done, progress)
    with _left_as_it_was(model, hooks, bar):
        trainer = SurgeonTrainer(
            model=model,
            args=_arguments(recipe, out, run["total_steps"], model, held_out is not None),
            train_dataset=samples,
            eval_dataset=held_out,
            data_collator=collator_for(samples, tokenizer, model.config),
            hooks=hooks,
            log=log,
            bar=bar,
            run=run,
            tokenizer=tokenizer,
        )
        _train(trainer, checkpoint, finished=done >= run["total_steps"])
    plot = out / "loss.png"
    plot_log(log.path, plot, f"{run['total_steps']} steps, {trainable:,} trained parameters")
    for hook in hooks:
        hook.report(out)
    return _report(trainer, log, plot, trainable, samples.summary(), time.perf_counter() - began, done)


def _train(trainer: SurgeonTrainer, checkpoint: Path | None, *, finished: bool) -> None:
    if checkpoint is not None and finished:
        trainer.load_finished(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


@contextmanager
def _left_as_it_was(model: nn.Module, hooks: Sequence[Hook], bar: ProgressBar) -> Iterator[None]:
    """Whatever happens within, afterwards the hooks are told, and the model has its own settings and no gradients."""
    config: Any = model.config
    use_cache = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        bar.close()
        if use_cache is not None:
            config.use_cache = use_cache  # Trainer turns it off
        for hook in hooks:
            hook.finish(model)
        model.zero_grad(set_to_none=True)


def _trainable(model: nn.Module) -> int:
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not found:
        raise UsageError("no parameter of the model trains", type(model).__name__, "apply a method to it first")
    return found


def learning_rate(model: nn.Module) -> float:
    """The highest learning rate the methods applied to the model ask for; LoRA's for a model without a graph."""
    graph = getattr(model, "graph", None)
    return max((step.learning_rate for step in getattr(graph, "applied", ())), default=Pass.learning_rate)


def _hooks(model: nn.Module, seed: int) -> list[Hook]:
    """What the applied methods do around a step."""
    graph = getattr(model, "graph", None)
    return [] if graph is None else hooks_of(graph, seed)


def _run(recipe: Recipe, samples: Data, held_out: Data | None) -> dict[str, Any]:
    """What must be equal for a run to be resumed; how often it saves may change."""
    options = {name: value for name, value in asdict(recipe).items() if name != "save_every"}
    held_out_digest = None if held_out is None else held_out.digest
    total = recipe.total_steps(len(samples))
    return {**options, "total_steps": total, "data": samples.digest, "eval_data": held_out_digest}


def _checkpoint(out: Path, resume: bool | str, run: Mapping[str, Any]) -> Path | None:
    """The checkpoint of this run to resume from, or None to begin."""
    if resume not in (True, False, "auto"):
        raise UsageError(f"unknown resume mode `{resume}`", "training options", "use true, false or auto")
    found = checkpoints(out)
    if resume is True and not found:
        raise UsageError("there is no checkpoint to resume from", str(out), "train without resuming")
    if not resume and found:
        hint = "resume it, delete its checkpoints, or train in another folder"
        raise UsageError(f"an earlier run is here, at step {found[-1].name.split('-')[1]}", str(out), hint)
    if not (found and resume):
        return None
    check_same_run(found[-1], run)
    return found[-1]


def _set_checkpointing(model: nn.Module, wanted: bool) -> None:
    switch = getattr(model, "gradient_checkpointing_enable", None)
    if wanted and switch is None:
        what = f"{type(model).__name__} has no gradient checkpointing"
        raise UnsupportedError(what, "gradient_checkpointing", "train without it, with smaller batches")
    if wanted and switch is not None:
        switch()


def _arguments(recipe: Recipe, out: Path, total: int, model: nn.Module, evaluates: bool) -> Any:
    cpu = next(model.parameters()).device.type == "cpu"
    return transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=total,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.lr,
        lr_scheduler_type=SCHEDULERS[recipe.scheduler],
        warmup_steps=recipe.warmup_steps(total),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        data_seed=recipe.seed,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or total,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.eval_every or total,
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        use_cpu=cpu,
        **_optimiser(recipe, model),
        report_to="none",
        disable_tqdm=True,
    )


def _optimiser(recipe: Recipe, model: nn.Module) -> dict[str, str]:
    """Trainer's own paged optimiser, where it is chosen and there is one."""
    found = paged_name(next(model.parameters()).device.type) if recipe.optimizer == "paged" else ""
    return {"optim": found} if found else {}


def _report(
    trainer: SurgeonTrainer, log: LossLog, plot: Path, trainable: int, data: str, seconds: float, done: int
) -> TrainReport:
    lines = read_log(log.path)
    losses = [line["loss"] for line in lines if "loss" in line]
    last = losses[-max(len(losses) // 10, 1) :]
    held_out = [line for line in lines if "eval_loss" in line][-1:]
    measured = {name.removeprefix("eval_"): value for line in held_out for name, value in line.items()}
    eval_loss = measured.pop("loss", None)
    saved = checkpoints(Path(trainer.args.output_dir))
    return TrainReport(
        steps=trainer.state.global_step,
        first_loss=losses[0],
        loss=sum(last) / len(last),
        eval_loss=eval_loss,
        eval_metrics={name: value for name, value in measured.items() if name != "step"},
        data=data,
        trainable_parameters=trainable,
        tokens_per_second=trainer.tokens_seen / seconds,
        seconds=seconds,
        peak_rss_bytes=peak_bytes(),
        resumed_from=done or None,
        log=log.path,
        plot=plot,
        checkpoint=saved[-1] if saved else None,
    )
