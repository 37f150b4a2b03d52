"""`surgeon merge`: fold trained adapters into a plain Hugging Face checkpoint, with the proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import output
from surgeon.cli.ways import over_codes
from surgeon.errors import UsageError, nearest

if TYPE_CHECKING:
    from surgeon.lower.merge import Merged

INTO = (
    "Over a quantised base: dequant (what the adapter was trained on; the default), original (the weights before they "
    "were quantised), requant (original + adapter, quantised again), zero-points (exact, for qalora)."
)
FORM = (
    "Of codes (--into requant, zero-points): bitsandbytes, gptq, gptq_v2, compressed-tensors or surgeon; default: "
    "bitsandbytes for nf4, else surgeon."
)
DTYPES = ("float32", "bfloat16", "float16")


def command(
    folder: Annotated[Path, typer.Argument(help="Work folder or PEFT adapter folder.")] = Path("work"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged checkpoint.")] = Path("merged"),
    base: Annotated[Path | None, typer.Option(help="The base, if it moved since the adapter was made.")] = None,
    dtype: Annotated[str, typer.Option(help="Store in float32, bfloat16 or float16; default: as the base.")] = "",
    verify: Annotated[
        bool, typer.Option(help="Compare with the adapted model before the folder is put in place.")
    ] = True,
    into: Annotated[str, typer.Option(help=INTO)] = "",
    accept_error: Annotated[
        bool, typer.Option("--accept-error", help="Merge whatever the error of --into is.")
    ] = False,
    form: Annotated[str, typer.Option("--format", help=FORM)] = "",
    calibration: Annotated[str, typer.Option(help="With --into requant: a data file, for GPTQ's codes on it.")] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse if something does not fold into weights.")] = False,
    rank: Annotated[int | None, typer.Option(help="Of an adapter that has every rank (dylora).")] = None,
    bake_prompt: Annotated[
        bool, typer.Option("--bake-prompt", help="Write a prompt's rows as new words of the vocabulary.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if it exists.")] = False,
    json: output.Json = False,
) -> None:
    """Stream the base's files, add the adapters in fp32, round once, and check the result before it gets its name.

    The model is never built: memory stays below the two largest tensors, whatever the model's size. Exits with 1 and
    leaves nothing behind if the merged files compute something else.

    Virtual tokens (prefix, prompt) fold into no weight: they are written to OUT/adapter, in PEFT's format where it has
    one, and surgeon puts them on again whenever it opens OUT. With --strict that is an error. With --bake-prompt the
    rows of a prompt become the embeddings of new words, <prompt_0> and so on, for any tool to put before its texts.

    Over a quantised base the error of every way to merge is shown first; one that changes the outputs by more than 2 %
    is refused without --accept-error. So are zero points that must be rounded to fit the --format.

    Examples:
        surgeon merge work/ -o merged/
        surgeon merge lora-adapter/ -o merged/ --dtype bfloat16
        surgeon merge prompt-work/ -o baked/ --bake-prompt
        surgeon merge qalora-work/ -o merged/ --into zero-points
        surgeon merge qalora-work/ -o merged/ --into requant --format gptq_v2 --calibration texts.jsonl
    """
    if dtype and dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{dtype}'", "--dtype", f"nearest: {nearest(dtype, DTYPES)}")
    if bake_prompt:
        if dtype or strict or rank is not None or not verify:
            raise UsageError("--bake-prompt is exact and checked as it is", "--bake-prompt", "leave the others out")
        _bake(folder, out, base, overwrite, json)
        return
    from surgeon import api
    from surgeon.lower.ways import is_quantised

    graph = api.to_merge(folder, base, rank)
    given = {"overwrite": overwrite, "dtype": _dtype(dtype), "verify": verify, "strict": strict}
    if into or accept_error or form or calibration or is_quantised(graph):
        again = {"form": form, "calibration": calibration}
        over_codes(graph, out, into or "dequant", accept_error, json, given, again)
        return
    with output.bar("merging") as advance:
        merged = api.merge(graph, out, progress=advance, **given)
    output.emit(summary(merged), json)
    if not json:
        _say_next(folder, out, merged)


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name) if name else None


def _say_next(folder: Path, out: Path, merged: Merged) -> None:
    if merged.rest:
        output.say(f"not folded: {', '.join(merged.rest)}, an adapter of its own for {out}, in {left(merged)}")
        output.say(f"next: surgeon verify {folder} {out}, or surgeon generate {out}, which puts the adapter on")
    else:
        output.say(f"next: surgeon verify {folder} {out}, or load {out} with any Hugging Face tool")


def _bake(folder: Path, out: Path, base: Path | None, overwrite: bool, json: bool) -> None:
    from surgeon import api

    baked = api.bake(folder, out, base=base, overwrite=overwrite)
    output.emit({"folder": baked.folder, "tokens": baked.tokens, "ids": baked.ids, "max_error": baked.max_error}, json)
    if not json:
        output.say(f"begin every text with {''.join(baked.tokens[:2])}…, all {len(baked.tokens)} of them, in any tool")


def left(merged: Merged) -> Path | None:
    """The folder with what did not fold."""
    from surgeon.store import REST

    return merged.written.folder / REST if merged.rest else None


def summary(merged: Merged) -> dict[str, Any]:
    """What `--json` prints: the files, and the measured proof."""
    written, comparison = merged.written, merged.comparison
    result: dict[str, Any] = {
        "folder": written.folder,
        "files": written.files,
        "merged_tensors": len(written.merged),
        "copied_bytes": written.copied_bytes,
        "merged_bytes": written.merged_bytes,
        "seconds": written.seconds,
        "not_folded": merged.rest,
        "adapter_folder": left(merged),
    }
    if comparison is not None:
        result |= {
            "max_error": comparison.max_error,
            "bound": comparison.bound,
            "because": comparison.because,
            "token_agreement": comparison.token_agreement,
            "verify_seconds": comparison.seconds,
            "peak_rss_bytes": comparison.peak_rss_bytes,
        }
    return result
