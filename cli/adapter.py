"""`surgeon adapter`: an adapter of any method as a file for an export whose adapters are inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import output

if TYPE_CHECKING:
    from surgeon.lower.onnx.adapter import Compiled


def command(
    folders: Annotated[list[Path], typer.Argument(help="PEFT adapter folders or work folders.")],
    export: Annotated[Path, typer.Option("--for", help="The export it is for (surgeon export --adapters slots).")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="x.onnx_adapter, or x.safetensors with every slot.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The base, if it moved since the adapter was made.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of an adapter that has every rank (dylora).")] = None,
    verify: Annotated[bool, typer.Option(help="Replay it in ONNX Runtime against torch before it is kept.")] = True,
    json: output.Json = False,
) -> None:
    """Compile adapters of any method into values of an export's slots, and prove them.

    LoRA, rsLoRA, DoRA, DyLoRA, AdaLoRA, VeRA, IA³, LoHa and QA-LoRA become factors at linears; prefix, P-Tuning v2 and
    prompts become keys and values at attentions. A part of an adapter that has no slot is refused by name, as is an
    adapter of another base. Several folders are one adapter, if no two fill the same slot; for a stacked export they
    are adapters 1, 2, … of which every row of a batch has one, by adapter_ids; 0 is the base.

    For an encoder-decoder x.onnx_adapter is two files, x.encoder_model.onnx_adapter and
    x.decoder_model_merged.onnx_adapter, one for each model.

    ONNX Runtime does not look at the version in the file: load it with surgeon.lower.onnx.adapter_file.load, which
    does, or check it once with that.

    Examples:
        surgeon adapter lora-adapter/ --for onnx/ -o lora.onnx_adapter
        surgeon adapter dylora-work/ --for onnx/ --rank 4 -o rank4.onnx_adapter
        surgeon adapter prefix-adapter/ --for web/ -o prefix.safetensors --json
    """
    from surgeon.lower.onnx.adapter import compile_file

    made = compile_file(folders, export, out, base=base, rank=rank, verify=verify)
    output.emit(summary(made), json)


def summary(made: Compiled) -> dict[str, Any]:
    """What `--json` prints."""
    worst = max(made.replays, key=lambda replay: replay.max_error / replay.bound, default=None)
    return {
        "file": made.file,
        "files": made.files,
        "bytes": made.bytes,
        "slots": made.slots,
        "passes": made.passes,
        "max_error": worst.max_error if worst else None,
        "bound": worst.bound if worst else None,
        "because": worst.because if worst else "not verified",
        "unrounded": max((replay.unrounded for replay in made.replays if replay.unrounded is not None), default=None),
        "token_agreement": min((replay.token_agreement for replay in made.replays), default=None),
        "steps": worst.steps if worst else 0,
    }
