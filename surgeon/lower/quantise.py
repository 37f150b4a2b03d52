"""A checkpoint quantised: planned, streamed, read again and replayed before the folder gets its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon import run
from surgeon.coded import CodedCheckpoint
from surgeon.errors import UsageError
from surgeon.forms import find_writer
from surgeon.graph import Graph
from surgeon.lower.quantised import Written, write_quantised
from surgeon.lower.saved import Saved, dtype_of
from surgeon.passes.base import Skip
from surgeon.passes.quantiser import Quantiser
from surgeon.source import Source, open_graph, open_source
from surgeon.verification import Comparison, Probe, compare, make_probes


@dataclass
class Replay:
    """What is done with a written folder before it gets its name: it is read again, and must compute the same.

    Args:
        graph: what was written, as the form holds it.
        source: the base.
        probes: the inputs.
        out: the name it will get.
    """

    graph: Graph
    source: Source
    probes: list[Probe]
    out: Path
    comparison: Comparison | None = None

    def __call__(self, folder: Path) -> None:
        """Compare; raises CheckFailed if the files compute something else."""
        written = open_source(folder, self.source.task.name)

        def release() -> None:
            self.source.checkpoint.release()
            written.checkpoint.release()

        found = compare(self.graph, open_graph(written), probes=self.probes, release=release)
        found.require(str(self.out))
        self.comparison = found


@dataclass(frozen=True)
class Quantised:
    """A quantised checkpoint: what was written, by which pass, and the proof that it reads as what was meant.

    Attributes:
        written: the checkpoint's files.
        step: the quantiser, as the form needs it.
        bits_per_weight: of the weights in codes, scales and zero points among them.
        comparison: the files, read again, against the quantised graph; None if it was not asked for.
        skipped: linears that were asked for and stay as they are, with the reasons.
    """

    written: Written
    step: Quantiser
    bits_per_weight: float
    comparison: Comparison | None
    skipped: tuple[Skip, ...] = ()


def quantise(
    graph: Graph,
    source: Source,
    step: Quantiser,
    out: str | Path,
    *,
    form: str = "",
    verify: bool = True,
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Quantised:
    """Write the base of a graph with the weights of its linears in codes.

    Args:
        graph: a plain graph over the weights of `source`.
        source: the base.
        step: the quantiser; options that the form has no place for are changed to those that it has.
        out: the new folder.
        form: of the codes, see `surgeon.forms`; "" for the quantiser's default.
        verify: read what was written again, and compare, before the folder is put into place.
        tokenizer: makes the probes.
        overwrite: replace an existing folder.
        progress: called with (tensor, bytes done, bytes in all).

    Raises:
        UsageError: there is no such form, a weight is not finite, or the checkpoint is quantised already.
        UnsupportedError: the codes have no place in the form.
        CheckFailed: the written files compute something else.
    """
    if isinstance(source.checkpoint, CodedCheckpoint):
        hint = "take the checkpoint it was quantised from, or merge --into dequant first"
        raise UsageError("the weights are quantised already", str(source.folder), hint)
    if graph.applied:
        names = ", ".join(step.name for step in graph.applied)
        raise UsageError(f"{names} is applied to it", graph.source, "surgeon merge --into requant, or merge first")
    step = find_writer(form, step).suited(step, dtype_of(graph))
    _, skipped = run.chosen_sites(graph, step)
    made = run.apply(graph, step)
    saved, replay = Saved(made, form), Replay(made, source, make_probes(graph, tokenizer), Path(out))
    check = replay if verify else _unchecked
    written = write_quantised(made, source, out, form=form, overwrite=overwrite, progress=progress, check=check)
    count = sum(graph.tensors[name].count for name in written.quantised)
    bits = 8 * sum(saved.nbytes(name) for name in written.quantised) / count
    return Quantised(written, saved.step, bits, replay.comparison, tuple(skipped))


def _unchecked(folder: Path) -> None:
    """Nothing."""
