"""Adapter folders, of PEFT and of surgeon, as rows for the pool: every method through its normal form.

An adapter is served whole or not at all: a tensor that has no place in the pool is refused by name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from surgeon import peft_files, peft_load, ranks, replaced, store
from surgeon.checkpoint import Checkpoint
from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.fold import Fold, folds, normals, rest, value_of
from surgeon.graph import Graph
from surgeon.manifest import Manifest, read_manifest
from surgeon.normal import Columns, Factors, Normal, compose
from surgeon.passes.base import Adapter
from surgeon.run import owners
from surgeon.safetensors_file import read_shard
from surgeon.serve import moves
from surgeon.serve.layout import Layout
from surgeon.serve.lines import MERGE, Lines
from surgeon.serve.packed import BIAS, WIDTH, Packed, Packer
from surgeon.sites import ATTENTION, EMBEDDING

TEMPLATES = 64


class Loader:
    """Reads adapters for one base; what the folders of one method have in common is applied once."""

    def __init__(self, base: Graph, layout: Layout, dtype: torch.dtype) -> None:
        """Start.

        Args:
            base: the graph that is served, before the slora pass.
            layout: of its pool.
            dtype: of the pool.
        """
        self.base, self.layout, self.dtype = base, layout, dtype
        self._applied: dict[str, Graph] = {}
        self._moves: dict[tuple[str, bytes], moves.Moves | None] = {}
        self._banks: dict[str, Packed] = {}
        self._numbers = {site.path: number for number, site in enumerate(layout.linears)}
        self._attentions = {(site.layer, site.node): i for i, site in enumerate(layout.attentions)}

    def load(self, folder: str | Path, key: str, rank: int | None = None) -> Packed:
        """The adapter of a folder as rows.

        Args:
            folder: a PEFT adapter folder or a work folder.
            key: its name in the pool.
            rank: of adapters that have every rank (DyLoRA); their highest if not given.

        Raises:
            UsageError: the folder is damaged, for another base, or holds a pickle; keys are named.
            UnsupportedError: part of it has no place here.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UsageError("there is no such folder", str(folder), "name a folder with an adapter")
        if store.is_work_folder(folder):
            return self._whole(self._work(folder), folder, key, rank)
        return self._peft(folder, key, rank)

    def _whole(self, graph: Graph, folder: Path, key: str, rank: int | None) -> Packed:
        if rank is not None:
            graph = ranks.at_rank(graph, rank)
        try:
            return self._packed(graph, key)
        except SurgeonError as error:
            raise type(error)(error.what, error.where or str(folder), error.hint) from error

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the base's checkpoint."""
        return Checkpoint.open(Path(self.base.source)).fingerprint()

    def _peft(self, folder: Path, key: str, rank: int | None) -> Packed:
        config, file = peft_files.read_config(folder), folder / peft_files.WEIGHTS
        task = config.get("task_type")
        if task not in (None, "CAUSAL_LM"):
            raise UsageError(f"the adapter is for {task}", str(folder), "this server answers with text: CAUSAL_LM")
        self._check_base(config.get("base_model_name_or_path"), folder)
        told, start = _told(config), moves.start_of(file)
        kind = (told, start)
        known = self._moves.get(kind)
        made = known.read(file, start, key) if known is not None and rank is None else None
        if made is not None:
            return made
        tensors = peft_files.read_tensors(file)
        template = self._template(told, lambda: peft_load.adapt(self.base, folder, config, tensors))
        made = self._whole(_filled(template, folder, tensors), folder, key, rank)
        if kind not in self._moves:
            self._moves[kind] = self._learned(template, folder)
            _shorten(self._moves)
        return made

    def _learned(self, template: Graph, folder: Path) -> moves.Moves | None:
        """What packing an adapter of a kind does to its numbers, if it only moves them."""
        shard = read_shard(folder / peft_files.WEIGHTS)
        tensors = moves.random_tensors(shard)
        try:
            packed = self._whole(_filled(template, folder, dict(tensors)), folder, "", None)
        except SurgeonError:  # not every adapter may have any numbers
            return None
        return moves.found(packed, shard, tensors)

    def _work(self, folder: Path) -> Graph:
        record = read_manifest(folder)
        if record.base["fingerprint"] != self.fingerprint:
            what = "the adapter was made for another base (fingerprint)"
            raise UsageError(what, str(folder), f"serve {record.base['path']} for it")
        if record.context != self.base.context:
            what = f"the adapter was made for a context of {record.context or 'the base'}"
            raise UsageError(what, str(folder), f"this server has {self.base.context or 'the base'}'s")
        have, wanted = [step.name for step in self.base.applied], [step.name for step in record.passes]
        if wanted[: len(have)] != have:
            what = f"the adapter was made over {', '.join(wanted)}, and this server's base has {', '.join(have)}"
            raise UsageError(what, str(folder), "serve the base as it was trained over")
        template = self._template(_told(_steps(record)), lambda: store.adapt(self.base, record, folder))
        graph = template.copy()
        store.fill(graph, record, folder)
        return graph

    def _check_base(self, named: object, folder: Path) -> None:
        """An adapter that names a base which lies here, and is another one, is not for this server."""
        if not isinstance(named, str) or not (Path(named) / "config.json").is_file():
            return
        if Path(named).resolve() == Path(self.base.source).resolve():
            return
        try:
            other = Checkpoint.open(Path(named)).fingerprint()
        except SurgeonError:
            return
        if other != self.fingerprint:
            raise UsageError("the adapter was made for another base", str(folder), f"serve {named} for it")

    def _template(self, told: str, make: Callable[[], Graph]) -> Graph:
        template = self._applied.pop(told, None) or make()
        self._applied[told] = template
        _shorten(self._applied)
        return template

    def _packed(self, graph: Graph, key: str) -> Packed:
        known = owners(self.base.applied)
        steps = {owner: s for owner, s in owners(graph.applied).items() if owner not in known and not s.training_only}
        odd = [step.name for step in steps.values() if not isinstance(step, Adapter)]
        if odd:
            what = f"the adapter needs {', '.join(odd)} in the base"
            raise UnsupportedError(what, "", "serve the base with it: surgeon serve --quantise")
        biases = self._biases(graph, steps)
        packer, lines = Packer(self.dtype), Lines(len(self.layout.linears))
        bank = self._linears(graph, biases, packer, lines)
        columns, column_bias = self._columns(graph, packer)
        virtual = self._virtual(graph, packer)
        table, scales = lines.table(packer)
        first = 0 if virtual is None else packer.number(virtual[0])
        made = Packed(
            key, packer.rows(), table, scales, bank, columns,
            {number: packer.number(ticket) for number, ticket in column_bias.items()},
            (first, 0 if virtual is None else virtual[1]),
            max((c.k.shape[1] for c in columns.values() if c.column_bias is None), default=0),
        )  # fmt: skip
        if not made.rows and not columns:
            raise UsageError("the adapter changes nothing of this base", "", "name its own base")
        return made

    def _biases(self, graph: Graph, steps: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Path of a linear → its trained bias; any other tensor that trained whole is refused."""
        names = dict.fromkeys(n for owner, step in steps.items() for n in replaced.names(graph, owner, step))
        linears = {site.bias: site.path for site in self.layout.linears if site.bias}
        left = [name for name in names if name not in linears]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise UnsupportedError(f"the adapter replaces {', '.join(left[:3])}{more}", "modules_to_save, bias", MERGE)
        return {linears[name]: graph.inserted[name]() for name in names}

    def _linears(self, graph: Graph, biases: dict[str, torch.Tensor], packer: Packer, lines: Lines) -> Packed | None:
        found: dict[str, list[Fold]] = {}
        for item in folds(graph):
            found.setdefault(item.site.path, []).append(item)
        lost = [path for path in found if path not in self._numbers]
        if lost:
            kinds = sorted({found[path][0].site.kind for path in lost})
            what = f"the adapter changes {', '.join(lost[:3])}, and this server adapts no {' or '.join(kinds)} there"
            raise UnsupportedError(what, "", MERGE)
        shared: dict[str, Factors] = {}
        for path, items in found.items():
            factors = items[0].step.shared_factors(items[0].tensors(), items[0].site) if len(items) == 1 else None
            if factors is not None:
                shared[path] = factors
            else:
                lines.normal(self._numbers[path], self._normal(graph, items), packer)
        bank = self._bank(shared)
        for path, factors in shared.items():
            lines.shared(self._numbers[path], factors, packer)
        for path, bias in biases.items():
            lines.vector(self._numbers[path], BIAS, bias, packer)
        if bank is not None:
            lines.banked({self._numbers[path]: factors for path, factors in shared.items()}, bank)
        return bank[0] if bank is not None else None

    def _normal(self, graph: Graph, items: list[Fold]) -> Normal:
        """The adapters of one linear as one."""
        site = items[0].site
        made = normals(
            items,
            lambda: site.matrix(value_of(graph, site.weight).float()),
            lambda: value_of(graph, site.bias).float() if site.bias else None,
        )
        return functools.reduce(lambda inner, outer: compose(outer, inner), made)

    def _bank(self, shared: dict[str, Factors]) -> tuple[Packed, dict[tuple[str, int], int]] | None:
        """The matrices that some sites share with other adapters, and the first row of each (a or b, width)."""
        if not shared:
            return None
        names = sorted({factors.name for factors in shared.values()})
        wide = {("a", f.a.shape[1]): f.a for f in shared.values()} | {
            ("b", f.b.shape[0]): f.b.T for f in shared.values()
        }
        key = f"bank {names[0]} {sorted(wide)}"
        packer = Packer(self.dtype)
        tickets = {place: packer.add(wide[place]) for place in sorted(wide)}
        numbers = {place: packer.number(ticket) for place, ticket in tickets.items()}
        if len(names) > 1:
            raise UnsupportedError("the adapter has several pairs of shared matrices", "", MERGE)
        if key not in self._banks:
            empty = torch.zeros(0, WIDTH, dtype=torch.int64), torch.zeros(0)
            self._banks[key] = Packed(key, packer.rows(), *empty)
        return self._banks[key], numbers

    def _columns(self, graph: Graph, packer: Packer) -> tuple[dict[int, Columns], dict[int, tuple[int, int]]]:
        columns, biases = dict[int, Columns](), dict[int, tuple[int, int]]()
        for item in rest(graph):
            if item.site.kind not in (ATTENTION, EMBEDDING):
                raise UnsupportedError(f"the adapter changes {item.site.path}", item.step.name, MERGE)
            if item.site.kind != ATTENTION:
                continue
            number, found = self._attentions[item.site.layer, item.site.node], item.columns()
            if number in columns:
                raise UnsupportedError("two prefixes stand before one attention", item.site.path, "train one of both")
            if found.column_bias is not None:
                heads = found.column_bias.expand(item.site.queries, -1)
                biases[number] = packer.add(heads.reshape(1, -1))
            columns[number] = dataclasses.replace(found, k=found.k.to(self.dtype), v=found.v.to(self.dtype))
        return columns, biases

    def _virtual(self, graph: Graph, packer: Packer) -> tuple[tuple[int, int], int] | None:
        found = [item for item in rest(graph) if item.site.kind == EMBEDDING]
        if not found:
            return None
        rows = found[0].rows()
        if len(found) > 1 or rows.shape[1] != self.layout.hidden:
            raise UnsupportedError("rows stand before the tokens twice", found[-1].site.path, "train one prompt")
        return packer.add(rows), len(rows)


def _filled(template: Graph, folder: Path, tensors: dict[str, torch.Tensor]) -> Graph:
    graph = template.copy()
    peft_load.fill_all(graph, folder, tensors)
    return graph


def _shorten(cache: dict[Any, Any]) -> None:
    while len(cache) > TEMPLATES:
        cache.pop(next(iter(cache)))


def _told(config: Any) -> str:
    """What two adapters have in common that are applied alike."""
    if isinstance(config, dict):
        config = {k: v for k, v in config.items() if k not in ("base_model_name_or_path", "revision", "peft_version")}
    return json.dumps(config, sort_keys=True, default=str)


def _steps(record: Manifest) -> list[Any]:
    return [[step.name, step.options, step.folder, step.format] for step in record.passes]
