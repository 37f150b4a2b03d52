"""`surgeon demo`: the main job from end to end, offline, on a model it trains itself."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import output
from surgeon.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from surgeon.render import Rendered

ADAPTERS: dict[str, dict[str, Any]] = {
    "vera": {"rank": 64, "targets": "all-linear", "lr": 3e-2},
    "lora": {"rank": 8, "targets": "all-linear", "lr": 5e-3},
}
PROMPT = "The following "


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What one method reached: losses in nats per token, and the proofs of its merge and its export."""

    method: str
    trainable_parameters: int
    loss_before: float
    loss_after: float
    merge_error: float
    merge_bound: float
    merge_agreement: float
    onnx_error: float
    onnx_agreement: float
    text: str


def command(
    folder: Annotated[Path, typer.Argument(help="Folder to make; everything the demo writes is in it.")] = Path(
        "surgeon-demo"
    ),
    seconds: Annotated[float, typer.Option(help="How long to train the base model.")] = 60.0,
    steps: Annotated[int, typer.Option(help="Training steps of each adapter.")] = 120,
    overwrite: Annotated[bool, typer.Option(help="Replace the folder if it exists.")] = False,
    json: output.Json = False,
) -> None:
    """Train a tiny base, adapt it with VeRA and with LoRA, merge, verify, export to ONNX and compare tokens.

    Needs no network: the base learns the sources of Python's standard library, the adapters the language reference
    that pydoc carries.

    Examples:
        surgeon demo
        surgeon demo /tmp/try --seconds 20 --steps 40
    """
    if seconds <= 0 or steps < 1:
        raise UsageError(
            f"nothing to train in {seconds} s and {steps} steps", "surgeon demo", "for example --seconds 60"
        )
    leave_cores_free()
    prepare(folder, overwrite)
    began = time.perf_counter()
    make_base(folder, seconds)
    train, held_out = data(folder)
    results = [adapt(folder, method, train, held_out, steps) for method in ADAPTERS]
    took = time.perf_counter() - began
    output.emit({"folder": folder, "seconds": took, "adapters": results}, json, table(results))
    if not json:
        tell_next(folder, took)
    if any(result.onnx_agreement < 1 for result in results):
        raise CheckFailed("the ONNX model generated other tokens", str(folder), "surgeon verify shows where")


def leave_cores_free() -> None:
    """Half the cores at most: matrices this small gain nothing from more, and waiting for a busy core costs much."""
    import os

    import torch

    torch.set_num_threads(max(1, min(4, (os.cpu_count() or 2) // 2)))


def prepare(folder: Path, overwrite: bool) -> None:
    """An empty folder; an existing one is only replaced if asked for, and only if it is a demo's."""
    import shutil

    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise UsageError("the folder exists", str(folder), "give another folder, or --overwrite")
        if not (folder / "base" / "config.json").is_file():
            raise UsageError("the folder is no demo's, it is not replaced", str(folder), "give another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def make_base(folder: Path, seconds: float) -> None:
    """Step 1, with a progress bar."""
    from rich.progress import BarColumn, Progress, TextColumn

    from surgeon import demo

    heading("1  a base model", f"learning Python's standard library for {seconds:.0f} s")
    with Progress(TextColumn("{task.description}"), BarColumn(), console=output.console()) as progress:
        task = progress.add_task("step 0", total=1.0)

        def report(share: float, step: int, loss: float) -> None:
            progress.update(task, completed=share, description=f"step {step}  loss {loss:.2f}")

        loss = demo.train_base(folder / "base", seconds, report)
    output.say(f"   loss {loss:.2f} nats per token, written to {folder / 'base'}")


def data(folder: Path) -> tuple[Rendered, Rendered]:
    """The text to adapt to, and what is held out."""
    from surgeon import demo
    from surgeon.api import tokenizer_of
    from surgeon.render import load_data

    train, held_out = demo.reference_rows()
    tokenizer = tokenizer_of(folder / "base")
    files = demo.write_rows(train, folder / "train.jsonl"), demo.write_rows(held_out, folder / "heldout.jsonl")
    return load_data(files[0], tokenizer, demo.LENGTH), load_data(files[1], tokenizer, demo.LENGTH)


def adapt(folder: Path, method: str, train: Rendered, held_out: Rendered, steps: int) -> Adapted:
    """Steps 2 to 5 for one method: apply, train, merge, export, compare."""
    from surgeon import api
    from surgeon.evaluate import evaluate
    from surgeon.train import train as run

    options = dict(ADAPTERS[method])
    lr = options.pop("lr")
    flags = " ".join(f"--{name} {value}" for name, value in options.items())
    work, merged, onnx = folder / f"{method}", folder / f"{method}-merged", folder / f"{method}-onnx"
    heading(f"2  {method}: apply and train", f"surgeon apply {folder / 'base'} --method {method} {flags} -o {work}")
    model = api.apply(folder / "base", method, **options)
    before = evaluate(model, model.tokenizer, held_out).loss
    model.save(work)
    shown(f"surgeon train {work} --data {folder / 'train.jsonl'} --steps {steps} --lr {lr}")
    report = run(model, model.tokenizer, train, out=work, steps=steps, batch_size=8, lr=lr, warmup=0.05)
    model.save(work, overwrite=True)
    after = evaluate(model, model.tokenizer, held_out).loss
    output.say(f"   held-out loss {before:.3f} → {after:.3f}, {report.trainable_parameters:,} parameters trained")
    heading(f"3  {method}: merge and verify", f"surgeon merge {work} -o {merged}")
    proof = api.merge(work, merged).comparison
    assert proof is not None
    output.say(
        f"   largest difference {proof.max_error:.2g} (bound {proof.bound:.2g}), same token {proof.token_agreement:.0%}"
    )
    heading(f"4  {method}: export and compare tokens", f"surgeon export {merged} --target onnx -o {onnx}")
    exported = api.export(merged, onnx, target="onnx")
    text, agreement = same_tokens(work, onnx)
    output.say(f"   onnxruntime: largest difference {exported.max_error:.2g}, same greedy token {agreement:.0%}")
    return Adapted(
        method,
        report.trainable_parameters,
        before,
        after,
        proof.max_error,
        proof.bound,
        proof.token_agreement,
        exported.max_error,
        agreement,
        text,
    )


def same_tokens(work: Path, onnx: Path) -> tuple[str, float]:
    """Greedy text of the adapted model in torch, and the share of its tokens that the ONNX model generates too."""
    from surgeon import api
    from surgeon.lower.onnx import session as ort

    model = api.load(work)
    inputs = model.tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist()
    prompt = inputs["input_ids"][0].tolist()
    session = ort.open_session(onnx / "model.onnx")
    found = ort.decode(session, *ort.left_padded([prompt]), len(made) - len(prompt))[0][0, len(prompt) :]
    same = sum(a == b for a, b in zip(made[len(prompt) :], found, strict=False))
    return str(model.tokenizer.decode(made)), float(same) / max(1, len(made) - len(prompt))


def heading(title: str, line: str) -> None:
    """A step and the command that does the same."""
    from rich.text import Text

    output.say(Text(f"\n{title}", style="bold"))
    shown(line)


def shown(line: str) -> None:
    """A command, as a person would type it."""
    from rich.text import Text

    output.say(Text(f"   $ {line}" if line.startswith("surgeon") else f"   {line}", style="dim"))


def table(results: list[Adapted]) -> Any:
    """What the demo found, one row per method."""
    columns = (
        "method",
        "trained",
        "loss before",
        "loss after",
        "merged: error",
        "same token",
        "ONNX: error",
        "same tokens",
    )
    rows = [
        (
            r.method,
            f"{r.trainable_parameters:,}",
            f"{r.loss_before:.3f}",
            f"{r.loss_after:.3f}",
            f"{r.merge_error:.1e}",
            f"{r.merge_agreement:.0%}",
            f"{r.onnx_error:.1e}",
            f"{r.onnx_agreement:.0%}",
        )
        for r in results
    ]
    return output.table("", columns, rows, right=columns[1:])


def tell_next(folder: Path, took: float) -> None:
    """Where everything is, and what to try."""
    lines = (
        f"\nEverything is in {folder}/ ({took:.0f} s). Try next:",
        f"  surgeon show {folder}/lora --diff            what LoRA did to the graph",
        f"  surgeon generate {folder}/lora --prompt '{PROMPT}'",
        f"  surgeon verify {folder}/lora {folder}/lora-merged",
        "  surgeon plan your-model/ --method vera      what it would cost on yours",
    )
    output.say("\n".join(lines))
