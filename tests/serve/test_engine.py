"""Every method in one batch gives each request what its own model gives it alone."""

from __future__ import annotations

import pytest
import torch

from benchmarks.zoo.graphs import graph_of, randomised
from surgeon import module, run
from surgeon.errors import UnsupportedError, UsageError
from surgeon.generate import generator
from surgeon.graph import Graph
from surgeon.passes import make
from surgeon.passes.base import Pass
from surgeon.serve.engine import FIXED, Engine
from surgeon.serve.packed import Packed
from surgeon.serve.sequence import Sequence
from surgeon.strip import without

EVERY = {"targets": "all-linear"}
METHODS: tuple[tuple[Pass, ...], ...] = (
    (),
    (make("lora", rank=1, **EVERY),),
    (make("lora", rank=7, **EVERY),),
    (make("lora", rank=4, rslora=True, **EVERY),),
    (make("dora", rank=3, **EVERY),),
    (make("adalora", **EVERY),),
    (make("dylora", **EVERY),),
    (make("vera", rank=8, **EVERY),),
    (make("vera", rank=8, **EVERY),),
    (make("ia3", targets="all-linear", inputs="*.down_proj *.fc2 *.mlp.c_proj"),),
    (make("loha", rank=2, **EVERY),),
    (make("prefix", tokens=5),),
    (make("prefix", tokens=19, windowed=False),),
    (make("prefix", tokens=3, init="gated"),),
    (make("prompt", tokens=4),),
    (make("lora", rank=2, **EVERY), make("prefix", tokens=2)),
    (make("lora", rank=2, **EVERY), make("lora", rank=3, **EVERY)),
)
NEW = 7


def adapted(engine: Engine, steps: tuple[Pass, ...], number: int) -> tuple[Graph, Packed | None]:
    """A trained adapter and what the server makes of it; the bare base for no steps."""
    if not steps:
        return engine.base, None
    graph = randomised(run.apply(engine.base, *steps), seed=number)
    return graph, engine.loader._packed(graph, f"adapter {number}")


def answer(graph: Graph, prompt: list[int]) -> list[int]:
    """What the adapter's own model says."""
    ids = torch.tensor([prompt])
    model = generator(module.load(graph))
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                          eos_token_id=None, pad_token_id=0)  # fmt: skip
    found: list[int] = made[0, len(prompt) :].tolist()
    return found


def go(engine: Engine, sequences: list[Sequence], chunk: int = 3) -> dict[str, list[torch.Tensor]]:
    """Greedy steps of all requests together, prompts in pieces; the logits of each new token."""
    goal = {sequence.owner: len(sequence.tokens) + NEW for sequence in sequences}
    logits: dict[str, list[torch.Tensor]] = {sequence.owner: [] for sequence in sequences}
    while True:
        room, pieces = FIXED if engine.deterministic else 10_000, []
        for sequence in sequences:
            count = min(sequence.left, chunk, room) if len(sequence.tokens) < goal[sequence.owner] else 0
            pieces += [(sequence, count)] if count else []
            room -= count
        if not pieces:
            return logits
        results = engine.step(pieces)
        for sequence, _ in pieces:
            if not sequence.left:
                logits[sequence.owner].append(results[sequence.owner])
                sequence.tokens.append(int(results[sequence.owner].argmax()))


def requests(engine: Engine, packed: list[Packed | None]) -> list[Sequence]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, adapter in enumerate(packed):
        prompt = torch.randint(3, 100, (3 + number % 7,), generator=generator).tolist()
        made.append(Sequence.of(f"request {number}", adapter, prompt, NEW))
        engine.admit(made[-1])
    return made


WINDOWED = (0, 1, 11, 12, 13)
SLOW = [pytest.param(name, tuple(range(len(METHODS))), marks=pytest.mark.slow) for name in ("gpt2", "opt", "qwen3")]


@pytest.mark.parametrize(
    ("family", "chosen"), [("llama", tuple(range(len(METHODS)))), ("gemma3_text", WINDOWED), *SLOW]
)
def test_a_mixed_batch_says_what_each_model_says_alone(family: str, chosen: tuple[int, ...]) -> None:
    engine = Engine(graph_of(family), pool_bytes=1 << 24)
    graphs, packed = zip(*(adapted(engine, METHODS[i], i) for i in chosen), strict=True)
    sequences = requests(engine, list(packed))
    prompts = [sequence.tokens[sequence.virtual :] for sequence in sequences]
    go(engine, sequences)
    for sequence, graph, prompt, i in zip(sequences, graphs, prompts, chosen, strict=True):
        found = sequence.tokens[sequence.virtual + len(prompt) :]
        assert found == answer(graph, prompt), [step.name for step in METHODS[i]]
        engine.release(sequence)
    assert engine.memory.promised == 0


def test_adapters_share_the_matrices_of_vera() -> None:
    engine = Engine(graph_of("llama"), pool_bytes=1 << 24)
    one, two = (adapted(engine, METHODS[i], i)[1] for i in (7, 8))
    assert one is not None
    assert two is not None
    assert one.bank is two.bank is not None
    assert one.nbytes < one.bank.nbytes


@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt_oss", "llama4_text"))]
)
def test_experts_in_the_base(family: str) -> None:
    engine = Engine(graph_of(family), pool_bytes=1 << 24)
    steps = ((), (make("lora", rank=4, targets="*.{q,v}_proj"),), (make("prefix", tokens=3),))
    graphs, packed = zip(*(adapted(engine, step, i) for i, step in enumerate(steps)), strict=True)
    sequences = requests(engine, list(packed))
    prompts = [list(sequence.tokens) for sequence in sequences]
    go(engine, sequences)
    for sequence, graph, prompt in zip(sequences, graphs, prompts, strict=True):
        assert sequence.tokens[len(prompt) :] == answer(graph, prompt)
    with pytest.raises(UnsupportedError, match="no experts"):
        Engine(graph_of(family), pool_bytes=1 << 20, deterministic=True)
    on_experts = randomised(run.apply(engine.base, make("lora", rank=2, targets="*.experts.*")))
    with pytest.raises(UnsupportedError, match=r"experts.*gate_up_proj"):
        engine.loader._packed(on_experts, "experts")


def test_deterministic_results_have_the_same_bits_in_any_mix() -> None:
    engine = Engine(graph_of("llama"), pool_bytes=1 << 24, deterministic=True)
    packed = [adapted(engine, steps, i)[1] for i, steps in enumerate(METHODS)]
    together = requests(engine, packed)
    prompts = [sequence.tokens[sequence.virtual :] for sequence in together]
    mixed = go(engine, together)
    for sequence in together:
        engine.release(sequence)
    for number in (0, 1, 4, 7, 11, 14):
        alone = Sequence.of("alone", packed[number], prompts[number], NEW)
        engine.admit(alone)
        found = go(engine, [alone], chunk=5)["alone"]
        engine.release(alone)
        wanted = mixed[f"request {number}"]
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)), number


@pytest.mark.parametrize("quantised", [make("nf4"), make("intq")], ids=["nf4", "intq"])
def test_a_quantised_base(quantised: Pass) -> None:
    engine = Engine(run.apply(graph_of("llama"), quantised), pool_bytes=1 << 24)
    steps = ((), (make("lora", rank=3, **EVERY),), (make("dora", rank=3, **EVERY),))
    graphs, packed = zip(*(adapted(engine, step, i) for i, step in enumerate(steps)), strict=True)
    sequences = requests(engine, list(packed))
    prompts = [list(sequence.tokens) for sequence in sequences]
    go(engine, sequences)
    for sequence, graph, prompt in zip(sequences, graphs, prompts, strict=True):
        assert sequence.tokens[len(prompt) :] == answer(graph, prompt)


def test_half_precision_stays_close() -> None:
    base = graph_of("llama")
    engine = Engine(base, pool_bytes=1 << 24, dtype=torch.bfloat16)
    graph, packed = adapted(engine, (make("lora", rank=3, **EVERY),), 1)
    sequence = Sequence.of("one", packed, [5, 9, 40, 7], NEW)
    engine.admit(sequence)
    found = engine.step([(sequence, 4)])["one"].float()
    exact = module.load(graph)(torch.tensor([[5, 9, 40, 7]]), torch.ones(1, 4).long(), torch.arange(4)[None])[0][0, -1]
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_adapters_that_come_back_to_other_pages_say_the_same() -> None:
    large = Engine(graph_of("llama"), pool_bytes=1 << 22)
    steps = [(make("lora", rank=3, **EVERY),), (make("vera", rank=8, **EVERY),), (make("prefix", tokens=5),)]
    packed = [adapted(large, step, number)[1] for number, step in enumerate(steps * 3)]
    most = max(large.memory.total(one) for one in packed)
    small = Engine(graph_of("llama"), pool_bytes=(most + 2 * large.layout.pages(20)) * large.layout.page * 4)
    for number, adapter in enumerate(packed * 3):
        found = []
        for engine in (large, small):
            sequences = [Sequence.of(f"{number} {i}", adapter, [7, 30 + number, 9], NEW) for i in range(2)]
            for sequence in sequences:
                engine.admit(sequence)
            go(engine, sequences)
            for sequence in sequences:
                engine.release(sequence)
            found.append([sequence.tokens for sequence in sequences])
        assert found[0] == found[1]
    assert small.memory.evictions > 10
    assert large.memory.evictions == 0


def test_what_cannot_be_served_is_refused_by_name() -> None:
    base = graph_of("llama")
    with pytest.raises(UsageError, match="serves the bare base, and this graph has lora"):
        Engine(run.apply(base, make("lora")), pool_bytes=1 << 20)
    with pytest.raises(UnsupportedError, match="needs a decoder"):
        Engine(graph_of("bert"), pool_bytes=1 << 20)
    engine = Engine(base, pool_bytes=1 << 20, targets="*.q_proj")
    both = randomised(run.apply(base, make("lora", targets="*.{q,v}_proj")))
    with pytest.raises(UnsupportedError, match=r"layers\.0\.self_attn\.v_proj"):
        engine.loader._packed(both, "both")
    head = randomised(run.apply(base, make("lora", modules_to_save="lm_head")))
    with pytest.raises(UnsupportedError, match=r"replaces lm_head\.weight"):
        engine.loader._packed(head, "head")


def test_the_pass_comes_out_again() -> None:
    base = graph_of("llama")
    served = run.apply(base, make("slora"))
    assert without(served, {"slora"}).text() == base.text()
    assert without(served, {"slora"}).inputs == base.inputs
    assert [len(paths) for _, paths in served.groups()] == [len(paths) for _, paths in base.groups()]
