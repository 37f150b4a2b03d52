"""Which sites a target pattern names in a graph; the patterns themselves are in `surgeon.select`."""

from __future__ import annotations

from collections.abc import Sequence

from surgeon.graph import Graph
from surgeon.select import ALL_EXPERTS, ALL_LINEAR, ATTENTION_LINEAR, check_words, matches, words
from surgeon.sites import ATTENTION, CONV1D, EXPERTS, LINEAR, Site, sites

_HEADS = ("lm_head", "score", "classifier", "qa_outputs", "embed_out", "output_projection")


def targeted(graph: Graph, candidates: Sequence[Site], targets: str, exclude: str) -> list[Site]:
    """Those of the candidates that `targets` names and `exclude` does not.

    Raises:
        UsageError: a word of `targets` names none of them.
    """
    check_words(targets, [site.path for site in candidates])
    reserved, head = words(targets), head_paths(graph)
    attentions = tuple(f"{site.path}." for site in sites(graph, ATTENTION)) if ATTENTION_LINEAR in reserved else ()

    def named(site: Site) -> bool:
        linear = site.kind in (LINEAR, CONV1D) and site.path not in head
        if linear and (ALL_LINEAR in reserved or site.path.startswith(attentions)):
            return True
        if site.kind == EXPERTS and ALL_EXPERTS in reserved:
            return True
        return matches(targets, site.path)

    return [site for site in candidates if named(site) and not matches(exclude, site.path)]


def unnamed_experts(graph: Graph, targets: str, exclude: str) -> list[Site]:
    """The experts that `all-linear` leaves out, where no other word of `targets` names them."""
    if ALL_LINEAR not in words(targets) or ALL_EXPERTS in words(targets):
        return []
    return [s for s in sites(graph, EXPERTS) if not matches(targets, s.path) and not matches(exclude, s.path)]


def head_paths(graph: Graph) -> set[str]:
    """The paths of the output head: the last linear of the trunk, and task heads."""
    trunk = [site for site in sites(graph, LINEAR, CONV1D) if site.layer == ""]
    last = {trunk[-1].path} if trunk and graph.outputs[:1] == ("logits",) else set()
    return last | {site.path for site in trunk if site.path.split(".")[0] in _HEADS}
