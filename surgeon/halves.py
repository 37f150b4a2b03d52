"""An encoder-decoder cut in two: an encoder that returns its states, and a decoder that is given them.

A runtime calls the first once for a text, and the second for every token. What the decoder makes of the states, the
keys and values of its attentions over them, is the same for every token: with a cache (`surgeon.passes.kv_cache`) it is
computed for those states alone that have none there yet, all of them in the first call and none in the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from surgeon import lengths, virtual, wiring
from surgeon.edit import Edit
from surgeon.errors import UnsupportedError
from surgeon.graph import INPUT, Graph, tag, val
from surgeon.sites import argument_of

aten = torch.ops.aten
STATES, RESULT = "encoder_hidden_states", "last_hidden_state"
IDS, MASK = "decoder_input_ids", "decoder_attention_mask"
_END = 2**63 - 1


def encoder_of(graph: Graph) -> Graph:
    """`input_ids`, `attention_mask` → `last_hidden_state` `[b, s, h]`.

    Raises:
        UnsupportedError: the decoder reads anything but one result of the encoder.
    """
    result, found = graph.rewritable(), _states(graph).name
    states = next(node for node in result.trunk.nodes if node.name == found)
    wiring.output_of(result.trunk).args = ((states,),)
    result.outputs, result.task = (RESULT,), "features"
    wiring.prune(result)
    return result


def decoder_of(graph: Graph) -> Graph:
    """`attention_mask` of the encoder's tokens, `decoder_input_ids`, `encoder_hidden_states` → the model's outputs.

    Its own tokens are never padding: the decoder's mask is gone.

    Raises:
        UnsupportedError: the decoder reads anything but one result of the encoder, or its mask outside of attentions.
    """
    result, found = graph.rewritable(), _states(graph).name
    states = next(node for node in result.trunk.nodes if node.name == found)
    given = wiring.add_input(result.trunk, STATES)
    given.meta["val"] = _as_long_as_its_text(graph, val(states))
    states.replace_all_uses_with(given)
    _unmask(result)
    sizes_off_the_decoder(result)
    wiring.prune(result)
    if left := [name for name in result.inputs if name in ("input_ids", MASK)]:
        what = f"the decoder of {graph.config.model_type} reads {left[0]} outside of its attentions"
        raise UnsupportedError(what, graph.source)
    return result


def renamed(graph: Graph, names: dict[str, str]) -> Graph:
    """The graph with other names for some of its inputs."""
    result = graph.rewritable()
    for node in wiring.inputs_of(result.trunk):
        name = str(node.meta.get(INPUT, node.target))
        node.meta[INPUT] = names.get(name, name)
    return result


def _as_long_as_its_text(graph: Graph, states: torch.Tensor) -> torch.Tensor:
    """The states' shape, with those of the virtual tokens before the text."""
    ids = next(node for node in wiring.inputs_of(graph.trunk) if node.target == "input_ids")
    shape, mode = (
        (states.shape[0], val(ids).shape[1] + virtual.count(graph), states.shape[2]),
        ids.meta["val"].fake_mode,
    )
    with mode:
        return torch.empty(shape, dtype=states.dtype, device="meta")


def states_length(graph: Graph) -> Any:
    """How many states a decoder is given, a symbolic size."""
    return val(dict(zip(graph.inputs, wiring.inputs_of(graph.trunk), strict=True))[STATES]).shape[1]


def is_decoder(graph: Graph) -> bool:
    """Whether a graph is the second half."""
    return STATES in graph.inputs


def sizes_off_the_decoder(graph: Graph) -> None:
    """Read the batch size and the encoder's length, which are read off `input_ids`, off what a decoder is given."""
    inputs = {str(node.target): node for node in wiring.inputs_of(graph.trunk)}
    for node in list(inputs["input_ids"].users):
        if node.target is aten.sym_size.int:
            node.update_arg(0, inputs[IDS if node.args[1] == 0 else "attention_mask"])


def by_new_states(edit: Edit) -> None:
    """At an attention over the encoder's states: keys and values of as many states as the layer is given.

    There may be none of them, so that no size can be left to be found out.
    """
    chain = lengths.ancestors([edit.argument(1), edit.argument(2)])
    states = next(node for node in chain if node.op == "placeholder" and tag(node) is None)
    length = lengths.symbol(val(states).shape[1])
    edit.write_after(wiring.inputs_of(edit.part)[-1])
    count = edit.call(aten.sym_size.int, states, 1)
    for node in chain:
        for position, argument in enumerate(node.args):
            if isinstance(argument, list | tuple):
                sizes = [_size(size, axis, node, length, count) for axis, size in enumerate(argument)]
                node.update_arg(position, sizes)


def _size(size: Any, axis: int, node: fx.Node, length: str, count: fx.Node) -> Any:
    """What a node says of one axis of its result."""
    if lengths.is_length(size, length):
        return count
    shape = val(node).shape
    return int(shape[axis]) if size == -1 and axis < len(shape) and isinstance(shape[axis], int) else size


def new_states(graph: Graph, owner: str) -> None:
    """Give a decoder's layers the states that have no keys and values in the cache."""
    inputs = dict(zip(graph.inputs, wiring.inputs_of(graph.trunk), strict=True))
    states, past = inputs[STATES], inputs["past_key_values.0.encoder.key"]
    edit = Edit.of_trunk(graph, owner)
    edit.write_after(wiring.inputs_of(graph.trunk)[-1])
    known = edit.call(aten.sym_size.int, past, 2)
    fresh = edit.call(aten.slice.Tensor, states, 1, known, _END)
    fresh.meta["val"] = val(states)
    states.replace_all_uses_with(fresh, delete_user_cb=lambda user: user is not fresh)


def _states(graph: Graph) -> fx.Node:
    """The value of the trunk that the decoder's attentions over the encoder's states are given."""
    found: set[fx.Node] = set()
    for part, paths in graph.groups():
        cross = [node for node in lengths.attentions(part) if node.kwargs.get("role") == "cross"]
        read = set(lengths.ancestors([argument_of(node, position) for node in cross for position in (1, 2)]))
        calls = [call for path in paths for call in wiring.calls_of(graph.trunk, path)]
        pairs = [pair for call in calls for pair in lengths.fed(part, call)]
        found |= {given for inner, given in pairs if inner in read and tag(inner) is None}
    if len(found) != 1:
        what = f"the decoder of {graph.config.model_type} reads {len(found)} results of the encoder, and not one"
        raise UnsupportedError(what, graph.source, "methods and targets for encoder-decoders: T5, BART and their kin")
    return found.pop()


def _unmask(graph: Graph) -> None:
    """Take the decoder's own mask away from its attentions, which are causal and see the columns before them anyway."""
    for part, paths in graph.groups():
        calls = [call for path in paths for call in wiring.calls_of(graph.trunk, path)]
        masks = {
            inner
            for call in calls
            for inner, given in lengths.fed(part, call)
            if any(str(origin.target) == MASK for origin in lengths.ancestors([given]))
        }
        for node in lengths.attentions(part):
            if len(node.args) > 3 and masks & set(lengths.ancestors([node.args[3]])):
                node.update_arg(3, None)
