"""A server's step by the kernels, in the interpreter, beside the same step in plain torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from benchmarks.zoo.graphs import graph_of
from surgeon.kernels import jit
from surgeon.passes import make
from surgeon.passes.base import Pass
from surgeon.serve import on_gpu
from surgeon.serve.engine import Engine
from surgeon.serve.sequence import Sequence
from tests.serve.test_engine import adapted, requests

# At a few linears each: the interpreter takes seconds for what a GPU does in microseconds.
METHODS: tuple[tuple[Pass, ...], ...] = (
    (),
    (make("lora", rank=7, targets="*.{k_proj,v_proj}"),),
    (make("ia3", targets="*.{k_proj,v_proj}", inputs="*.v_proj"),),
    (make("dora", rank=3, targets="*.q_proj"),),
    (make("vera", rank=8, targets="*.v_proj"),),
    (make("lora", rank=2, targets="*.q_proj"), make("prefix", tokens=19)),
)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The kernels run where a GPU would be asked; how often each did."""
    counts: Counter[str] = Counter()

    def run(call: jit.Call) -> None:
        counts[call.kernel.name] += 1
        jit.interpret(call)

    monkeypatch.setattr(on_gpu, "is_gpu", lambda x: True)
    with jit.launcher(run):
        yield counts


def stepped(family: str, methods: tuple[tuple[Pass, ...], ...], **options: bool) -> list[torch.Tensor]:
    """Logits of all requests after a piece of their prompts, and after a token more."""
    engine = Engine(graph_of(family), pool_bytes=1 << 24, **options)
    packed = [adapted(engine, steps, number)[1] for number, steps in enumerate(methods)]
    sequences = requests(engine, packed)
    found: list[torch.Tensor] = []
    for count in (3, 1):
        parts: list[tuple[Sequence, int]] = [(s, count) for s in sequences]
        logits = engine.step(parts)
        found += [logits[s.owner] for s in sequences]
        for s in sequences:
            s.tokens.append(7)
    return found


@pytest.mark.parametrize(("family", "methods"), [("llama", METHODS), ("opt", METHODS[:3])])
def test_kernels_do_what_plain_torch_does(
    family: str, methods: tuple[tuple[Pass, ...], ...], launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_kernels = stepped(family, methods)
    assert {"shrink", "expand", "scale_rows", "attend"} <= set(launches)
    monkeypatch.setattr(on_gpu, "is_gpu", lambda x: False)
    ran = launches.total()
    for found, wanted in zip(by_kernels, stepped(family, methods), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    assert launches.total() == ran


def test_what_the_kernels_leave_to_plain_torch(launches: Counter[str]) -> None:
    """Columns with biases of their own, and a deterministic server's attention."""
    gated = (make("prefix", tokens=3, init="gated"),)
    assert all(logits.isfinite().all() for logits in stepped("llama", ((), gated)))
    assert "attend" not in launches
    assert all(logits.isfinite().all() for logits in stepped("llama", METHODS[1:2], deterministic=True))
    assert "attend" not in launches
    assert launches["expand"]
