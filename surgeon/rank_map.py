"""Ranks by layer and module, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path


def grid(paths: Iterable[str]) -> tuple[list[int], list[tuple[str, list[str]]]]:
    """The numbers of the layers, and for every module of a layer the paths it has in them ("" where it has none).

    `model.layers.3.mlp.up_proj` stands in the row `mlp.up_proj`, in the column 3; modules of no layer are left out.
    Where there are several lists of layers, rows begin with the list's name.
    """
    found = []
    for path in paths:
        words = path.split(".")
        number = next((position for position, word in enumerate(words) if word.isdigit()), None)
        if number is not None:
            found.append((".".join(words[:number]), ".".join(words[number + 1 :]), int(words[number]), path))
    several = len({stem for stem, *_ in found}) > 1
    rows: dict[str, dict[int, str]] = {}
    for stem, module, layer, path in found:
        rows.setdefault(f"{stem}.{module}" if several else module, {})[layer] = path
    layers = sorted({layer for _, _, layer, _ in found})
    return layers, [(name, [row.get(layer, "") for layer in layers]) for name, row in rows.items()]


def draw_ranks(ranks: Mapping[str, int], image: Path) -> None:
    """Draw the ranks, by site path, as a heat map in a PNG; modules of no layer are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from surgeon.atomic import atomic_file

    layers, rows = grid(ranks)
    figure = Figure(figsize=(2.5 + 0.42 * max(len(layers), 4), 1.4 + 0.36 * max(len(rows), 2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    highest = max(ranks.values(), default=0)
    values = [[ranks.get(path, float("nan")) for path in paths] for _, paths in rows] or [[float("nan")]]
    axes.imshow(values, cmap="Oranges", vmin=0, vmax=max(highest, 1), aspect="auto")
    for row, (_, paths) in enumerate(rows):
        for column, path in enumerate(paths):
            if path:
                dark = ranks[path] > 0.6 * highest
                axes.text(
                    column, row, str(ranks[path]), ha="center", va="center", color="w" if dark else "k", fontsize=8
                )
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlabel("layer")
    mean = sum(ranks.values()) / max(len(ranks), 1)
    axes.set_title(f"rank of each module, {mean:.2f} on average", loc="left", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    with atomic_file(image) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
