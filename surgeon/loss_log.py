"""What people watch while a model trains: `loss.jsonl`, its plot, and a progress bar on stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from surgeon.atomic import atomic_file, full_disk


class LossLog:
    """One JSON object a line, in the order of training: `step, loss, lr, grad_norm, tokens_per_second`, or `eval_loss`.

    Opened for a run that has made `step` steps: what an interrupted run wrote after them is removed.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        kept = [line for line in read_log(path) if line["step"] <= step] if step else []
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def add(self, **values: Any) -> None:
        """Appends a line and hands it to the system, so that a killed process loses none."""
        with full_disk(self.path, None), self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that was cut off by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def plot_log(log: Path, image: Path, title: str = "") -> None:
    """Draws the training loss (each step and a running mean), the evaluation loss and the learning rate as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_log(log)
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    if train:
        steps, losses = zip(*train, strict=True)
        upper.plot(steps, losses, color="#9bb8d3", linewidth=1, label="training, each step")
        if len(train) >= 20:
            upper.plot(steps, _running_mean(losses), color="#1f4e79", linewidth=2, label="training, running mean")
        lower.plot(steps, [line["lr"] for line in lines if "loss" in line], color="#6b6b6b", linewidth=1)
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        upper.plot(steps, losses, "o-", color="#c44e00", linewidth=1.5, markersize=4, label="held out")
    upper.set_ylabel("loss (nats per token)")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    upper.set_title(title, loc="left")
    if train or held_out:
        upper.legend(frameon=False)
    with atomic_file(image) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _running_mean(values: tuple[float, ...]) -> list[float]:
    """An exponential mean over about a fortieth of the run, without the bias of its start."""
    decay = 1 - 1 / max(len(values) / 40, 3)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        means.append(mean / weight)
    return means


class ProgressBar:
    """A bar on a terminal; elsewhere a line on stderr for every tenth of the run."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.total, self.shown = total, shown
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not shown or not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=total, completed=done, note="")
        self.bar.start()

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` steps are done."""
        note = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s"
        self.bar.update(self.task, completed=step, note=note)
        if self.shown and self.bar.disable and (step == self.total or step % max(self.total // 10, 1) == 0):
            self.bar.console.print(f"step {step}/{self.total}: {note}", highlight=False)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self.bar.stop()
