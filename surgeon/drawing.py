"""A layer's blocks as an SVG that takes its colours from the page it is in."""

from __future__ import annotations

import itertools
from html import escape

from torch import fx

from surgeon.blocks import Block, blocks
from surgeon.layout import Layout, layout

_HEIGHT, _GAP, _MARGIN, _SIGN = 42.0, 26.0, 12.0, 26.0


def draw(part: fx.Graph, label: str) -> str:
    """The SVG of a layer; classes say what a block is, and `new` what a pass inserted."""
    found = blocks(part)
    index = {id(block): position for position, block in enumerate(found)}
    reads = [[index[id(source)] for source in block.reads] for block in found]
    placed = layout([_width(block) for block in found], reads)
    width, height = placed.width + 2 * _MARGIN, placed.rows * (_HEIGHT + _GAP) - _GAP + 2 * _MARGIN
    lines = [
        f'<svg class="layer" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'role="img" aria-label="{escape(label)}">'
    ]
    for target, sources in enumerate(reads):
        lines += [_edge(found, placed, source, target) for source in sources]
    lines += [_box(block, placed, position) for position, block in enumerate(found)]
    return "\n".join([*lines, "</svg>"])


def _width(block: Block) -> float:
    if block.kind == "sign":
        return _SIGN
    return max(46.0, 7.4 * len(block.title) + 22, 6.1 * len(block.detail) + 22)


def _height(block: Block) -> float:
    if block.kind == "sign":
        return _SIGN
    return _HEIGHT if block.detail else 28.0


def _centre(placed: Layout, position: int) -> tuple[float, float]:
    return _MARGIN + placed.x[position], _row(placed.rank[position])


def _row(rank: int) -> float:
    return _MARGIN + rank * (_HEIGHT + _GAP) + _HEIGHT / 2


def _edge(found: list[Block], placed: Layout, source: int, target: int) -> str:
    x, y = _centre(placed, source)
    points = [(x, y + _height(found[source]) / 2)]
    for step, lane in enumerate(placed.lanes[source, target]):
        middle = _row(placed.rank[source] + 1 + step)
        points += [(_MARGIN + lane, middle - _HEIGHT / 2), (_MARGIN + lane, middle + _HEIGHT / 2)]
    x, y = _centre(placed, target)
    points.append((x, y - _height(found[target]) / 2))
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        bend = (y1 - y0) / 2
        path += f" C{x0:.1f} {y0 + bend:.1f} {x1:.1f} {y1 - bend:.1f} {x1:.1f} {y1:.1f}"
    new = bool(found[source].owner or (found[target].owner and found[target].kind != "sign"))
    return f'<path class="edge{" new" if new else ""}" d="{path}"/>'


def _box(block: Block, placed: Layout, position: int) -> str:
    x, y = _centre(placed, position)
    style = f"block {block.kind}{' new' if block.owner else ''}"
    tip = f"<title>{escape(' · '.join(filter(None, [block.owner, block.title, block.detail])))}</title>"
    if block.kind == "sign":
        return (
            f'<g class="{style}">{tip}<circle cx="{x:.1f}" cy="{y:.1f}" r="{_SIGN / 2}"/>'
            f'<text x="{x:.1f}" y="{y:.1f}">{escape(block.title)}</text></g>'
        )
    width, height = _width(block), _height(block)
    rect = (
        f'<rect x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'rx="{height / 2 if block.kind in ("input", "output") else 8}"/>'
    )
    title = f'<text x="{x:.1f}" y="{y - 7 if block.detail else y:.1f}">{escape(block.title)}</text>'
    detail = f'<text class="detail" x="{x:.1f}" y="{y + 9:.1f}">{escape(block.detail)}</text>' if block.detail else ""
    return f'<g class="{style}">{tip}{rect}{title}{detail}</g>'
