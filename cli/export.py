"""`surgeon export`: what production runs, from a work folder, an adapter or a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import output
from surgeon.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from surgeon.lower.onnx.bind import Placed
    from surgeon.lower.onnx.export import OnnxReport
    from surgeon.lower.onnx.precision import Linear


def command(
    folder: Annotated[Path, typer.Argument(help="Work folder, PEFT adapter folder or checkpoint.")] = Path("work"),
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write; default: the target.")] = None,
    target: Annotated[str, typer.Option(help="onnx, triton, hf (as surgeon merge), vllm or sglang.")] = "onnx",
    profile: Annotated[
        str, typer.Option(help="onnx: the runtimes it is for: ort, genai, web or openvino. Default: ort.")
    ] = "",
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
    and in a left-padded batch. For triton: binaries for the named architectures, weights and a program (surgeon run),
    replayed here without a GPU. For vllm and sglang: the adapter as the LoRA they read, refused where they would leave
    a part of it out, and the command that serves it. Exits with 1 and leaves nothing behind if it computes something
    else.

    Examples:
        surgeon export work/ --target onnx -o onnx/
        surgeon export model/ --target onnx --precision fp16 --json
        surgeon export model/ --adapters slots --adapter lora-adapter/ --adapter prefix-work/ -o onnx/
        surgeon export lora-adapter/ --target hf -o merged/
        surgeon export work/ --target triton --arch sm_80,sm_90 --precision bf16
    """
    from surgeon import lower

    where = out or Path(target)
    options: dict[str, Any] = {"base": base, "rank": rank, "overwrite": overwrite, "verify": verify}
    if target == "triton":
        options |= {"precision": precision, "keep_adapter": keep_adapter}
        options |= {"arch": arch.split(",")} if arch else {}
    elif target == "onnx":
        options |= {"precision": precision or "fp32", "codes": codes, "four_bit": four_bit}
        options |= {"profile": profile} if profile else {}
        options |= {"weights": weights} if weights else {}
        options |= {"adapters": adapters, "targets": targets, "prefix_slots": prefix_slots, "adapter": adapter or []}
        options |= {"demo": True, "runtime": runtime} if demo else {}
    apart = "" if adapters == "merge" else adapters
    for name, value in (("--profile", profile), ("--weights", weights), ("--demo", demo), ("--adapters", apart)):
        if value and target != "onnx":
            raise UsageError(f"{name} is for --target onnx", f"--target {target}", "leave it out")
    if adapters == "merge" and (adapter or prefix_slots or targets != "all-linear"):
        what = "--adapter, --targets and --prefix-slots are for an export whose adapters are inputs"
        raise UsageError(what, f"--adapters {adapters}", "--adapters slots")
    for name, given in (("--arch", arch), ("--keep-adapter", keep_adapter is not None)):
        if given and target != "triton":
            raise UsageError(f"{name} is for --target triton", f"--target {target}", "leave it out")
    report = lower.export(folder, where, target=target, **options)
    if target == "onnx":
        output.emit(summary(report), json, view(report))
    elif target == "triton":
        from surgeon.lower.triton import summary as built

        output.emit(built(report), json)
    elif target in ("vllm", "sglang"):
        output.emit(vars(report), json)
    else:
        from surgeon.cli.merge import summary as merged

        output.emit(merged(report), json)


def summary(report: OnnxReport) -> dict[str, Any]:
    """What `--json` prints."""
    replay = report.replay
    return {
        "folder": report.folder,
        "files": report.files,
        "precision": report.precision,
        "opset": report.opset,
        "profile": report.profile,
        "attention": report.attention,
        "linears": report.linears,
        "change": report.change,
        "fallbacks": report.fallbacks,
        "weights": {
            "form": report.weights.form,
            "note": report.weights.note,
            "bound": report.weights.bound,
            "written": report.weights.written,
        },
        "max_error": report.max_error,
        "bound": report.bound,
        "because": replay.because if replay else "not verified",
        "token_agreement": report.token_agreement,
        "steps": replay.steps if replay else 0,
        "seconds": report.seconds,
        "peak_rss_bytes": report.peak_rss_bytes,
    }


def view(report: OnnxReport) -> RenderableType:
    """The same for people: the files, and what ONNX Runtime said."""
    from rich.console import Group

    files = ", ".join(f"{name} {output.size(size)}" for name, size in report.files.items())
    fields = {"wrote": str(report.folder), "files": files, "profile": report.profile}
    fields["precision"] = f"{report.precision}, opset {report.opset}"
    fields["attention"] = {"gqa": "GroupQueryAttention"}.get(report.attention, "standard operators")
    for why, paths in report.fallbacks.items():
        fields["attention"] += f"; no GroupQueryAttention: {why} ({paths[0]}{', …' if len(paths) > 1 else ''})"
    fields["weights"] = weights_line(report.weights)
    replay = report.replay
    if replay:
        rows = sum(len(batch.prompts) for batch in replay.batches)
        done = f"{replay.steps} greedy tokens × {rows} rows" if replay.steps else f"{rows} texts"
        what = "tokens" if replay.steps else "predictions"
        fields["replayed"] = f"{done} in ONNX Runtime: {replay.token_agreement:.1%} of {what} agree"
        fields["max |Δlogit|"] = f"{replay.max_error:.3g}, may be {replay.bound:.3g} ({replay.because})"
    else:
        fields["replayed"] = "no: --no-verify"
    if "index.html" in report.files:
        fields["serve it"] = f"python -m http.server --bind 127.0.0.1 --directory {report.folder} 8000"
    if report.change is not None:
        fields["rounding"] = f"changes the outputs by {report.change:.2%} ‖found − exact‖ / ‖exact‖"
    fields["took"] = f"{report.seconds:.1f} s, peak {output.size(report.peak_rss_bytes)}"
    return Group(decisions(report.linears), output.fields(fields)) if report.linears else output.fields(fields)


def weights_line(placed: Placed) -> str:
    """Where the tensors are, in words."""
    written = f"{output.size(placed.written)} written"
    if placed.form == "bind":
        written = f"{output.size(placed.bound)} bound to the checkpoint's own files, {written}"
    return f"{written}; {placed.note}" if placed.note else written


def decisions(linears: Sequence[Linear]) -> RenderableType:
    """What became of the linears, those of one name in one row: the least retention and the largest error."""
    rows: dict[tuple[str, str, int], list[Linear]] = {}
    for linear in linears:
        name = re.sub(r"\.\d+\.", ".*.", linear.path)
        rows.setdefault((name, linear.how, linear.bits), []).append(linear)
    shown = []
    for (name, how, bits), group in rows.items():
        kept = [linear.retention for linear in group if linear.retention is not None]
        worst = f"{min(kept):.2f}" if kept else ""
        shown.append((name, len(group), how, bits or "", worst, f"{max(linear.error for linear in group):.2%}"))
    columns = ("linear", "layers", "weights", "bits", "adapter kept", "error")
    return output.table("", columns, shown, right=columns[1:2] + columns[3:])
