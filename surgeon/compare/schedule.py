"""The runs of a comparison, each in a process of its own, and the folder that keeps what they found.

A result is written whole after its run: a comparison that was killed goes on where it was.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgeon.atomic import atomic_file
from surgeon.compare.contenders import CONTENDERS, Contender
from surgeon.compare.settings import Settings
from surgeon.errors import SurgeonError, UsageError

BASE, SEARCH, SURGEON, PEFT, PACE, BESIDE = "base", "search", "surgeon", "peft", "pace", "pace-beside-peft"
ROUNDS, PACES = 5, 4
"""Rounds of the steps that are timed, and steps of a side in each, of which the first is not counted."""
RESULTS = "runs"
FOUND, WORDS = "found.json", "words.txt"
"""What a run's process leaves: its result, and what it said."""
_LIBRARIES = ("transformers.trainer", "peft")
Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        kind: "base" measures the model as it is, "search" tries a method's learning rates, "surgeon" and "peft" train,
            "pace" and "pace-beside-peft" time steps, of PEFT's model in turn with surgeon's.
        method: name of the contender.
        options: of it, fitted to the model.
        seed: of first values, order and dropout.
    """

    kind: str
    method: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    @property
    def key(self) -> str:
        """Its name among the results."""
        last = str(self.seed) if self.kind in (SURGEON, PEFT) else ""
        return "-".join(filter(None, [self.method, self.kind, last]))

    @property
    def contender(self) -> Contender:
        """The contender with its options."""
        known = CONTENDERS[self.method]
        return Contender(known.name, known.lr, dict(self.options), known.wide)


def runs(contenders: Sequence[Contender], seeds: int, peers: bool) -> Iterator[Run]:
    """All of them, in an order in which what a run needs comes before it."""
    for one in contenders:
        yield Run(SEARCH, one.name, tuple(one.options.items()))
        for seed in range(seeds):
            yield Run(SURGEON, one.name, tuple(one.options.items()), seed)
            if peers and not one.wide:
                yield Run(PEFT, one.name, tuple(one.options.items()), seed)
        yield Run(BESIDE if peers and not one.wide else PACE, one.name, tuple(one.options.items()))


class Results:
    """The results of runs by their keys, in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / RESULTS

    def read(self, run: Run) -> Result | None:
        """What a run found, None if it has not been.

        Raises:
            UsageError: the file is damaged.
        """
        file = self._file(run)
        if not file.is_file():
            return None
        try:
            found: Result = json.loads(file.read_text(encoding="utf-8"))
            return found
        except ValueError as error:
            hint = "delete the file, and compare again"
            raise UsageError(f"a result cannot be read: {error}", str(file), hint) from error

    def write(self, run: Run, result: Result) -> None:
        """Keep it, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._file(run)) as new:
            new.write_text(json.dumps({"key": run.key, **result}, indent=2) + "\n", encoding="utf-8")

    def lr(self, run: Run) -> float:
        """The learning rate that the search of a run's method found."""
        found = self.read(Run(SEARCH, run.method)) or {}
        return float(found.get("lr", run.contender.lr))

    def _file(self, run: Run) -> Path:
        return self.folder / f"{run.key}.json"


def carry_out(
    settings: Settings,
    wanted: Sequence[Run],
    results: Results,
    done: Callable[[Run, Result, bool], None],
    begin: Callable[[Run], None],
) -> None:
    """Carry out the runs that have no result yet; after a failed search its method is left alone.

    A run's result is of a learning rate: where the search has found another since, the run is carried out again.

    Args:
        settings: of the comparison.
        wanted: the runs, in order.
        results: what is known, and where the rest goes.
        done: told of every run, its result, and whether it was known before.
        begin: told of every run before it begins.

    Raises:
        SurgeonError: a process was killed.
    """
    failed: set[str] = set()
    for run in wanted:
        lr = 0.0 if run.kind in (BASE, SEARCH) else results.lr(run)
        known = results.read(run)
        if known is not None and lr and known.get("lr", lr) != lr:
            known = None
        result = known
        if result is None and run.method in failed and run.kind != SEARCH:
            continue
        if result is None:
            begin(run)
            result = in_process(settings, run, lr)
            results.write(run, result)
        if run.kind == SEARCH and "failed" in result:
            failed.add(run.method)
        done(run, result, known is not None)


def in_process(settings: Settings, run: Run, lr: float) -> Result:
    """The result of one run in a new process; what raised an error in it is under "failed".

    Raises:
        SurgeonError: it was killed, or ended without a result.
    """
    from surgeon.compare.one import answer

    request = {"settings": asdict(settings), "run": asdict(run), "lr": lr, "began": time.time()}
    with tempfile.TemporaryDirectory(prefix="surgeon-compare-") as place:
        process = _processes().Process(target=answer, args=(request, place), daemon=True)
        process.start()
        process.join()
        if process.exitcode or not (Path(place) / FOUND).is_file():
            hint = "compare again: what is done is kept, and fewer things run beside it need less memory"
            what = f"the run {run.key} ended without a result: {_end(process.exitcode or 0, Path(place))}"
            raise SurgeonError(what, settings.model, hint)
        found: Result = json.loads((Path(place) / FOUND).read_text(encoding="utf-8"))
    return found


@functools.cache
def _processes() -> Any:
    """Where processes come from: a server that has read the libraries forks them; on a GPU every one reads them.

    What is forked cannot use CUDA once a library has touched it.
    """
    import torch

    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["surgeon.compare.one", *_LIBRARIES])
    return context


def _end(code: int, place: Path) -> str:
    """How a process ended: by whom it was killed, or its last words."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    words = place / WORDS
    last = words.read_text(encoding="utf-8", errors="replace").strip().splitlines() if words.is_file() else []
    return (last or [f"exit code {code}"])[-1][:200]
