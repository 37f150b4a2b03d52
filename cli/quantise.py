"""`surgeon quantise`: a checkpoint with its linears in codes, in a form that others load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import output
from surgeon.cli.merge import FORM
from surgeon.cli.methods import chosen, offered
from surgeon.errors import UsageError
from surgeon.options import options_of
from surgeon.passes.quantiser import Quantiser

if TYPE_CHECKING:
    from surgeon.lower.quantise import Quantised
    from surgeon.passes.base import Pass

METHOD = "nf4 or intq, or 'method(option=value, …)'; default: what the --format and the options are of, else nf4."


def quantisers() -> Mapping[str, type[Pass]]:
    """The methods that hold weights in codes."""
    return {name: method for name, method in offered().items() if issubclass(method, Quantiser)}


with_methods = quantisers


def command(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("quantised"),
    method: Annotated[str, typer.Option("--method", "-m", help=METHOD)] = "",
    form: Annotated[str, typer.Option("--format", help=FORM.partition(": ")[2].capitalize())] = "",
    task: Annotated[str, typer.Option(help="What the model is for; read off its config if not given.")] = "",
    verify: Annotated[bool, typer.Option(help="Read the files again and compare before they are put in place.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace the folder if it exists.")] = False,
    json: output.Json = False,
    **options: Any,
) -> None:
    """Write a checkpoint with the weights of its linears in codes, streamed, one weight in memory at a time.

    With --calibration the codes are GPTQ's on that file, linear by linear; without, the nearest ones. transformers
    loads the forms bitsandbytes, gptq (with GPTQModel) and compressed-tensors; surgeon loads all of them, and AWQ's in
    its version gemm, trains adapters over them and merges into them. GPTQ and compressed-tensors hold integer zero
    points and scales in half precision: options that they have no place for are changed, and said.

    Examples:
        surgeon quantise model/ -o nf4/
        surgeon quantise model/ --format gptq_v2 --bits 3 --group 64 --calibration texts.jsonl
        surgeon quantise model/ --format compressed-tensors --zero symmetric --group 128
        surgeon plan model/ --method nf4
    """
    steps = chosen([method or _default(form, options)], options)
    step = steps[0]
    if len(steps) > 1 or not isinstance(step, Quantiser):
        names = " and ".join(one.name for one in steps)
        raise UsageError(f"{names} is no way to quantise", "--method", f"one of {', '.join(quantisers())}")
    from surgeon import api

    with output.bar("quantising") as advance:
        done = api.quantise(
            model, out, step, form=form, task=task or None, verify=verify, overwrite=overwrite, progress=advance
        )
    output.emit(summary(done), json, output.fields(view(done)))
    if not json:
        output.say(f"next: surgeon apply {out} --method lora, surgeon eval {out}, or load it with transformers")


def _default(form: str, options: Mapping[str, Any]) -> str:
    """nf4, but for a form of integers or an option that only those have."""
    own = {option.name for option in options_of(quantisers()["nf4"])}
    return "nf4" if form in ("", "bitsandbytes") and own >= options.keys() else "intq"


def summary(done: Quantised) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "folder": done.written.folder,
        "form": done.written.form,
        "method": done.step.spec(),
        "quantised": done.written.quantised,
        "skipped": done.skipped,
        "bytes": done.written.nbytes,
        "bits_per_weight": done.bits_per_weight,
        "max_error": done.comparison.max_error if done.comparison is not None else None,
        "peak_rss_bytes": done.comparison.peak_rss_bytes if done.comparison is not None else None,
    }


def view(done: Quantised) -> dict[str, str]:
    """The same for people."""
    checked = "not read again: --no-verify"
    if done.comparison is not None:
        checked = f"read again, max |Δ| {done.comparison.max_error:.3g} from what was meant"
    left = [f"{len(done.skipped)}, {one.path}: {one.why}" for one in done.skipped[:1]]
    return {
        "wrote": str(done.written.folder),
        "form": f"{done.written.form}, {done.step.spec()}",
        "in codes": f"{len(done.written.quantised)} weights, {done.bits_per_weight:.4g} bits each",
        **({"left as they are": left[0]} if left else {}),
        "size": output.size(done.written.nbytes),
        "checked": checked,
    }
