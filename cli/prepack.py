"""`surgeon prepack`: an ONNX export in the form that this machine loads fastest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import output


def command(
    folder: Annotated[Path, typer.Argument(help="An ONNX export.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; default: beside it, named FOLDER-prepacked.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if it exists.")] = False,
    json: output.Json = False,
) -> None:
    """Save the optimised graph and the weights as the processor's kernels read them, and replay the probes.

    The result starts faster and is about twice as large; it is for this version of ONNX Runtime and this kind of
    processor, so this is done on the device. Needs onnxruntime and numpy, not torch.

    Examples:
        surgeon prepack onnx/ -o onnx-here/
    """
    from surgeon.lower.onnx.prepack import prepack

    made = prepack(
        folder, out or folder.absolute().with_name(f"{folder.absolute().name}-prepacked"), overwrite=overwrite
    )
    if json:
        output.emit(vars(made), json)
        return
    said = {
        "wrote": str(made.folder),
        "files": ", ".join(f"{name} {output.size(size)}" for name, size in made.files.items()),
        "for": f"onnxruntime {made.machine['onnxruntime']} on {made.machine['processor']}",
        "replayed": f"{made.verified.token_agreement:.1%} of tokens agree" if made.verified else "no: it has no probes",
        "took": f"{made.seconds:.1f} s",
    }
    output.say(output.fields(said))
