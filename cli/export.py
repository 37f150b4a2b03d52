"""`surgeon export`: what production runs, from a work folder, an adapter or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.cli import output
from surgeon.errors import UsageError


def command(
    folder: Annotated[Path, typer.Argument(help="Work folder, PEFT adapter folder or checkpoint.")] = Path("work"),
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write; default: the target.")] = None,
    target: Annotated[str, typer.Option(help="onnx, triton, hf (as surgeon merge), vllm or sglang.")] = "onnx",
    profile: Annotated[
        str, typer.Option(help="onnx: the runtimes it is for: ort, genai, web or openvino. Default: ort.")
    ] = "",
    opset: Annotated[
        int | None, typer.Option(help="onnx: 21 (default), or 23: ONNX's own Attention, nothing of com.microsoft.")
    ] = None,
    precision: Annotated[
        str,
        typer.Option(help="onnx: fp32 (default), fp16, int8, int4; triton: fp32, fp16, bf16 (default: the base's)."),
    ] = "",
    codes: Annotated[
        bool,
        typer.Option(help="onnx: keep quantised weights in codes; without, they are decoded and adapters folded in."),
    ] = True,
    four_bit: Annotated[
        str, typer.Option(help="onnx: NF4 as standard operators, decoded at load, or as bnb4 (MatMulBnb4, for GPUs).")
    ] = "standard",
    weights: Annotated[
        str,
        typer.Option(help="onnx: bind to the checkpoint's files (hard links), or copy. Default: bind if it can."),
    ] = "",
    adapters: Annotated[
        str, typer.Option(help="onnx: merge, slots: adapters are inputs, or stacked: one per row of a batch.")
    ] = "merge",
    targets: Annotated[str, typer.Option(help="onnx, --adapters slots: the linears that have slots.")] = "all-linear",
    prefix_slots: Annotated[
        bool,
        typer.Option("--prefix-slots", help="onnx, --adapters slots: prefixes are slots too, at standard attention."),
    ] = False,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="onnx, --adapters slots: an adapter to compile and verify too. Repeatable."),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="onnx, --profile web: a page beside the model that runs it in a browser.")
    ] = False,
    runtime: Annotated[
        Path | None, typer.Option(help="onnx, --demo: a node_modules with onnxruntime-web; default: taken from npm.")
    ] = None,
    arch: Annotated[str, typer.Option(help="triton: GPU architectures; sm_80's PTX always comes along.")] = "",
    keep_adapter: Annotated[
        bool | None, typer.Option(help="triton: leave the adapter beside the base. Default: over a base in codes.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The base, if it moved since the adapter was made.")] = None,
    verify: Annotated[bool, typer.Option(help="Replay probes before the folder is put in place.")] = True,
    rank: Annotated[int | None, typer.Option(help="Of an adapter that has every rank (dylora).")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if it exists.")] = False,
    json: output.Json = False,
) -> None:
    """Fold the adapters in, lower the model to a target, and run the result against torch before it gets its name.

    For onnx: one model.onnx with K/V cache for prefill and decode, replayed in ONNX Runtime for 20 greedy tokens, alone
    and in a left-padded batch; of an encoder-decoder two graphs. For triton: binaries for the named architectures,
    weights and a program (surgeon run), replayed here without a GPU. For vllm and sglang: the adapter as the LoRA they
    read, refused where they would leave a part of it out, and the command that serves it. Exits with 1 and leaves
    nothing behind if it computes something else.

    Examples:
        surgeon export work/ --target onnx -o onnx/
        surgeon export model/ --target onnx --precision fp16 --json
        surgeon export model/ --adapters slots --adapter lora-adapter/ --adapter prefix-work/ -o onnx/
        surgeon export lora-adapter/ --target hf -o merged/
        surgeon export work/ --target triton --arch sm_80,sm_90 --precision bf16
    """
    from surgeon import lower

    options: dict[str, Any] = {"base": base, "rank": rank, "overwrite": overwrite, "verify": verify}
    if target == "triton":
        options |= {"precision": precision, "keep_adapter": keep_adapter}
        options |= {"arch": arch.split(",")} if arch else {}
    elif target == "onnx":
        options |= {"precision": precision or "fp32", "codes": codes, "four_bit": four_bit}
        options |= {"profile": profile} if profile else {}
        options |= {"weights": weights} if weights else {}
        options |= {} if opset is None else {"opset": opset}
        options |= {"adapters": adapters, "targets": targets, "prefix_slots": prefix_slots, "adapter": adapter or []}
        options |= {"demo": True, "runtime": runtime} if demo else {}
    apart = "" if adapters == "merge" else adapters
    given = {"--profile": profile, "--weights": weights, "--demo": demo, "--adapters": apart}
    require(target, "onnx", given | {"--opset": opset is not None})
    require(target, "triton", {"--arch": arch, "--keep-adapter": keep_adapter is not None})
    if adapters == "merge" and (adapter or prefix_slots or targets != "all-linear"):
        what = "--adapter, --targets and --prefix-slots are for an export whose adapters are inputs"
        raise UsageError(what, f"--adapters {adapters}", "--adapters slots")
    tell(target, lower.export(folder, out or Path(target), target=target, **options), json)


def require(target: str, needed: str, given: Mapping[str, Any]) -> None:
    """Options that only one target has.

    Raises:
        UsageError: one is given for another.
    """
    for name, value in given.items():
        if value and target != needed:
            raise UsageError(f"{name} is for --target {needed}", f"--target {target}", "leave it out")


def tell(target: str, report: Any, json: bool) -> None:
    """Print the report of a target."""
    if target == "onnx":
        from surgeon.cli.export_report import summary, view

        output.emit(summary(report), json, view(report))
    elif target == "triton":
        from surgeon.lower.triton import summary as built

        output.emit(built(report), json)
    elif target in ("vllm", "sglang"):
        output.emit(vars(report), json)
    else:
        from surgeon.cli.merge import summary as merged

        output.emit(merged(report), json)
