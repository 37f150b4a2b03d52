"""What `surgeon export --target onnx` prints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgeon.cli import output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from surgeon.lower.onnx.bind import Placed
    from surgeon.lower.onnx.export import OnnxReport
    from surgeon.lower.onnx.precision import Linear


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
        "unrounded": replay.unrounded if replay else None,
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
    names = {"gqa": "GroupQueryAttention", "fused": "Attention"}
    wanted = names["gqa" if report.opset == 21 else "fused"]
    fields["attention"] = names.get(report.attention, "standard operators")
    for why, paths in report.fallbacks.items():
        fields["attention"] += f"; no {wanted}: {why} ({paths[0]}{', …' if len(paths) > 1 else ''})"
    fields["weights"] = weights_line(report.weights)
    replay = report.replay
    if replay:
        rows = sum(len(batch.prompts) for batch in replay.batches)
        done = f"{replay.steps} greedy tokens × {rows} rows" if replay.steps else f"{rows} texts"
        what = "tokens" if replay.steps else "predictions"
        fields["replayed"] = f"{done} in ONNX Runtime: {replay.token_agreement:.1%} of {what} agree"
        fields["max |Δlogit|"] = f"{replay.max_error:.3g}, may be {replay.bound:.3g} ({replay.because})"
        if replay.unrounded is not None:
            fields["max |Δlogit|"] += f"; {replay.unrounded:.3g} where activations are not rounded"
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
