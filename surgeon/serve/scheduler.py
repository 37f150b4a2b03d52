"""Who is served next: fair among adapters, few adapters at a time, and nobody begins who might not end.

Every adapter has a queue and a counter of the tokens it was served; the queue with the smallest counter is next (a
virtual token counter, Sheng et al. 2024), an adapter that comes back after a pause not being given what it missed.
Among queues that are about even, one whose adapter is in use goes first (adapter clustering).
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from surgeon.serve.batch import Piece
from surgeon.serve.engine import FIXED, Engine
from surgeon.serve.request import Busy, Late, Request


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        running: requests at once.
        adapters: different adapters at once.
        step: tokens per step; prompts come in pieces of what the running answers leave.
        queue: waiting requests.
        even: tokens by which counters may differ and still count as even.
    """

    running: int = 64
    adapters: int = 64
    step: int = 256
    queue: int = 1024
    even: float = 64.0


class Scheduler:
    """The queues and the running requests of one engine; used by one thread."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.step = FIXED if engine.deterministic else limits.step
        self.waiting: dict[str, deque[Request]] = {}
        self.running: list[Request] = []
        self.served: dict[str, float] = {}

    @property
    def queued(self) -> int:
        """How many requests wait."""
        return sum(map(len, list(self.waiting.values())))

    @property
    def full(self) -> bool:
        """Whether as many wait as may, those there is a place for not counted."""
        return self.queued >= self.limits.queue + max(0, self.limits.running - len(self.running))

    def push(self, request: Request) -> None:
        """Queue a request.

        Raises:
            Busy: too many wait already.
            Late: its deadline has passed.
        """
        if self.full:
            raise Busy(f"{self.limits.queue} requests are waiting already", "the queue", "try again in a moment")
        if request.late(time.monotonic()):
            raise Late("the deadline of the request has passed", "timeout", "give it more time")
        if not self.waiting.get(request.adapter):
            active = [self.served.get(name, 0.0) for name in self._active()]
            own = self.served.get(request.adapter, 0.0)
            self.served[request.adapter] = max(own, min(active, default=own))
        self.waiting.setdefault(request.adapter, deque()).append(request)

    def _active(self) -> set[str]:
        return {name for name, queue in self.waiting.items() if queue} | {r.adapter for r in self.running}

    def expired(self, now: float) -> list[Request]:
        """Take out requests whose time is up or whose client has gone, waiting or running."""
        gone = [r for r in self.running if r.cancelled or r.late(now)]
        for request in gone:
            self.finish(request)
        for name, queue in list(self.waiting.items()):
            lost = [r for r in queue if r.cancelled or r.late(now)]
            if lost:
                gone += lost
                self.waiting[name] = deque(r for r in queue if r not in lost)
            if not self.waiting[name]:
                del self.waiting[name]
        return gone

    def finish(self, request: Request) -> None:
        """A running request is done: its memory is free."""
        self.running.remove(request)
        self.engine.release(request.sequence)
        if not self.running and not self.waiting:
            self.served.clear()

    def admit(self) -> list[Request]:
        """Begin with as many requests as there is room for, in turn; adapters of the next ones are fetched ahead."""
        begun = []
        while len(self.running) < self.limits.running:
            name = self._next()
            if name is None:
                break
            request = self.waiting[name][0]
            if not self.engine.fits(request.sequence):
                break  # the next in turn waits for room: whoever is smaller does not overtake it for ever
            self.waiting[name].popleft()
            if not self.waiting[name]:
                del self.waiting[name]
            self.engine.admit(request.sequence)
            self.running.append(request)
            begun.append(request)
        self._prefetch()
        return begun

    def _next(self) -> str | None:
        """The adapter whose turn it is."""
        in_use = {request.adapter for request in self.running}
        names = [name for name, queue in self.waiting.items() if queue]
        if len(in_use) >= self.limits.adapters:
            names = [name for name in names if name in in_use]
        if not names:
            return None
        least = min(self.served.get(name, 0.0) for name in names)
        near = [name for name in names if self.served.get(name, 0.0) <= least + self.limits.even]
        resident = self.engine.memory.residents

        def rank(name: str) -> tuple[bool, bool, float]:
            packed = self.waiting[name][0].packed
            return name not in in_use, packed is not None and packed.key not in resident, self.waiting[name][0].arrived

        return min(near, key=rank)

    def _prefetch(self) -> None:
        memory = self.engine.memory
        for queue in list(self.waiting.values())[:8]:
            packed = queue[0].packed
            if packed is not None and packed.key not in memory.residents and not memory.prefetch(packed):
                return

    def pieces(self) -> list[Piece]:
        """The next step: one token of every answer, then pieces of prompts, the first come first."""
        room, made = self.step, []
        for request in sorted(self.running, key=lambda r: (r.sequence.left > 1, r.number)):
            count = min(request.sequence.left, room)
            if count > 0:
                made.append((request.sequence, count))
                room -= count
                self.served[request.adapter] = self.served.get(request.adapter, 0.0) + count
        return made
