"""The loop of a server, in a thread of its own: take in requests, step, tell."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from surgeon.errors import SurgeonError, UsageError
from surgeon.serve.engine import Engine
from surgeon.serve.request import Busy, Event, Late, Request
from surgeon.serve.sampling import Choice
from surgeon.serve.scheduler import Limits, Scheduler


@dataclass
class Counters:
    """What a server has done so far.

    Attributes:
        steps: of the model.
        prompt_tokens: tokens of prompts computed, by adapter.
        new_tokens: tokens generated, by adapter.
        finished: requests by (adapter, how they ended).
        waits: seconds to the first token, since they were last read.
        busy: seconds spent in steps.
    """

    steps: int = 0
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    new_tokens: dict[str, int] = field(default_factory=dict)
    finished: dict[tuple[str, str], int] = field(default_factory=dict)
    waits: list[float] = field(default_factory=list)
    busy: float = 0.0

    def add(self, counts: dict[Any, int], name: Any, count: int = 1) -> None:
        """Count something under a name."""
        counts[name] = counts.get(name, 0) + count


class Service:
    """One engine that answers requests from any thread."""

    def __init__(self, engine: Engine, limits: Limits | None = None) -> None:
        self.engine, self.scheduler = engine, Scheduler(engine, limits or Limits())
        self.counters = Counters()
        self.failure: Exception | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="surgeon-serve", daemon=True)
        self._stopping = False

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """End: running requests are told so."""
        self._stopping = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive() and self.failure is None

    def check(self, request: Request) -> None:
        """Refuse what could never be served, or not now.

        Raises:
            UsageError: the text would be too long for the model or for the pool.
            Busy: too many requests wait.
            Late: its deadline has passed.
        """
        engine, sequence = self.engine, request.sequence
        total = sequence.most + (request.packed.shift if request.packed is not None else 0)
        if engine.limit and total > engine.limit:
            what = f"the prompt has {len(request.prompt)} tokens and may be continued by {request.most}: {total} in all"
            raise UsageError(what, f"the model has {engine.limit} positions", "a shorter prompt or fewer max_tokens")
        pages = engine.needs(sequence) + engine.memory.total(request.packed)
        if pages > engine.memory.pool.pages:
            what = f"the request needs {pages} pages of the pool, which has {engine.memory.pool.pages}"
            raise UsageError(what, "max_tokens", "a shorter prompt, fewer max_tokens, or a server with a larger --pool")
        if self.scheduler.full:
            what = f"{self.scheduler.limits.queue} requests are waiting already"
            raise Busy(what, "the queue", "try again in a moment")
        if request.late(time.monotonic()):
            raise Late("the deadline of the request has passed", "timeout", "give it more time")

    def submit(self, request: Request) -> None:
        """Serve a request: its `tell` hears of it from now on. Raises as `check` does."""
        self.check(request)
        self._inbox.put(lambda: self._take_in(request))

    def cancel(self, request: Request) -> None:
        """The client has gone."""
        request.cancelled = True
        self._inbox.put(lambda: None)

    def do(self, work: Callable[[], Any], timeout: float = 60.0) -> Any:
        """Run something on the loop's thread, between two steps, and return its result."""
        done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                done.put((work(), None))
            except SurgeonError as error:
                done.put((None, error))

        self._inbox.put(run)
        result, error = done.get(timeout=timeout)
        if error is not None:
            raise error
        return result

    def _take_in(self, request: Request) -> None:
        try:
            self.scheduler.push(request)
        except SurgeonError as error:
            self._tell(request, Event(error=error))

    def _run(self) -> None:
        while not self._stopping:
            idle = not (self.scheduler.running or self.scheduler.waiting)
            self._drain(wait=idle)
            if self._stopping:
                break
            try:
                self._turn()
            except Exception as error:  # one step failed: its requests hear of it, the others go on
                self._fail(error)
        stopped = SurgeonError("the server is shutting down")
        for request in [*self.scheduler.running, *(r for q in self.scheduler.waiting.values() for r in q)]:
            self._tell(request, Event(error=stopped))

    def _drain(self, wait: bool) -> None:
        """Do what others have asked for; with nothing to serve, sleep until somebody asks."""
        while True:
            try:
                work = self._inbox.get(block=wait)
            except queue.Empty:
                return
            if work is None:
                return
            work()
            wait = False

    def _turn(self) -> None:
        scheduler, now = self.scheduler, time.monotonic()
        for request in scheduler.expired(now):
            late = Late("the deadline passed before the answer was complete", "timeout", "give it more time")
            self._end(request, "cancelled" if request.cancelled else "late")
            if not request.cancelled:
                self._tell(request, Event(error=late))
        for request in scheduler.admit():
            request.began = now
        pieces = scheduler.pieces()
        if not pieces:
            return
        begun = {sequence.owner: sequence.done for sequence, _ in pieces}
        started = time.perf_counter()
        logits = self.engine.step(pieces)
        self.counters.busy += time.perf_counter() - started
        self.counters.steps += 1
        self._advance({sequence.owner: count for sequence, count in pieces}, begun, logits)

    def _advance(self, counts: dict[str, int], begun: dict[str, int], logits: dict[str, torch.Tensor]) -> None:
        """Choose the tokens of a step."""
        ready = []
        for request in [r for r in self.scheduler.running if r.sequence.owner in counts]:
            owner = request.sequence.owner
            prompt = min(len(request.prompt) + request.sequence.virtual - begun[owner], counts[owner])
            if prompt > 0:
                self.counters.add(self.counters.prompt_tokens, request.adapter, prompt)
            if not request.sequence.left:
                ready.append(request)
        plain = [request for request in ready if request.sampling.plain]
        likeliest = torch.stack([logits[r.sequence.owner] for r in plain]).argmax(-1).tolist() if plain else []
        chosen = {r.number: Choice(token) for r, token in zip(plain, likeliest, strict=True)}
        for request in ready:
            try:
                choice = chosen.get(request.number) or request.sampler.choose(logits[request.sequence.owner])
                self._accept(request, choice)
            except Exception as error:  # a request whose sampling fails does not take the others with it
                self._drop(request, error)

    def _accept(self, request: Request, choice: Choice) -> None:
        if not request.first:
            request.first = time.monotonic()
            self.counters.waits.append(request.first - request.arrived)
            del self.counters.waits[:-10_000]
        self.counters.add(self.counters.new_tokens, request.adapter)
        event = request.accept(choice)
        if event.finish:
            self.scheduler.finish(request)
            self._end(request, event.finish)
        self._tell(request, event)

    def _end(self, request: Request, how: str) -> None:
        self.counters.add(self.counters.finished, (request.adapter, how))

    def _drop(self, request: Request, error: Exception) -> None:
        if request in self.scheduler.running:
            self.scheduler.finish(request)
        self._end(request, "error")
        self._tell(request, Event(error=error))

    def _fail(self, error: Exception) -> None:
        for request in list(self.scheduler.running):
            self._drop(request, error)

    def _tell(self, request: Request, event: Event) -> None:
        if not request.cancelled:
            request.tell(event)
