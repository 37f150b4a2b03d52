"""One attention node for architectures that have code of their own for it.

Models that do not route through transformers' attention interface are captured with their softmax between two products.
Where that is provably what `surgeon::attention` computes, it becomes that node: the structure is read by
`surgeon.recognise_scores`, masks are described by `surgeon.recognise_masks`, and each new node is run against what it
replaces, on random operands with padding. Either all of a model's attentions are recognised or none is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from surgeon import wiring
from surgeon.graph import Graph, copied, path_of, sweep
from surgeon.recognise_masks import four_axes, token_rows
from surgeon.recognise_place import Place, alike, from_layer, is_view
from surgeon.recognise_scores import Attention, NotRecognised, candidates, read
from surgeon.recognise_values import Buffers, Impure, Sizes, Values
from surgeon.recognise_write import Written, write

_BOUND = 1e-5
_CHECKS = (Sizes(2, 6, 8, "left"), Sizes(3, 11, 13, "right"))


def recognise(graph: Graph, buffers: Buffers) -> tuple[Graph, str]:
    """The graph with an attention node for every attention and "", or the graph as it is and the reason why.

    Args:
        graph: as captured; it is not changed.
        buffers: full name → the value of a buffer that no checkpoint stores, None for anything else.
    """
    if not any(candidates(part) for part, _ in graph.parts()):
        return graph, "it has no softmax over keys"
    work = _copied(graph)
    try:
        with torch.no_grad():
            for place in _places(work, buffers):
                _rewrite(place)
    except NotRecognised as error:
        return graph, str(error)
    _drop_unread(work)
    return work, ""


def _copied(graph: Graph) -> Graph:
    work = graph.rewritable()
    for part, paths in work.groups():
        _drop_results(work, part, paths)
    return work


def _drop_results(graph: Graph, part: fx.Graph, paths: list[str]) -> None:
    """Take away results of a layer that the trunk does not read, attention weights above all."""
    items = [item for path in paths for call in wiring.calls_of(graph.trunk, path) for item in call.users]
    output = wiring.output_of(part)
    results: tuple[fx.Node, ...] = output.args[0]
    read_at = sorted({int(item.args[1]) for item in items})
    output.args = (tuple(results[position] for position in read_at),)
    for item in items:
        item.update_arg(1, read_at.index(int(item.args[1])))
    part.eliminate_dead_code(is_impure_node=wiring._acts)


def _places(graph: Graph, buffers: Buffers) -> Iterator[Place]:
    """The trunk and every layer graph that has attentions, apart for layers that are given different masks."""
    if candidates(graph.trunk):
        yield Place(graph, graph.trunk, [""], buffers)
    for part, paths in graph.groups():
        if not candidates(part):
            continue
        kinds: dict[object, list[str]] = {}
        for path in paths:
            kinds.setdefault(_given(graph, part, path, buffers), []).append(path)
        fresh = [part, *(copied(part)[0] for _ in range(len(kinds) - 1))]
        for own, same in zip(fresh, kinds.values(), strict=True):
            graph.layers.update(dict.fromkeys(same, own))
            yield Place(graph, own, same, buffers)


def _given(graph: Graph, part: fx.Graph, path: str, buffers: Buffers) -> object:
    """What tells layers of one graph apart: masks and tables they are given, and buffers of their own."""
    calls = wiring.calls_of(graph.trunk, path)
    handed = tuple(arg for call in calls for arg in call.args if not from_layer(arg))
    names = [str(node.target) for node in part.nodes if node.op == "get_attr"]
    held = [(name, buffers(f"{path}.{name}")) for name in names if _is_buffer(graph, f"{path}.{name}")]
    return handed, tuple((name, None if x is None else x.double().numpy().tobytes()) for name, x in held)


def _is_buffer(graph: Graph, name: str) -> bool:
    spec = graph.tensors.get(name)
    return spec is not None and not spec.parameter and not spec.persistent


def _rewrite(place: Place) -> None:
    """Replace every attention of one part."""
    for node in candidates(place.part):
        try:
            _replace(place, read(node))
        except (NotRecognised, RuntimeError, TypeError, ValueError, IndexError) as error:
            where = ".".join(filter(None, (place.paths[0], path_of(node))))
            raise NotRecognised(": ".join(filter(None, (where, *str(error).splitlines()[:1])))) from None


def _replace(place: Place, attention: Attention) -> None:
    written = write(place, attention)
    for sizes in _CHECKS:
        _check(place.values(sizes, evaluation=True), attention, written)
    output = attention.output
    for user in list(output.users):
        same = is_view(user) and alike(user, written.node)
        user.replace_input_with(output, written.node if same else written.output)
        if same:
            user.replace_all_uses_with(written.node)
    place.part.eliminate_dead_code(is_impure_node=wiring._acts)
    for node in sorted({*attention.spine, output}, reverse=True):
        if node.graph is place.part and not node.users and node in set(place.part.nodes):
            place.part.erase_node(node)
            place.part.eliminate_dead_code(is_impure_node=wiring._acts)


def _check(values: Values, attention: Attention, written: Written) -> None:
    """Run the old attention and the new on random operands.

    Raises:
        NotRecognised: they differ at a token.
    """
    generator = torch.Generator().manual_seed(1)
    for node in written.operands:
        values.known[node] = values.random(node, generator)
    for node in written.leaves:
        try:
            values(node)
        except Impure:
            drawn = values.random(node, generator)
            values.known[node] = drawn > -1 if node.meta["val"].dtype == torch.bool else drawn
    try:
        old, new = values(attention.output), values(written.output)
    except Impure as error:
        raise NotRecognised(f"its arithmetic reads {error}") from None
    rank, heads = old.dim(), attention.heads
    old, new = (four_axes(x, rank, heads).transpose(1, 2) for x in (old, new))
    rows = token_rows(values, old.shape[1])
    difference = (old - new)[rows].abs().max() / old[rows].abs().max()
    if not bool(difference <= _BOUND):
        raise NotRecognised(f"one attention node computes something else, by {float(difference):.1g}")


def _drop_unread(graph: Graph) -> None:
    """Inputs of layers that no node reads any more, and what the trunk computed for them."""
    for part, paths in graph.groups():
        sweep(part)
        inputs = wiring.inputs_of(part)
        keep = [bool(node.users) for node in inputs]
        for call in (call for path in paths for call in wiring.calls_of(graph.trunk, path)):
            call.args = tuple(arg for arg, kept in zip(call.args, keep, strict=True) if kept)
        for node in inputs:
            if not node.users:
                part.erase_node(node)
        part.lint()
    sweep(graph.trunk)
    graph.trunk.lint()
