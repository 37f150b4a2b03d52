"""The arithmetic of a low-rank bypass, y + s · up(down(x)), for each kind of place it stands beside.

At every place a and b are matrices, with the rank on the last axis but one of a and on the last axis of b (experts and
parts of a projection have one axis more in front). `bypass_at` gives the `Bypass` of a site: the shapes, the nodes of
down and up, what the pair is in the normal form and in PEFT's files, and what it costs. Methods decide what stands
between: a scale, diag(λ), a mask.
"""

from __future__ import annotations

from surgeon.bypass_conv import ConvBypass
from surgeon.bypass_linear import BatchedExpertBypass, Bypass, ExpertBypass, TableBypass
from surgeon.bypass_parts import PartsBypass
from surgeon.errors import UsageError
from surgeon.parts import Layout
from surgeon.select import numbers
from surgeon.sites import CONV, EMBEDDING, EXPERTS, Site

__all__ = ["Bypass", "bypass_at"]

_KINDS: dict[str, type[Bypass]] = {EMBEDDING: TableBypass, EXPERTS: ExpertBypass, CONV: ConvBypass}


def bypass_at(
    site: Site, rank: int, layout: Layout | None = None, parts: tuple[str, ...] = (), experts: str = ""
) -> Bypass:
    """The bypass of this rank at a site, or of this rank for each of some parts of it, or for some of its experts.

    Raises:
        UsageError: there is no expert of a number that `experts` names.
    """
    if layout is not None and not (len(layout.runs) == 1 and layout.parts[0] in parts):
        return PartsBypass(site, rank, layout, tuple(part for part in layout.parts if part in parts))
    if experts and site.kind == EXPERTS:
        chosen = numbers(experts, "--experts")
        if chosen[-1] >= site.experts:
            what = f"there is no expert {chosen[-1]}"
            raise UsageError(what, f"{site.path} has {site.experts} experts", f"numbers from 0 to {site.experts - 1}")
        return (BatchedExpertBypass if site.batched else ExpertBypass)(site, rank, chosen)
    kind = BatchedExpertBypass if site.batched else _KINDS.get(site.kind, Bypass)
    return kind(site, rank)
