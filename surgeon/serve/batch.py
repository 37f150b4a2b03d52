"""The inputs of one step of the model, from the requests that take part in it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

from surgeon.serve.layout import PAGES, Layout
from surgeon.serve.memory import Memory, Resident
from surgeon.serve.packed import BANKED, FIRST_A, FIRST_B, RANK
from surgeon.serve.sequence import Sequence

Piece = tuple[Sequence, int]
"""A request and how many of its tokens are computed in this step."""
_KEPT = 32


@dataclass(frozen=True)
class Adapters:
    """What the linears read of the adapters of a batch; the same for every step with the same adapters.

    Attributes:
        rows: rows of all of them in the pool's views.
        tables: one per linear, `[adapters, WIDTH]`.
        scales: one per linear, `[adapters]`.
        owners: adapter of each token.
        last: adapter of each token whose logits are wanted.
    """

    rows: torch.Tensor
    tables: tuple[torch.Tensor, ...]
    scales: tuple[torch.Tensor, ...]
    owners: torch.Tensor
    last: torch.Tensor

    def to(self, device: torch.device) -> Adapters:
        """On a device."""
        tables, scales = (tuple(one.to(device) for one in given) for given in (self.tables, self.scales))
        return Adapters(self.rows.to(device), tables, scales, self.owners.to(device), self.last.to(device))


class Batches:
    """Makes batches; remembers what adapters look like to the linears while the same ones go on."""

    def __init__(self, memory: Memory, *, start: int, pad: int = 0) -> None:
        """Start.

        Args:
            memory: where requests and adapters are.
            start: position of a text's first token.
            pad: every step has this many tokens, those beyond the requests' standing for nothing; 0 for no padding.
        """
        self.memory, self.layout, self.start, self.pad = memory, memory.layout, start, pad
        self.device = memory.pool.data.device
        self._adapters: OrderedDict[object, Adapters] = OrderedDict()
        self._none = torch.zeros(0, dtype=torch.int64)

    def make(self, pieces: list[Piece]) -> dict[str, torch.Tensor]:
        """The inputs by name, for requests in the order of `Sequence.order`."""
        ids: list[int] = []
        positions: list[int] = []
        spans: list[tuple[int, int, int]] = []
        index: list[int] = []
        rows: list[int] = []
        for sequence, count in pieces:
            first, past = len(ids), sequence.done
            spans.append((first, count, past))
            ids += sequence.tokens[past : past + count]
            shift = self.start + (sequence.packed.shift if sequence.packed is not None else 0)
            positions += range(past + shift, past + count + shift)
            inside = range(past, min(past + count, sequence.virtual))
            if inside and sequence.packed is not None:
                index += [first + place - past for place in inside]
                resident = self.memory.residents[sequence.packed.key]
                begin = sequence.packed.virtual[0]
                rows += resident.where[begin + inside.start : begin + inside.stop].tolist()
        keep = [first + count - 1 for first, count, _ in spans]
        empty = max(0, self.pad - len(ids))
        ids, positions = ids + [0] * empty, positions + [self.start] * empty
        keep += [0] * max(0, self.pad - len(keep))
        given = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
            "position_ids": torch.tensor([positions]),
            "token_type_ids": torch.zeros(1, len(ids), dtype=torch.int64),
            "slora.positions": torch.tensor(positions) - self.start,
            "slora.pool": self.memory.pool.data,
            "slora.spans": torch.tensor(spans),
            "slora.keep": torch.tensor(keep),
            "slora.prompt_index": torch.tensor(index, dtype=torch.int64),
            "slora.prompt_rows": torch.tensor(rows, dtype=torch.int64),
        }
        given |= self._pages(pieces)
        placed = {name: tensor.to(self.device) for name, tensor in given.items()}
        return placed | self._linears(pieces, len(ids), len(keep))

    def _pages(self, pieces: list[Piece]) -> dict[str, torch.Tensor]:
        layout = self.layout
        tables = [sequence.table() for sequence, _ in pieces]
        most = max(len(table) for table in tables)
        whole = torch.zeros(len(pieces), most, len(layout.attentions), dtype=torch.int64)
        for request, table in enumerate(tables):
            whole[request, : len(table)] = table
        by_attention = whole.permute(2, 0, 1).contiguous().unbind(0)
        plain = torch.zeros(len(pieces), PAGES, dtype=torch.int64)
        plain[:, 2] = -1
        given = {}
        for number in range(len(layout.attentions)):
            given[f"slora.table.{number}"] = by_attention[number]
            given[f"slora.prefix.{number}"] = self._prefix(pieces, number, plain)
        return given

    def _prefix(self, pieces: list[Piece], number: int, plain: torch.Tensor) -> torch.Tensor:
        """Learned columns of each request at one attention."""
        found: dict[int, list[int]] = {}
        for request, (sequence, _) in enumerate(pieces):
            learned = sequence.packed.columns.get(number) if sequence.packed is not None else None
            if sequence.packed is not None and learned is not None:
                resident = self.memory.residents[sequence.packed.key]
                bias = sequence.packed.column_bias.get(number, -1)
                row = int(resident.where[bias]) if bias >= 0 else -1
                found[request] = [learned.k.shape[1], int(learned.windowed), row, *resident.columns[number]]
        if not found:
            return plain
        made = torch.zeros(len(pieces), max(map(len, found.values())), dtype=torch.int64)
        made[:, 2] = -1
        for request, line in found.items():
            made[request, : len(line)] = torch.tensor(line)
        return made

    def _linears(self, pieces: list[Piece], tokens: int, kept: int) -> dict[str, torch.Tensor]:
        runs = [(sequence.packed.key if sequence.packed else "", count) for sequence, count in pieces]
        places = [self._placed(sequence) for sequence, _ in pieces]
        key = (tuple(runs), tuple(places), tokens, kept)
        if key not in self._adapters:
            self._adapters[key] = self._table(pieces, tokens, kept).to(self.device)
            while len(self._adapters) > _KEPT:
                self._adapters.popitem(last=False)
        self._adapters.move_to_end(key)
        found = self._adapters[key]
        given = {"slora.rows": found.rows, "slora.owners": found.owners, "slora.last_owners": found.last}
        for site, table, scales in zip(self.layout.linears, found.tables, found.scales, strict=True):
            given[f"slora.adapters.{site.path}"], given[f"slora.scales.{site.path}"] = table, scales
        return given

    def _placed(self, sequence: Sequence) -> tuple[int, ...]:
        """Tells the places of an adapter and its bank from all others they have had."""
        if sequence.packed is None:
            return ()
        parts = [sequence.packed] if sequence.packed.bank is None else [sequence.packed, sequence.packed.bank]
        return tuple(self.memory.residents[part.key].placed for part in parts)

    def _table(self, pieces: list[Piece], tokens: int, kept: int) -> Adapters:
        names = list(dict.fromkeys(sequence.packed.key for sequence, _ in pieces if sequence.packed is not None))
        number = {name: position for position, name in enumerate(names)} | {"": -1}
        who = [number[sequence.packed.key if sequence.packed else ""] for sequence, _ in pieces]
        counts = torch.tensor([count for _, count in pieces])
        owners = torch.full((tokens,), -1)
        owners[: int(counts.sum())] = torch.tensor(who).repeat_interleave(counts)
        last = torch.full((kept,), -1)
        last[: len(who)] = torch.tensor(who)
        residents = [self.memory.residents[name] for name in names]
        rows, starts = self._rows(residents)
        linears = len(self.layout.linears)
        if not residents:
            nothing = torch.zeros(linears, 0, 1, dtype=torch.int64).unbind(0)
            return Adapters(rows, nothing, torch.zeros(linears, 0).unbind(0), owners, last)
        tables = []
        for resident in residents:
            table = resident.packed.table.clone()
            own = starts[resident.packed.key]
            bank = starts[resident.packed.bank.key] if resident.packed.bank is not None else own
            base = torch.where(table[:, BANKED, None] != 0, bank, own)
            moved = torch.cat([table[:, :RANK] + base, table[:, RANK:]], 1)
            rest = table[:, RANK + 1 : BANKED]
            moved[:, RANK + 1 : BANKED] = torch.where(rest < 0, rest, rest + own)
            tables.append(torch.where(table < 0, table, moved))
        stacked = torch.stack(tables, 1).contiguous()
        scales = torch.stack([resident.packed.scales for resident in residents], 1).contiguous()
        assert (FIRST_A, FIRST_B) == (0, 1)
        return Adapters(rows, stacked.unbind(0), scales.unbind(0), owners, last)

    def _rows(self, residents: list[Resident]) -> tuple[torch.Tensor, dict[str, int]]:
        """The rows of all adapters and banks of a batch, and where those of each begin."""
        starts, parts, count = dict[str, int](), [], 0
        for resident in residents:
            bank = resident.packed.bank
            for part in (*([self.memory.residents[bank.key]] if bank is not None else []), resident):
                if part.packed.key not in starts:
                    starts[part.packed.key] = count
                    parts.append(part.where)
                    count += len(part.where)
        return torch.cat(parts) if parts else self._none, starts


def sizes(layout: Layout, sequence: Sequence) -> int:
    """Pages a request may ever need."""
    return layout.pages(sequence.most)
