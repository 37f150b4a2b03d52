"""`surgeon convert`: any adapter, several of them, or the difference of two models, as one LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import output
from surgeon.errors import UsageError

if TYPE_CHECKING:
    from surgeon.convert import Converted


def command(
    folders: Annotated[list[Path], typer.Argument(help="Work or PEFT adapter folders; with --from one checkpoint.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Work folder to write.")] = Path("converted"),
    rank: Annotated[int, typer.Option(help="Highest rank of the result; default: what is exact.")] = 0,
    error: Annotated[float, typer.Option(help="Lowest rank whose relative error is at most this.")] = 0.0,
    combine: Annotated[str, typer.Option(help="Several adapters: sum, ties or dare.")] = "sum",
    weights: Annotated[str, typer.Option(help="Of several adapters: 0.7,0.3 (1 each).")] = "",
    density: Annotated[float, typer.Option(help="Share of entries that ties and dare keep.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of dare.")] = 0,
    origin: Annotated[Path | None, typer.Option("--from", help="The checkpoint that FOLDER was tuned from.")] = None,
    targets: Annotated[str, typer.Option(help="With --from: which modules may differ.")] = "all-linear",
    base: Annotated[Path | None, typer.Option(help="The base, if it moved since the adapter was made.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if it exists.")] = False,
    json: output.Json = False,
) -> None:
    """Write one LoRA, in PEFT's format, that does what the given adapters do.

    LoRA, DyLoRA, AdaLoRA, VeRA and QA-LoRA convert exactly, and so does their sum: ranks add up. What scales a weight
    (DoRA, IA³), TIES, DARE and the difference of two models are whole matrices: give --rank or --error, and read the
    error of every site.

    Examples:
        surgeon convert vera-work/ -o lora/
        surgeon convert work/ --rank 8 -o small/
        surgeon convert one/ two/ --combine ties --weights 0.6,0.4 --rank 16 -o both/
        surgeon convert tuned-model/ --from base-model/ --error 0.05 -o lora/
    """
    from surgeon import store

    made = _made(folders, rank, error, combine, weights, density, seed, origin, targets, base)
    store.save(made.graph, out, overwrite=overwrite)
    output.emit(_result(out, made), json, _view(made))
    if not json:
        worst = max(made.sites, key=lambda site: site.error)
        said = "exact" if made.exact else f"largest error {worst.error:.2%}, at {worst.path}"
        output.say(f"{said}\nnext: surgeon merge {out}, or load {out} with PEFT")


def _made(
    folders: list[Path],
    rank: int,
    error: float,
    combine: str,
    weights: str,
    density: float,
    seed: int,
    origin: Path | None,
    targets: str,
    base: Path | None,
) -> Converted:
    if rank < 0:
        raise UsageError(f"the rank is {rank}", "--rank", "a rank of at least 1, or leave it out")
    if not 0 <= error < 1:
        raise UsageError(f"the error is {error}", "--error", "a share below 1, for example 0.05")
    from surgeon import api, convert

    if origin is not None:
        if len(folders) != 1:
            raise UsageError(f"{len(folders)} folders with --from", "--from", "one tuned checkpoint at a time")
        tuned = api.read(folders[0])
        return convert.extract(api.read(origin), tuned.values, targets=targets, rank=rank, error=error)
    graphs = [api.read(folder, base=base) for folder in folders]
    numbers = _numbers(weights) if weights else [1.0] * len(graphs)
    return convert.combine(graphs, numbers, how=combine, density=density, seed=seed, rank=rank, error=error)


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(f"cannot read the weights '{text}'", "--weights", "numbers: 0.7,0.3") from error


def _result(out: Path, made: Converted) -> dict[str, Any]:
    worst = max(site.error for site in made.sites)
    return {"folder": out, "exact": made.exact, "max_error": worst, "sites": made.sites}


def _view(made: Converted) -> Any:
    rows = [(site.path, site.rank, "exact" if site.error == 0 else f"{site.error:.2%}") for site in made.sites]
    return output.table("", ("module", "rank", "error"), rows, right=("rank", "error"))
