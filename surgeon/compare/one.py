"""One run of a comparison, in this process. Losses are nats per trained token, for classifiers per label."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon import api, labels, run
from surgeon.compare import lowered, peers
from surgeon.compare.contenders import FULL, HEAD, Contender
from surgeon.compare.memory import Peak
from surgeon.compare.schedule import BASE, BESIDE, FOUND, PACE, PACES, PEFT, ROUNDS, SEARCH, SURGEON, WORDS, Run
from surgeon.compare.search import search
from surgeon.compare.settings import Settings, checked_data, validation_of
from surgeon.errors import SurgeonError, UnsupportedError
from surgeon.evaluate import evaluate
from surgeon.graph import Graph
from surgeon.heads import head_modules
from surgeon.hook import Hook
from surgeon.model import load_model
from surgeon.replaced import FromBase
from surgeon.samples import Data, samples_for
from surgeon.text import diff
from surgeon.train import train

Result = dict[str, Any]


def answer(request: dict[str, Any], folder: str) -> None:
    """Carry out the run of a request, and write what it found into a folder; what is said on the way goes there too."""
    place = Path(folder)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with (place / WORDS).open("w") as words:
        for stream in (1, 2):
            os.dup2(words.fileno(), stream)
    settings, lr = Settings(**request["settings"]), float(request["lr"])
    given = request["run"]
    wanted = Run(given["kind"], given["method"], tuple(map(tuple, given["options"])), given["seed"])
    try:
        result = One(settings, wanted, lr, float(request["began"])).result()
    except SurgeonError as error:
        result = {"failed": error.what + (f" ({error.where})" if error.where else "")}
    except (RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        result = {"failed": f"unexpected {type(error).__name__}: {first[:200]}"}
    (place / FOUND).write_text(json.dumps(result), encoding="utf-8")


class One:
    """A run with what it reads."""

    def __init__(self, settings: Settings, wanted: Run, lr: float, began: float = 0.0) -> None:
        self.settings, self.run, self.lr = settings, wanted, lr
        self.peak, began = Peak(), began or time.time()
        self.rows, self.held = checked_data(settings.data, settings.heldout, settings.batch_size)
        self.graph = opened(settings, self.rows, wanted.seed)
        self.tokenizer = api.tokenizer_of(self.graph.source)
        self.startup = time.time() - began

    def result(self) -> Result:
        """Of the kind that was asked for."""
        with tempfile.TemporaryDirectory(prefix="surgeon-compare-") as place:
            if self.run.kind == BASE:
                return self._base(Path(place))
            if self.run.kind == SEARCH:
                return self._search(Path(place))
            if self.run.kind in (PACE, BESIDE):
                return self._pace(Path(place))
            return self._trained(Path(place))

    def _base(self, place: Path) -> Result:
        """The loss of the model as it is, its size, and how long a step and what is around it take."""
        began = time.perf_counter()
        model = load_model(self.graph, dtype=torch.float32)
        report = evaluate(model, self.tokenizer, self._samples(model, self.held))
        evaluated = time.perf_counter() - began
        tuned = load_model(trainable(self.graph), dtype=torch.float32)
        times = Times()
        self._train(tuned, self._samples(tuned, self.rows), place, steps=4, lr=1e-6, hooks=[times])
        count = sum(spec.count for spec in self.graph.tensors.values() if spec.parameter and not spec.owner)
        return {
            "loss": report.loss,
            **_metrics(report),
            "parameters": count,
            "seconds_per_step": times.median(),
            "evaluation_seconds": evaluated,
            "startup_seconds": self.startup,
        }

    def _search(self, place: Path) -> Result:
        """The learning rate for rows of the training data that were kept apart."""

        def tried(lr: float, steps: int) -> float:
            return self._tried(lr, steps, Path(tempfile.mkdtemp(dir=place)))

        short, whole = self.settings.search_steps, self.settings.steps
        found = search(self.run.contender.rates, lambda lr: tried(lr, short), lambda lr: tried(lr, whole))
        return dataclasses.asdict(found)

    def _tried(self, lr: float, steps: int, place: Path) -> float:
        """The loss that a learning rate leaves on the rows kept apart; infinite if it is not a number."""
        rows, kept = validation_of(self.rows)
        model, hooks = self._model(place / "model")
        data, judge = self._samples(model, rows), self._samples(model, kept)
        self._train(model, data, place / "run", steps=steps, lr=lr, hooks=hooks)
        loss = float(evaluate(model, self.tokenizer, judge).loss)
        return loss if math.isfinite(loss) else math.inf

    def _trained(self, place: Path) -> Result:
        """What a whole run costs and gives; for the first seed also what is left of it when it is deployed."""
        ours, _ = self._model(place / "ours")
        samples, held = self._samples(ours, self.rows), self._samples(ours, self.held)
        if self.run.kind == PEFT:
            if why := peers.why_not(ours.graph):
                return {"failed": why}
            model, hooks = peers.build(ours.graph, place, self.settings.steps)
            del ours
        else:
            model, hooks = ours, []
        self.peak.begin()
        report = self._train(model, samples, place / "run", steps=self.settings.steps, lr=self.lr, hooks=hooks)
        memory = self.peak.bytes()
        judged = peers.OfTokens(model) if self.run.kind == PEFT else model
        found = evaluate(judged, self.tokenizer, held)
        result = {
            "loss": found.loss,
            **_metrics(found),
            "lr": self.lr,
            "train_loss": report.loss,
            "trained": report.trainable_parameters,
            "memory_bytes": memory,
        }
        return result if self.run.kind == PEFT else {**result, **self._finished(model, held, place)}

    def _pace(self, place: Path) -> Result:
        """How long a step takes: in every round the first few of a run, PEFT's and ours in turn where it has them."""
        sides = {SURGEON: self._model(place / "ours")}
        graph = sides[SURGEON][0].graph
        if self.run.kind == BESIDE and not peers.why_not(graph):
            with contextlib.suppress(UnsupportedError):
                sides[PEFT] = peers.build(graph, place, self.settings.steps)
        samples = self._samples(sides[SURGEON][0], self.rows)
        taken: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(max(1, min(ROUNDS, self.settings.steps // PACES))):
            for side in sides if turn % 2 == 0 else reversed(sides):
                times, (model, hooks) = Times(PACES), sides[side]
                out, steps = Path(tempfile.mkdtemp(dir=place)), self.settings.steps
                with contextlib.suppress(Enough):
                    self._train(model, samples, out, steps=steps, lr=self.lr, hooks=[*hooks, times])
                taken[side].append(times.median())
        found = {"lr": self.lr, "seconds_per_step": statistics.median(taken[SURGEON])}
        if PEFT in taken:
            ratios = [ours / theirs for ours, theirs in zip(*taken.values(), strict=True)]
            found["time_ratio"] = statistics.median(ratios)
        return found

    def _finished(self, model: Any, held: Data, place: Path) -> Result:
        """Sizes on disk; for the first seed the graph's diff and the loss after each way of deploying it."""
        graph = model.trained()
        size = lowered.saved(graph, place / "saved")
        if self.run.seed:
            return size
        after = lowered.losses(graph, self.tokenizer, held, place, onnx=self.settings.onnx)
        return {**size, "after": after, "diff": diff(self.graph, graph)}

    def _model(self, place: Path) -> tuple[Any, list[Hook]]:
        """The contender's model with its first values."""
        one = self.run.contender
        graph = applied(self.graph, one, self.run.seed, self.tokenizer)
        model = load_model(graph, dtype=torch.float32, device="cuda" if torch.cuda.is_available() else "cpu")
        model.tokenizer = self.tokenizer
        return model, []

    def _samples(self, model: nn.Module, rows: Any) -> Data:
        return samples_for(model, self.tokenizer, rows, self.settings.max_length)

    def _train(self, model: nn.Module, data: Data, out: Path, *, steps: int, lr: float, hooks: list[Hook]) -> Any:
        return train(
            model, self.tokenizer, data, out=out, steps=steps, batch_size=self.settings.batch_size, lr=lr,
            warmup=0.1, seed=self.run.seed, progress=False, hooks=hooks,
        )  # fmt: skip


class Enough(Exception):
    """A run has made the steps that were to be timed."""


class Times(Hook):
    """The seconds from the begin of a step to its end; the run ends after `most` of them, by Enough."""

    def __init__(self, most: int = 0) -> None:
        self.began, self.most, self.found = 0.0, most, list[float]()

    def before_step(self, model: nn.Module, step: int, total: int) -> None:
        """Start."""
        self.began = time.perf_counter()

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """Stop."""
        self.found.append(time.perf_counter() - self.began)
        if len(self.found) == self.most:
            raise Enough

    def median(self) -> float:
        """Without the first step, which compiles."""
        return statistics.median(self.found[1:] or self.found)


def opened(settings: Settings, rows: Any, seed: int) -> Graph:
    """The base, with the classes of the data where it is a classifier without any."""
    graph = api.read(settings.model, settings.task or None, seed=seed)
    names = labels.chosen(rows, graph.config, graph.task, open_head=bool(graph.fresh) and not graph.labels)
    return graph if names is None else api.read(settings.model, settings.task or None, labels=names, seed=seed)


def applied(graph: Graph, one: Contender, seed: int, tokenizer: Any) -> Graph:
    """The base with a contender applied."""
    if one.name == FULL:
        return trainable(graph)
    if one.name == HEAD:
        return trainable(graph, head_modules(graph))
    return run.apply(graph, *one.passes(), seed=seed, tokenizer=tokenizer)


def trainable(graph: Graph, modules: tuple[str, ...] = ()) -> Graph:
    """A graph whose own parameters train: all, or those of some modules. What is tied stays tied."""
    made = graph.copy()
    inside = tuple(f"{path}." for path in modules)
    for name, spec in graph.tensors.items():
        floating = spec.dtype is None or spec.dtype.is_floating_point
        if spec.parameter and floating and (not modules or name.startswith(inside)):
            made.tensors[name] = dataclasses.replace(spec, trainable=True)
            made.inserted.setdefault(name, FromBase(graph.values, name))
    return made


def _metrics(report: Any) -> dict[str, float]:
    accuracy = getattr(report, "accuracy", None)
    return {} if accuracy is None else {"accuracy": float(accuracy)}
