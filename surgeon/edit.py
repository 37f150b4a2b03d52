"""The only way nodes are made: an `Edit` at one site of one layer graph.

It keeps written order, tags every node with the pass and site it belongs to, computes its `meta["val"]`, and registers
parameters for every layer that shares the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode

from surgeon import wiring
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph, Tag, TensorSpec, path_of, tag
from surgeon.initial import Init, Initial
from surgeon.quantised import HELD, WEIGHTS
from surgeon.sites import GIVEN, Site, _weights, argument_of, has_argument, input_position, source_of

aten = torch.ops.aten


class Edit:
    """One site being rewritten, for every layer in `paths` at once."""

    def __init__(self, graph: Graph, part: fx.Graph, paths: list[str], owner: str, site: Site, seed: int) -> None:
        self.graph, self.part, self.paths, self.owner, self.site, self.seed = graph, part, paths, owner, site, seed
        self.node = next(node for node in part.nodes if node.name == site.node)
        self.y = self._current_output()
        self._cursor = self.y

    @classmethod
    def of_trunk(cls, graph: Graph, owner: str, node: fx.Node | None = None) -> Edit:
        """An edit of the trunk at any node (a length, the mask, the logits): `y` is what stands for it now.

        Without a node at none in particular: what is written there is not taken out again.
        """
        inputs = [other for other in graph.trunk.nodes if other.op == "placeholder"]
        made = cls(graph, graph.trunk, [""], owner, Site("", "", "", (node or inputs[0]).name), 0)
        if node is not None and made.y.op == "placeholder":
            made.write_after(inputs[-1])
        return made

    @classmethod
    def of_input(cls, graph: Graph, owner: str, node: fx.Node) -> Edit:
        """An edit of the trunk at an input or a size read off one: what other passes make of it reads this one's.

        That is where the outermost function of the model's inputs stands.
        """
        made = cls.of_trunk(graph, owner, node)
        made.y = node
        made.write_after(
            [n for n in graph.trunk.nodes if n.op == "placeholder"][-1] if node.op == "placeholder" else node
        )
        return made

    def _current_output(self) -> fx.Node:
        current = self.node
        for node in self.part.nodes:
            found = node.meta.get("surgeon")
            if isinstance(found, Tag) and found.output and not found.outer and found.site == self.node.name:
                current = node
        return current

    @property
    def x(self) -> fx.Node:
        """The site's input (token ids, for an embedding)."""
        return self.argument(input_position(self.node))

    def argument(self, position: int) -> fx.Node:
        """An argument of the site's node as the model gives it, below what passes feed the site in its place."""
        return argument_of(self.node, position)

    def has(self, position: int) -> bool:
        """Whether the model gives the site's node this argument."""
        return has_argument(self.node, position)

    @property
    def below(self) -> str:
        """The id of the last pass that changed what the site returns or reads, "" for none."""
        returned, read = (tag(node) for node in (self.y, self.node.args[input_position(self.node)]))
        if returned is not None and self.y is not self.node:
            return returned.owner
        return read.owner if read is not None and read.input and read.site == self.node.name else ""

    @property
    def bias(self) -> fx.Node | None:
        """The site's own bias."""
        return _weights(self.node)[2]

    @property
    def weight(self) -> fx.Node:
        """The site's own weight, in the orientation it is stored in; dequantised here where it is held in codes."""
        if HELD in self.node.meta:
            made = self.call(WEIGHTS[self.node.target], *self.node.args[2:], **self.node.kwargs)
            return self.call(aten.t.default, made) if self.site.transposed else made
        weight = _weights(self.node)[1]
        if weight is None:
            raise UnsupportedError("this site has no weight", self.site.path)
        return weight

    def param(self, name: str, shape: tuple[int, ...], init: Init, *, trainable: bool = True) -> fx.Node:
        """A tensor of this site (see `Site.tensor` for its name) in every layer that shares the graph."""
        local = self.site.tensor(self.owner, name)
        prefix = f"{self.site.layer}." if self.site.layer else ""
        relative = local.removeprefix(prefix)
        for path in self.paths:
            self._register(f"{path}.{relative}" if path else relative, shape, init, trainable)
        return self._get(self.part, relative, shape, self.y)

    def keep(self, name: str, shape: tuple[int, ...]) -> None:
        """A tensor of this site that is stored with the adapter, and that the graph does not read."""
        local = self.site.tensor(self.owner, name)
        relative = local.removeprefix(f"{self.site.layer}." if self.site.layer else "")
        for path in self.paths:
            self._register(f"{path}.{relative}" if path else relative, shape, "zeros", False)

    def shared(self, name: str, shape: tuple[int, ...], init: Init, *, trainable: bool = False) -> fx.Node:
        """A tensor of the whole model, `<pass id>.<name>`, handed into the layer as an input."""
        full = f"{self.owner}.{name}"
        if full not in self.graph.tensors:
            self._register(full, shape, init, trainable)
        if self.site.layer == "":
            inputs = [node for node in self.part.nodes if node.op == "placeholder"]
            made = self._get(self.part, full, shape, inputs[-1].next if self.y in inputs else self.y)
            self._cursor = max(self._cursor, made)
            return made
        trunk = self.graph.trunk
        held = {path: self._get(trunk, full, shape, wiring.calls_of(trunk, path)[0]) for path in self.paths}
        return self.hand(full.replace(".", "_"), held)

    def once(self, label: str, make: Callable[[Edit], fx.Node]) -> fx.Node:
        """What `make` writes in the trunk, before the layers, computed once for all sites and handed into the layer."""
        full, trunk = f"{self.owner}.{label}", self.graph.trunk
        made = next((node for node in trunk.nodes if node.meta.get("once") == full), None)
        if made is None:
            edit = Edit.of_trunk(self.graph, self.owner)
            edit.y, edit.seed = edit.node, self.seed
            made = make(edit)
            made.meta["once"] = full
        if self.part is trunk:
            return made
        return self.hand(full.replace(".", "_"), dict.fromkeys(self.paths, made))

    def write_after(self, node: fx.Node) -> None:
        """The nodes that follow are written after `node` instead of after the site's output."""
        self._cursor = node

    def copy(self, node: fx.Node, instead: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """The same operation on other inputs."""
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: instead.get(n, n))
        return self.call(node.target, *args, **kwargs)

    def model_input(self, names: Mapping[str, str], label: str, like: fx.Node, shape: tuple[Any, ...]) -> fx.Node:
        """An input of the model for every layer that shares the graph, handed into the layer; the known one of a name.

        Args:
            names: layer path → name of the model's input.
            label: name of the layer's input.
            like: a node with its dtype.
            shape: its shape, with symbolic sizes.
        """
        with like.meta["val"].fake_mode:
            value = torch.empty(shape, dtype=like.meta["val"].dtype, device="meta")
        trunk = self.graph.trunk
        known = dict(zip(self.graph.inputs, wiring.inputs_of(trunk), strict=True))
        made = [known.get(names[p]) or self._labelled(wiring.add_input(trunk, names[p]), value) for p in self.paths]
        return made[0] if self.part is trunk else self.hand(label, dict(zip(self.paths, made, strict=True)))

    def common_input(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> fx.Node:
        """One input of the model that any layer may read, made when it is first asked for."""
        trunk = self.graph.trunk
        made = next(
            (n for n, known in zip(wiring.inputs_of(trunk), self.graph.inputs, strict=True) if known == name), None
        )
        if made is None:
            with self.shapes_only():
                value = torch.empty(shape, dtype=dtype, device="meta")
            made = self._labelled(wiring.add_input(trunk, name), value)
        return made if self.part is trunk else self.hand(name.replace(".", "_"), dict.fromkeys(self.paths, made))

    def model_output(self, node: fx.Node, names: Mapping[str, str]) -> None:
        """A node of this graph as an output of the model, for every layer that shares it; names by layer path."""
        inside = self.part is not self.graph.trunk
        position = wiring.add_result(self.part, node) if inside else -1
        for path in self.paths:
            result = node
            if inside:
                result = wiring.result_of(self.graph.trunk, path, position)
                self._labelled(result, node.meta["val"])
            wiring.add_result(self.graph.trunk, result)
            self.graph.outputs = (*self.graph.outputs, names[path])

    def hand(self, label: str, values: Mapping[str, fx.Node]) -> fx.Node:
        """A new input of the layer; what the trunk gives it, by layer path. The known one if the label is taken."""
        for node in self.part.nodes:
            if node.op == "placeholder" and node.target == label:
                return node
        for path in self.paths:
            for call in wiring.calls_of(self.graph.trunk, path):
                call.args = (*call.args, values[path])
        return self._labelled(wiring.add_input(self.part, label), next(iter(values.values())).meta["val"])

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A node after everything written so far at this site."""
        with self.part.inserting_after(self._cursor):
            node = self.part.call_function(target, args, kwargs)
        self._cursor = node
        value = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.shapes_only():
            return self._labelled(node, target(*value[0], **value[1]))

    def linear(self, x: fx.Node, weight: fx.Node) -> fx.Node:
        """`[.., in]` → `[.., out]`, x Wᵀ."""
        return self.call(aten.linear.default, x, weight)

    def mul(self, x: fx.Node, factor: fx.Node | float) -> fx.Node:
        """Elementwise product."""
        return self.call(aten.mul.Tensor, x, factor)

    def add(self, x: fx.Node, y: fx.Node) -> fx.Node:
        """Elementwise sum."""
        return self.call(aten.add.Tensor, x, y)

    def dropout(self, x: fx.Node, probability: float) -> fx.Node:
        """Dropout while training; x itself if the probability is 0."""
        return self.call(aten.dropout.default, x, probability, True) if probability else x

    def rows(self, x: fx.Node, count: int, axis: int = 0) -> fx.Node:
        """The first `count` entries along an axis; x itself if it has no more."""
        return x if x.meta["val"].shape[axis] == count else self.call(aten.slice.Tensor, x, axis, 0, count)

    def replace(self, node: fx.Node, keep: Collection[fx.Node] = (), *, outer: bool = False) -> None:
        """Everything that read the site's output now reads `node`, but for the readers in `keep`.

        With `outer`, passes that come later to this site write below it.
        """
        before = self.y
        node.meta["surgeon"] = Tag(self.owner, self.node.name, output=True, outer=outer)
        for user in [user for user in before.users if user not in keep and not self._is_here(user, self.owner)]:
            user.replace_input_with(before, node)
        self.y = node

    def feed(self, node: fx.Node) -> None:
        """The site, and what passes wrote there, now read `node` in place of what it was made from.

        That is `x` for `feed(mul(x, u))`, or another argument of the site's node (the keys of an attention). Passes are
        functions of functions: the later one is the outer one, so what the earlier ones compute sees its input too.
        """
        node.meta["surgeon"] = Tag(self.owner, self.node.name, input=True)
        source, made = source_of(node), self._made_for(node)
        readers = [user for user in source.users if user not in made and (user is self.node or self._is_here(user))]
        self._place(made, min(readers))
        for user in readers:
            user.replace_input_with(source, node)
        self._cursor = self._last_written()

    def give(self, position: int, node: fx.Node) -> None:
        """An optional argument of the site's node that the model does not give it."""
        count, args = len(self.node.args), list(self.node.args)
        self._place(self._made_for(node), self.node)
        self.node.args = (*args, *[None] * (position + 1 - count))
        self.node.update_arg(position, node)
        self._note(position, count)
        self._cursor = self._last_written()

    def raise_by(self, keyword: str, amount: int) -> None:
        """A number among the keywords of the site's node, 0 if the model does not give it, made larger."""
        self.node.kwargs = {**self.node.kwargs, keyword: self.node.kwargs.get(keyword, 0) + amount}
        self._note(keyword, amount)

    def _note(self, key: int | str, undo: int) -> None:
        self.node.meta[GIVEN] = (*self.node.meta.get(GIVEN, ()), (self.owner, key, undo))

    def _place(self, made: Collection[fx.Node], first: fx.Node) -> None:
        """Write nodes before the first that reads them."""
        position = {other: number for number, other in enumerate(self.part.nodes)}
        for other in sorted(made, key=position.__getitem__):
            if position[other] > position[first]:
                first.prepend(other)

    def _last_written(self) -> fx.Node:
        """Where to write on: after what this pass wrote behind the site and has not fed it yet."""
        return max([self.y, *(node for node in self.part.nodes if self._is_here(node, self.owner))])

    def _made_for(self, node: fx.Node) -> set[fx.Node]:
        """The node and what this pass wrote at this site to make it."""
        made, pending = set(), [node]
        while pending:
            current = pending.pop()
            if self._is_here(current, self.owner) and current.op != "placeholder" and current not in made:
                made.add(current)
                pending += current.all_input_nodes
        return made

    def _is_here(self, node: fx.Node, owner: str = "") -> bool:
        mark = tag(node)
        return mark is not None and mark.site == self.node.name and mark.owner == (owner or mark.owner)

    def _register(self, full: str, shape: tuple[int, ...], init: Init, trainable: bool) -> None:
        self.graph.tensors[full] = TensorSpec(shape, trainable=trainable, owner=self.owner, parameter=trainable)
        self.graph.inserted[full] = Initial(init, shape, self.seed, full) if isinstance(init, str) else init

    def _get(self, part: fx.Graph, target: str, shape: tuple[int, ...], before: fx.Node) -> fx.Node:
        for node in part.nodes:
            if node.op == "get_attr" and node.target == target:
                if before < node:
                    before.prepend(node)
                return node
        with part.inserting_before(before):
            node = part.create_node("get_attr", target)
        return self._labelled(node, self._fake(shape))

    def _fake(self, shape: tuple[int, ...]) -> torch.Tensor:
        with self.shapes_only():
            return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    def shapes_only(self) -> FakeTensorMode:
        """The mode under which the graph's metadata are made."""
        values = (node.meta.get("val") for node in self.part.nodes)
        return next(value.fake_mode for value in values if isinstance(value, FakeTensor))

    def _labelled(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta.update(val=value, path=path_of(self.node), surgeon=Tag(self.owner, self.node.name))
        return node
