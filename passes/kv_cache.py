"""K/V cache: keys and values of earlier tokens come in, those of all tokens go out.

softmax(q · cat(past_k, k)ᵀ) cat(past_v, v): the same function of the whole text, computed a few tokens at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgeon.errors import UnsupportedError, UsageError
from surgeon.passes.base import ATTENTION, Pass, Skip

if TYPE_CHECKING:
    from torch import fx

    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.sites import Site

BOTH, PREFILL, STEP = "both", "prefill", "step"
_INSTEAD = "generate without a cache: use_cache=False"
_MASKS = ("attention_mask", "decoder_attention_mask")
_TEXT = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class KvCache(Pass):
    """Keys and values as inputs and outputs of the model.

    `past_key_values.{i}.key` and `.value`, `[b, h_kv, past, d]`, are inputs; `present.{i}.key` and `.value`,
    `[b, h_kv, past + t, d]`, are outputs. `attention_mask` is `[b, past + t]`; `position_ids` are those of the t new
    tokens. An empty past is a prefill. Attentions that read one K/V (Gemma 3n) have one cache between them; caches are
    numbered in the order of the model.

    Encoder-decoder models have two kinds, `{i}.decoder.key` and `{i}.encoder.key`, and two graphs.

    Options:
        phase: "both" for decoders, with a past or an empty one; the encoder's states have theirs too (see
            `surgeon.halves`). "prefill" has no past. "step" has one; for an encoder-decoder model it also takes the
            keys and values of the encoder's states, which "prefill" returns, and has no encoder.
    """

    name: ClassVar[str] = "kv_cache"
    keeps: ClassVar[str] = "exact"
    stacks: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = (ATTENTION,)
    phase: str = BOTH

    def __post_init__(self) -> None:
        if self.phase not in (BOTH, PREFILL, STEP):
            raise UsageError(f"kv_cache: phase is '{self.phase}'", "--phase", f"{BOTH}, {PREFILL} or {STEP}")

    def requires(self, graph: Graph) -> None:
        """Raise for a model that does not generate, or whose tokens meet anywhere but in attention nodes."""
        from surgeon import halves, lengths
        from surgeon.run import require_node

        model = graph.config.model_type
        if graph.task not in ("causal-lm", "seq2seq-lm"):
            what = f"kv_cache needs a model that generates; this one was captured for {graph.task}"
            raise UnsupportedError(what, model, "capture it with task='causal-lm'")
        if _seq2seq(graph) and not halves.is_decoder(graph) and self.phase == BOTH:
            what = "kv_cache: an encoder-decoder model has two graphs"
            raise UsageError(what, model, f"phase='{PREFILL}' and phase='{STEP}'")
        require_node(graph, ATTENTION, self.name)
        place = lengths.mixing(graph)
        if place:
            what = f"kv_cache: {model} carries state from token to token that is no key or value"
            raise UnsupportedError(what, place, _INSTEAD)

    def match(self, graph: Graph) -> list[Site | Skip]:
        """The decoder's attentions; an encoder's run once and have no cache."""
        from surgeon import lengths
        from surgeon.sites import sites

        length = lengths.length_of(graph)
        parts = {**graph.layers, "": graph.trunk}
        decoder = {(id(p), n.name) for p in parts.values() for n in lengths.attentions(p) if lengths.axes(n, length)}
        return [site for site in sites(graph, *self.kinds) if (id(parts[site.layer]), site.node) in decoder]

    def rewrite(self, edit: Edit, site: Site) -> None:
        """k, v → cat(past k, k), cat(past v, v); masks for all tokens; positions from past on."""
        node = edit.node
        if _is_cross(node):
            self._encoder_states(edit)
            return
        if not node.kwargs.get("causal") and not _biased(node):
            raise UnsupportedError("kv_cache: this attention sees later tokens, which are not known yet", site.path)
        if not _is_borrowed(edit):
            self._cache(edit)
        if self.phase != PREFILL:
            _lengthen_masks(edit)
            _shift_positions(edit)

    def finish(self, graph: Graph, owner: str) -> None:
        """What the trunk computes for its layers; the order of inputs and outputs; in a step no encoder."""
        from surgeon import halves, lengths, wiring
        from surgeon.edit import Edit

        if self.phase != PREFILL:
            edit = Edit.of_trunk(graph, owner)
            _lengthen_trunk(edit)
            _shift_positions(edit)
            lengths.lengthen_input(graph)
        wiring.order(graph, _place)
        if self.phase == STEP and _seq2seq(graph):
            halves.sizes_off_the_decoder(graph)
            wiring.prune(graph)
        if self.phase == BOTH and halves.is_decoder(graph):
            halves.new_states(graph, owner)

    def ensures(self, result: Graph) -> None:
        """Raise UnsupportedError if the shapes do not fit when there is a past."""
        from surgeon.dry_run import dry_run

        try:
            dry_run(result)
        except RuntimeError as error:
            what = f"kv_cache: {result.config.model_type} mixes the length of the text with that of the new tokens"
            raise UnsupportedError(what, str(error).splitlines()[0], _INSTEAD) from error

    def _cache(self, edit: Edit) -> None:
        for position, word in ((1, "key"), (2, "value")):
            new = edit.argument(position)
            if self.phase != PREFILL:
                new = _after_past(edit, new, word, *_past(edit, new))
            edit.model_output(new, _names(edit, "present", word))

    def _encoder_states(self, edit: Edit) -> None:
        """Cross-attention: its keys and values do not change from token to token."""
        from surgeon import halves

        if self.phase == BOTH:
            halves.by_new_states(edit)
        for position, word in ((1, "key"), (2, "value")):
            given = edit.argument(position)
            shape = tuple(given.meta["val"].shape)
            if self.phase == STEP:
                names = _names(edit, "past_key_values", word)
                held = edit.model_input(names, _input(edit, word), given, shape)
                for node in _readers(edit, given):
                    node.replace_input_with(given, held)
                continue
            if self.phase == BOTH:
                new = given
                whole = (*shape[:2], halves.states_length(edit.graph), shape[3])
                given = _after_past(edit, new, word, new, whole)
                given.meta["val"] = new.meta["val"]  # of a later call: all are in the past
            edit.model_output(given, _names(edit, "present", word))


def _after_past(edit: Edit, new: fx.Node, word: str, like: fx.Node, shape: tuple[object, ...]) -> fx.Node:
    """cat(past, new) in the place of new."""
    import torch

    from surgeon.graph import Tag

    past = edit.model_input(_names(edit, "past_key_values", word), _input(edit, word), like, shape)
    readers = _readers(edit, new)
    edit.write_after(min(readers).prev)
    whole = edit.call(torch.ops.aten.cat.default, [past, new], 2)
    whole.meta["surgeon"] = Tag(edit.owner, edit.node.name, input=True)
    for node in readers:
        node.replace_input_with(new, whole)
    return whole


def _seq2seq(graph: Graph) -> bool:
    return "decoder_input_ids" in graph.inputs


def _is_cross(node: fx.Node) -> bool:
    return bool(node.kwargs.get("role") == "cross")


def _biased(node: fx.Node) -> bool:
    from surgeon.sites import has_argument

    return has_argument(node, 4)


def _is_borrowed(edit: Edit) -> bool:
    """Whether the keys are another attention's: handed in by an earlier layer, or already with their past."""
    from surgeon.graph import tag

    keys = edit.argument(1)
    mark = tag(keys)
    return _source(edit.node, 1).op == "placeholder" or (mark is not None and mark.owner == edit.owner)


def _source(node: fx.Node, position: int) -> fx.Node:
    """Keys (1) or values (2) as the model computes them, without their past and what passes put before it."""
    from surgeon.graph import tag
    from surgeon.sites import argument_of, source_of

    found = argument_of(node, position)
    mark = tag(found)
    return source_of(found) if mark is not None and mark.input else found


def _readers(edit: Edit, value: fx.Node) -> list[fx.Node]:
    """Who reads keys or values: the site and attentions that read the same two, what passes wrote there, later layers.

    Attentions of one layer that read the same keys and other values have a cache each.
    """
    from surgeon import lengths
    from surgeon.graph import tag

    same = [n for n in lengths.attentions(edit.part) if all(_source(n, i) is edit.argument(i) for i in (1, 2))]
    names = {node.name for node in same}
    mine = [node for node in value.users if (mark := tag(node)) and mark.site in names]
    return [*mine, *(node for node in value.users if node in same or node.op == "output")]


def _label(node: fx.Node) -> str:
    """What a graph calls the keys and values of one of its attentions."""
    return node.name if _is_cross(node) else f"{_source(node, 1).name} {_source(node, 2).name}"


def _names(edit: Edit, stem: str, word: str) -> dict[str, str]:
    """The model's input or output for this site, by layer path."""
    cross, seq2seq = _is_cross(edit.node), _seq2seq(edit.graph)
    kind = ("encoder." if cross else "decoder.") if seq2seq else ""
    label, numbers = _label(edit.node), _numbers(edit, cross)
    return {path: f"{stem}.{numbers[path, label]}.{kind}{word}" for path in edit.paths}


def _input(edit: Edit, word: str) -> str:
    """The name of a layer's own input: its attentions are counted, not named after the trace."""
    from surgeon import lengths

    return f"past_{lengths.attentions(edit.part).index(edit.node)}_{word}"


def _numbers(edit: Edit, cross: bool) -> dict[tuple[str, str], int]:
    """(layer, keys) → number of its cache, in the order of the model; cross-attentions are counted apart."""
    from surgeon import lengths

    length, numbers = lengths.length_of(edit.graph), dict[tuple[str, str], int]()
    parts = {**edit.graph.layers, **dict.fromkeys(edit.paths, edit.part)}
    for step in edit.graph.trunk.nodes:
        path = str(step.target) if step.op == "call_module" else ""
        inner = lengths.attentions(parts[path]) if path else [step] if step.target is lengths.ATTENTION_OP else []
        for node in inner:
            borrowed = not cross and _source(node, 1).op == "placeholder"
            if _is_cross(node) is cross and lengths.axes(node, length) and not borrowed:
                numbers.setdefault((path, _label(node)), len(numbers))
    return numbers


def _past(edit: Edit, new: fx.Node) -> tuple[fx.Node, tuple[object, ...]]:
    """What a past looks like: `new` with as many tokens as there were before."""
    from surgeon import lengths

    batch, heads, _, size = new.meta["val"].shape
    return new, (batch, heads, lengths.past_symbol(edit.graph), size)


def _lengthen_masks(edit: Edit) -> None:
    """Key masks and biases that this graph computes, for all tokens."""
    from surgeon import lengths

    length = lengths.length_of(edit.graph)
    for position in (3, 4):
        mask = edit.argument(position) if edit.has(position) else None
        if mask is not None and mask.op != "placeholder" and lengths.grows(mask, length):
            _check_text(edit, mask)
            whole = lengths.extended(edit, mask, length, rows=position == 4)
            mask.replace_all_uses_with(whole, delete_user_cb=lambda user, whole=whole: user is not whole)


def _check_text(edit: Edit, mask: fx.Node) -> None:
    """Raise UnsupportedError for a bias that is computed from the text's own states: those of old tokens are gone."""
    from surgeon import lengths, wiring

    inner = set(lengths.ancestors([mask]))
    for call in (call for path in edit.paths if path for call in wiring.calls_of(edit.graph.trunk, path)):
        for node, given in lengths.fed(edit.part, call):
            origins = lengths.ancestors([given]) if node in inner else []
            if any(origin.op == "call_module" or str(origin.target) in _TEXT for origin in origins):
                what = f"kv_cache: the attention's bias in {edit.graph.config.model_type} is computed from the text"
                raise UnsupportedError(what, edit.site.path, _INSTEAD)


def _shift_positions(edit: Edit) -> None:
    """Counts of the new tokens start at the number of the old ones."""
    import torch

    from surgeon import lengths
    from surgeon.graph import sweep

    sweep(edit.part)
    for node in lengths.positions(edit.part, lengths.length_of(edit.graph)):
        if node.meta.setdefault("shifted_by", edit.owner) != edit.owner or len(node.users) == 0:
            continue
        past = lengths.sizes(edit)[0]
        edit.write_after(node)
        moved = edit.call(torch.ops.aten.add.Tensor, node, past)
        node.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)


def _lengthen_trunk(edit: Edit) -> None:
    """Key masks and biases that the trunk computes for its layers."""
    from surgeon import lengths
    from surgeon.sites import argument_of

    graph, length = edit.graph, lengths.length_of(edit.graph)
    known: dict[tuple[fx.Node, bool], fx.Node] = {}
    for call in [node for node in graph.trunk.nodes if node.op == "call_module"]:
        layer = graph.layers[str(call.target)]
        masks = set(lengths.ancestors(lengths.masks_of(layer, cross=False)))
        biases = {argument_of(node, 4) for node in lengths.attentions(layer) if _biased(node)}
        for position, (inner, given) in enumerate(lengths.fed(layer, call)):
            if inner not in masks or not lengths.grows(given, length) or lengths.comes_from_layer(given):
                continue
            _check_origin(graph, given)
            key = (given, inner in biases)
            if key not in known:
                known[key] = lengths.extended(edit, given, length, rows=key[1])
            call.update_arg(position, known[key])


def _check_origin(graph: Graph, mask: fx.Node) -> None:
    from surgeon import lengths

    for node in lengths.ancestors([mask]):
        if node.op == "placeholder" and str(node.target) not in _MASKS:
            what = f"kv_cache: an attention mask of {graph.config.model_type} is computed from {node.target}"
            raise UnsupportedError(what, mask.name, _INSTEAD)


def _place(name: str) -> tuple[int, int, str]:
    found = re.fullmatch(r"(?:past_key_values|present)\.(\d+)\.(.+)", name)
    return (1, int(found[1]), found[2]) if found else (0, 0, "")
