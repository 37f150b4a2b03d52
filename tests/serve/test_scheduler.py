"""Who is served when: fair among adapters, few at a time, nobody begins who might not end."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks.zoo.graphs import graph_of, randomised
from surgeon import run
from surgeon.passes import make
from surgeon.serve.engine import Engine
from surgeon.serve.packed import Packed
from surgeon.serve.request import Busy, Event, Late, Request
from surgeon.serve.sampling import Sampler, Sampling
from surgeon.serve.scheduler import Limits, Scheduler


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(graph_of("llama"), pool_bytes=1 << 19)


@pytest.fixture(scope="module")
def adapters(engine: Engine) -> list[Packed]:
    step = make("lora", rank=2)
    return [engine.loader._packed(randomised(run.apply(engine.base, step), seed=i), f"a{i}") for i in range(6)]


def request(name: str = "", packed: Packed | None = None, tokens: int = 4, most: int = 4, **more: Any) -> Request:
    return Request(name, packed, [5] * tokens, most, Sampling(temperature=0), lambda event: None, **more)


def turn(scheduler: Scheduler) -> dict[str, int]:
    """One step without the model: every computed token is followed by another."""
    scheduler.admit()
    counts: dict[str, int] = {}
    for sequence, count in scheduler.pieces():
        sequence.done += count
        one = next(r for r in scheduler.running if r.sequence is sequence)
        counts[one.adapter] = counts.get(one.adapter, 0) + count
        if not sequence.left:
            one.answer.append(5)
            sequence.tokens.append(5)
            if len(one.answer) >= one.most:
                scheduler.finish(one)
    return counts


def test_a_flood_for_one_adapter_does_not_starve_another(engine: Engine, adapters: list[Packed]) -> None:
    scheduler = Scheduler(engine, Limits(running=4, even=8))
    for _ in range(40):
        scheduler.push(request("flood", adapters[0]))
    for _ in range(3):
        turn(scheduler)
    scheduler.push(request("late", adapters[1]))
    served: dict[str, int] = {}
    for _ in range(12):
        for name, count in turn(scheduler).items():
            served[name] = served.get(name, 0) + count
    assert served["late"] == 4 + 3
    while scheduler.running or scheduler.waiting:
        turn(scheduler)
    assert engine.memory.promised == 0


def test_two_adapters_share_evenly(engine: Engine, adapters: list[Packed]) -> None:
    scheduler, served = Scheduler(engine, Limits(running=2, even=1)), {"a": 0, "b": 0}
    for _ in range(30):
        scheduler.push(request("a", adapters[0], tokens=12))
    for _ in range(30):
        scheduler.push(request("b", adapters[1]))
    for _ in range(60):
        for name, count in turn(scheduler).items():
            served[name] += count
    assert 0.75 < served["a"] / served["b"] < 1.33
    for one in [*scheduler.running, *(r for queue in scheduler.waiting.values() for r in queue)]:
        one.cancelled = True
    scheduler.expired(time.monotonic())


def test_requests_for_an_adapter_that_was_read_twice_end_in_any_order(engine: Engine) -> None:
    """Between two requests the host's cache may lose an adapter: the second has tensors of its own."""
    graph = randomised(run.apply(engine.base, make("lora", rank=2)))
    both = [request("a", engine.loader._packed(graph, "a")) for _ in range(2)]
    scheduler = Scheduler(engine, Limits(running=2))
    for one in both:
        scheduler.push(one)
    turn(scheduler)
    assert [id(one) for one in scheduler.running] == [id(one) for one in both]
    scheduler.finish(both[1])
    assert [id(one) for one in scheduler.running] == [id(both[0])]
    scheduler.finish(both[0])
    assert engine.memory.promised == 0


def test_few_adapters_at_a_time(engine: Engine, adapters: list[Packed]) -> None:
    scheduler = Scheduler(engine, Limits(running=8, adapters=2))
    for number in range(6):
        for _ in range(3):
            scheduler.push(request(f"a{number}", adapters[number]))
    seen = set()
    while scheduler.waiting or scheduler.running:
        turn(scheduler)
        in_use = {one.adapter for one in scheduler.running}
        assert len(in_use) <= 2
        seen |= in_use
    assert len(seen) == 6


def test_who_begins_can_end(engine: Engine) -> None:
    scheduler, memory = Scheduler(engine, Limits(running=64)), engine.memory
    whole = memory.pool.pages // len(engine.layout.attentions) * engine.layout.block
    for _ in range(6):
        scheduler.push(request(tokens=whole // 3, most=whole // 4))
    most = 0
    while scheduler.waiting or scheduler.running:
        turn(scheduler)
        most = max(most, len(scheduler.running))
        assert memory.promised <= memory.pool.pages
    assert most == 1


def test_prompts_come_in_pieces_beside_answers(engine: Engine) -> None:
    scheduler = Scheduler(engine, Limits(step=10))
    scheduler.push(request(tokens=2, most=9))
    turn(scheduler)
    scheduler.push(request(tokens=25, most=1))
    steps = []
    for _ in range(4):
        scheduler.admit()
        pieces = [count for _, count in scheduler.pieces()]
        steps.append(pieces)
        turn(scheduler)
    assert steps[0] == [1, 9]
    for one in list(scheduler.running):
        scheduler.finish(one)


def test_queue_and_deadlines(engine: Engine) -> None:
    scheduler = Scheduler(engine, Limits(running=1, queue=2))
    for _ in range(3):
        scheduler.push(request(most=50))
    with pytest.raises(Busy, match="2 requests are waiting"):
        scheduler.push(request())
    with pytest.raises(Late):
        Scheduler(engine, Limits()).push(request(deadline=time.monotonic() - 1))
    scheduler.admit()
    first = scheduler.running[0]
    first.deadline = time.monotonic() - 1
    scheduler.waiting[""][0].cancelled = True
    gone = scheduler.expired(time.monotonic())
    assert gone[0] is first
    assert len(gone) == 2
    assert scheduler.queued == 1
    assert engine.memory.promised == 0


def test_sampling_follows_its_options() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    assert Sampler(Sampling(temperature=0)).choose(logits).token == 1
    assert {Sampler(Sampling(seed=i, top_k=2)).choose(logits).token for i in range(60)} == {1, 2}
    assert {Sampler(Sampling(seed=i, top_p=0.5)).choose(logits).token for i in range(20)} == {1}
    assert Sampler(Sampling(temperature=0, bias={3: 100.0})).choose(logits).token == 3
    twice = Sampler(Sampling(temperature=0, frequency=1.5))
    assert [twice.choose(logits).token for _ in range(3)] == [1, 2, 1]
    reported = Sampler(Sampling(temperature=0, logprobs=2)).choose(logits)
    assert reported.logprob == pytest.approx(float(logits.log_softmax(-1)[1]))
    assert [token for token, _ in reported.top] == [1, 2]
    one, two = (Sampler(Sampling(seed=5)) for _ in range(2))
    assert [one.choose(logits).token for _ in range(20)] == [two.choose(logits).token for _ in range(20)]
    counts = torch.zeros(4)
    drawn = Sampler(Sampling(seed=0, temperature=2.0))
    for _ in range(4000):
        counts[drawn.choose(logits).token] += 1
    assert (counts / 4000 - (logits / 2).softmax(-1)).abs().max() < 0.03


class Letters:
    """A tokenizer of bytes."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(tokens).decode("utf-8", "replace")


def test_text_comes_in_whole_characters_and_stops_before_its_strings() -> None:
    from surgeon.serve.detokenise import Detokeniser

    text = Detokeniser(Letters())
    pieces = [text.add(byte) for byte in "aé€".encode()]
    assert pieces == ["a", "", "é", "", "", "€"]
    stopping = Detokeniser(Letters(), ["</s>", "END"])
    pieces = [stopping.add(byte) for byte in b"x<y</sEND"]
    assert "".join(pieces) == "x<y</s"
    assert pieces[:3] == ["x", "", "<y"]
    assert stopping.stopped == "END"
    left = Detokeniser(Letters(), ["</s>"])
    assert "".join([left.add(byte) for byte in b"a</"]) + left.finish() == "a</"


def test_an_answer_ends_at_its_end_token() -> None:
    one = request(ends=frozenset([7]))
    assert one.accept(Sampler(Sampling(temperature=0)).choose(torch.eye(9)[5])) == Event("", one_choice(5), "")
    assert one.accept(Sampler(Sampling(temperature=0)).choose(torch.eye(9)[7])).finish == "stop"
    assert one.answer == [5]


def one_choice(token: int) -> Any:
    from surgeon.serve.sampling import Choice

    return (Choice(token),)
