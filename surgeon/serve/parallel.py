"""One server over N processes: the first takes requests and plans, the others do what it tells them.

Every process has an engine with its part of the model and a pool of its own. The pools are cut alike and go through the
same steps, so the first process's page numbers are everybody's, and a step is told in a few numbers: which requests,
how many tokens of each, and what was said last. Adapters are read by the first process and sent to the others whole.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
import torch.distributed as dist

from surgeon.normal import Columns
from surgeon.serve.batch import Piece
from surgeon.serve.engine import Engine
from surgeon.serve.memory import Memory
from surgeon.serve.packed import Packed
from surgeon.serve.sequence import Sequence
from surgeon.serve.shards import SplitLoader, Splitter

Message = dict[str, Any]


def tell(message: Message) -> None:
    """Send the other processes a message, as JSON."""
    data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    dist.broadcast(torch.tensor([len(data)]), 0)
    dist.broadcast(data, 0)


def hear() -> Message:
    """The next message."""
    size = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(size, 0)
    data = torch.zeros(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0)
    found: Message = json.loads(bytes(data.tolist()))
    return found


class Leader(Memory):
    """The first process's memory: what changes it is told to the others first."""

    def admit(self, owner: str, packed: Packed | None, pages: int) -> None:
        """As `Memory.admit`; the other processes get the adapter if they do not have it."""
        if self.fits(packed, pages):
            self._send(packed)
        super().admit(owner, packed, pages)

    def prefetch(self, packed: Packed) -> bool:
        """As `Memory.prefetch`."""
        absent = [part for part in _parts(packed) if part.key not in self.residents]
        if sum(map(self.size, absent)) > self.pool.free:
            return False
        self._send(packed)
        tell({"do": "prefetch", "key": packed.key})
        return super().prefetch(packed)

    def drop(self, key: str) -> bool:
        """As `Memory.drop`."""
        tell({"do": "drop", "key": key})
        return super().drop(key)

    def _send(self, packed: Packed | None) -> None:
        """What the others need of an adapter; what is in the pool they have."""
        if packed is None or all(part.key in self.residents for part in _parts(packed)):
            return
        assert packed.whole is not None
        for one in reversed(_parts(packed.whole)):
            tensors, head = _written(one)
            tell({"do": "adapter", **head})
            for tensor in tensors:
                dist.broadcast(tensor, 0)


class Told(Engine):
    """The first process's engine: it tells the others what to do, and does the same."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        assert self.share is not None
        self.memory = Leader(self.memory.pool, self.layout)
        self.batches.memory = self.memory
        self.loader = SplitLoader(
            self.base, self.layout, self.memory.pool.data.dtype, Splitter(self.layout, self.roles, self.share)
        )
        self._heard: dict[str, int] = {}

    def admit(self, sequence: Sequence) -> None:
        """As `Engine.admit`."""
        super().admit(sequence)
        key = sequence.packed.key if sequence.packed is not None else ""
        tell({"do": "admit", "owner": sequence.owner, "key": key, "tokens": sequence.tokens, "most": sequence.most})
        self._heard[sequence.owner] = len(sequence.tokens)

    def release(self, sequence: Sequence) -> None:
        """As `Engine.release`."""
        tell({"do": "release", "owner": sequence.owner})
        self._heard.pop(sequence.owner)
        super().release(sequence)

    def step(self, pieces: list[Piece]) -> dict[str, torch.Tensor]:
        """As `Engine.step`."""
        told = [(s.owner, count, s.done, s.tokens[self._heard[s.owner] :]) for s, count in pieces]
        self._heard.update((sequence.owner, len(sequence.tokens)) for sequence, _ in pieces)
        tell({"do": "step", "pieces": told})
        return super().step(pieces)

    def stop(self) -> None:
        """Let the other processes end."""
        tell({"do": "stop"})


class Follower:
    """Another process's loop."""

    def __init__(self, engine: Engine) -> None:
        assert engine.share is not None
        self.engine, self.splitter = engine, Splitter(engine.layout, engine.roles, engine.share)
        self.sequences: dict[str, Sequence] = {}
        self.known: dict[str, Packed] = {}
        self.wholes: dict[str, Packed] = {}

    def run(self) -> None:
        """Do what the first process tells, until it stops."""
        while True:
            message = hear()
            if message["do"] == "stop":
                return
            getattr(self, "_" + message.pop("do"))(**message)

    def _adapter(self, **head: Any) -> None:
        whole = _read(head, self.wholes, self.engine.memory.pool.data.dtype)
        if head["bank"] is None and not head["linears"]:
            self.wholes[whole.key] = whole
        else:
            self.known[whole.key] = dataclasses.replace(self.splitter.cut(whole), whole=None)

    def _admit(self, owner: str, key: str, tokens: list[int], most: int) -> None:
        sequence = Sequence(owner, self.known[key] if key else None, tokens, most)
        self.sequences[owner] = sequence
        self.engine.admit(sequence)
        self._forget()

    def _prefetch(self, key: str) -> None:
        self.engine.memory.prefetch(self.known[key])
        self._forget()

    def _drop(self, key: str) -> None:
        self.engine.memory.drop(key)

    def _release(self, owner: str) -> None:
        self.engine.release(self.sequences.pop(owner))

    def _step(self, pieces: list[tuple[str, int, int, list[int]]]) -> None:
        found = []
        for owner, count, done, new in pieces:
            sequence = self.sequences[owner]
            sequence.tokens += new
            sequence.done = done
            found.append((sequence, count))
        self.engine.step(found)

    def _forget(self) -> None:
        """What left the pool is sent again when it is wanted."""
        residents = self.engine.memory.residents
        self.known = {key: packed for key, packed in self.known.items() if key in residents}


def _parts(packed: Packed) -> list[Packed]:
    return [packed] if packed.bank is None else [packed, packed.bank]


def _written(packed: Packed) -> tuple[list[torch.Tensor], Message]:
    """An adapter's tensors, and the rest of it with their shapes."""
    tensors = [packed.table, packed.scales, *packed.rows.values()]
    columns = []
    for number, found in packed.columns.items():
        tensors += [found.k, found.v]
        columns.append([number, [*found.k.shape], [*found.v.shape], found.windowed, found.column_bias is not None])
    head = {
        "key": packed.key, "bank": packed.bank.key if packed.bank is not None else None,
        "linears": len(packed.table), "width": packed.table.shape[1], "rows": [[w, n] for w, n in packed.widths],
        "columns": columns, "column_bias": [[*item] for item in packed.column_bias.items()],
        "virtual": packed.virtual, "shift": packed.shift,
    }  # fmt: skip
    return [tensor.contiguous() for tensor in tensors], head


def _read(head: Message, banks: dict[str, Packed], dtype: torch.dtype) -> Packed:
    """The other way: receive the tensors."""
    table, scales = torch.zeros(head["linears"], head["width"], dtype=torch.int64), torch.zeros(head["linears"])
    rows = {width: torch.zeros(count, width, dtype=dtype) for width, count in head["rows"]}
    columns = {
        number: Columns(torch.zeros(k, dtype=dtype), torch.zeros(v, dtype=dtype), None, windowed)
        for number, k, v, windowed, _ in head["columns"]
    }
    for tensor in (table, scales, *rows.values(), *(part for c in columns.values() for part in (c.k, c.v))):
        dist.broadcast(tensor, 0)
    bank = banks[head["bank"]] if head["bank"] is not None else None
    biases = dict(head["column_bias"])
    return Packed(head["key"], rows, table, scales, bank, columns, biases, tuple(head["virtual"]), head["shift"])
