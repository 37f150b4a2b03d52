"""A decode step of 64 requests: 64 different adapters against one, and against PEFT's `adapter_names`, in one run.

    python -m benchmarks.serving.mixed                          # small and 100m, 64 adapters, about 20 minutes
    python -m benchmarks.serving.mixed --models small --adapters 4 --rounds 2

Bases: `small`, ../shared/models/pystdlib-llama (5.5M); `100m`, a random Llama of 102M (hidden 640, 12 layers). LoRA on
the attentions' linears or on all of a layer, all of rank 8, or of ranks 8, 16, 32 and 64 in turn. Every request has 32
tokens behind it and computes one more.

one / mixed     surgeon's server, all requests with one adapter, the last, which has the largest rank / each its own
read            all numbers of the adapters, read once from memory: what the mixed step has to do beyond the one
base            surgeon's server, no adapters
slots           the same step over vLLM's layout, in torch: matrices padded to the largest rank, one slot per adapter,
                those of each request gathered (vllm/lora/ops/torch_ops), shrink and expand as batched products
peft one / mixed  PEFT on transformers' model with its own cache, `adapter_names` of one adapter / of each its own

All of them take steps in turn, in one process; times are medians over the rounds, ratios medians of a round's own. The
processor's own time stands beside the wall's: it counts no waiting for a core that other work holds. On a small base
64 adapters are more numbers than the base itself, and all of them are read in every step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_step import SMALL, make_100m

TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
PAST = 32


@dataclass(frozen=True)
class Setting:
    """What adapters there are: how many, of which ranks in turn, at which linears."""

    adapters: int
    ranks: tuple[int, ...]
    targets: tuple[str, ...]


def engine_with(folder: Path, setting: Setting, requests: int) -> tuple[Any, list[Any]]:
    """A server's engine with room for four batches of requests, and adapters with random values."""
    from surgeon import api, run
    from surgeon.passes import make
    from surgeon.replaced import Held
    from surgeon.serve.engine import Engine

    base = api.read(folder, "causal-lm")
    config = base.config
    layers, hidden = config.num_hidden_layers, config.hidden_size
    rows, count = sum(setting.ranks[i % len(setting.ranks)] for i in range(setting.adapters)), setting.adapters
    keys_values = 4 * requests * (PAST + 32) * 2 * layers * hidden
    engine = Engine(base, pool_bytes=4 * (rows * layers * hidden * 30 + keys_values) + (64 << 20))
    targets = ",".join(f"*.{target}" for target in setting.targets)
    graphs = {rank: run.apply(base, make("lora", rank=rank, targets=targets)) for rank in set(setting.ranks)}
    packed = []
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        graph = graphs[setting.ranks[number % len(setting.ranks)]].copy()
        for name in graph.trainable():
            graph.inserted[name] = Held(torch.randn(graph.tensors[name].shape, generator=generator) * 0.02)
        packed.append(engine.loader._packed(graph, f"adapter {number}"))
    return engine, packed


def batch(engine: Any, packed: list[Any], requests: int, label: str) -> Callable[[], None]:
    """A decode step of requests, over and over from the same place."""
    from surgeon.serve.sequence import Sequence

    sequences = []
    for number in range(requests):
        prompt = torch.randint(5, 1000, (PAST + 1,), generator=torch.Generator().manual_seed(number)).tolist()
        sequence = Sequence.of(f"{label} {number}", packed[number % len(packed)] if packed else None, prompt, 4)
        engine.admit(sequence)
        engine.step([(sequence, PAST)])
        sequences.append(sequence)

    def step() -> None:
        engine.step([(sequence, 1) for sequence in sequences])
        for sequence in sequences:
            sequence.done -= 1

    return step


class Slots:
    """vLLM's layout in torch in the place of the server's bypass: `[slots, largest rank, width]` per linear."""

    def __init__(self, engine: Any, packed: list[Any]) -> None:
        self.engine, self.packed = engine, packed
        self.rank = max(int(p.table[:, 2].max()) for p in packed)
        self.stacks: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def stack(self, number: int, inp: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[slots, R, in]` and B `[slots, out, R]` of a linear, zeros beyond an adapter's own rank."""
        a, b = torch.zeros(len(self.packed), self.rank, inp), torch.zeros(len(self.packed), out, self.rank)
        for slot, packed in enumerate(self.packed):
            first_a, first_b, rank = packed.table[number, :3].tolist()
            starts, count = {}, 0
            for width, rows in packed.rows.items():
                starts[width] = count
                count += len(rows)
            if rank > 0:
                a[slot, :rank] = packed.rows[inp][first_a - starts[inp] :][:rank]
                b[slot, :, :rank] = (packed.rows[out][first_b - starts[out] :][:rank] * packed.scales[number]).T
        return a, b

    def bypass(
        self, y: Any, x: Any, bias: Any, pool: Any, rows: Any, table: Any, scales: Any, owners: Any, **_: Any
    ) -> Any:
        """y + B A x of each token's slot."""
        known = self.stacks.get(id(table))
        if known is None:
            tables = next(a for a in self.engine.batches._adapters.values() if any(t is table for t in a.tables))
            number = next(i for i, t in enumerate(tables.tables) if t is table)
            order = torch.tensor([int(name.split()[1]) for name in self._names()])
            known = self.stacks[id(table)] = (*self.stack(number, x.shape[-1], y.shape[-1]), order)
        a, b, order = known
        if not len(a) or not bool((table[:, 2] > 0).any()):
            return y
        slot = order[owners]
        low = torch.einsum("bi,boi->bo", x.reshape(-1, x.shape[-1]), a[slot])
        return y + torch.einsum("bi,boi->bo", low, b[slot]).view_as(y)

    def _names(self) -> list[str]:
        """The adapters of the last batch, in the order of its tables."""
        found = next(reversed(self.engine.batches._adapters))
        return list(dict.fromkeys(key for key, _ in found[0] if key))

    def installed(self) -> Any:
        """The engine's model with this in the place of its bypass."""
        from surgeon import module
        from surgeon.serve.engine import _swept

        graph = _swept(self.engine.model.graph)
        for part, _ in graph.parts():
            for node in part.nodes:
                if node.target is torch.ops.surgeon.pooled_bypass.default:
                    node.target = self.bypass
        return module.rebind(graph, self.engine.model)


def over_slots(engine: Any, packed: list[Any], requests: int) -> Callable[[], None]:
    """The mixed step over vLLM's layout."""
    slots = Slots(engine, packed)
    own, other = engine.model, slots.installed()
    step = batch(engine, packed, requests, "slots")

    def run() -> None:
        engine.model = other
        try:
            step()
        finally:
            engine.model = own

    return run


def reading(engine: Any, packed: list[Any]) -> Callable[[], None]:
    """Every number of the adapters once; they lie at the front of the pool."""
    numbers = sum(one.nbytes for one in packed) // engine.memory.pool.data.element_size()

    def run() -> None:
        engine.memory.pool.data[:numbers].sum()

    return run


def peft_steps(folder: Path, setting: Setting, requests: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """PEFT's step with one adapter for all, and with each request's own."""
    import peft
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = [f"a{number}" for number in range(setting.adapters)]
    for number, name in enumerate(names):
        rank = setting.ranks[number % len(setting.ranks)]
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(setting.targets), init_lora_weights=False
        )
        if number == 0:
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.eval()
    ids = torch.randint(5, 1000, (requests, PAST))
    with torch.no_grad():
        cache = model.base_model.model(ids, use_cache=True).past_key_values

    past = [(layer.keys, layer.values) for layer in cache.layers]

    def step(chosen: list[str]) -> None:
        with torch.no_grad():
            model(torch.ones(requests, 1, dtype=torch.long), past_key_values=cache, adapter_names=chosen)
        for layer, (keys, values) in zip(cache.layers, past, strict=True):
            layer.keys, layer.values = keys, values

    one = names[-1]
    mixed = [names[number % len(names)] for number in range(requests)]
    return (lambda: step([one] * requests)), (lambda: step(mixed))


def measure(folder: Path, setting: Setting, requests: int, rounds: int, with_peft: bool) -> dict[str, Any]:
    """Medians of every variant, and the ratios."""
    engine, packed = engine_with(folder, setting, requests)
    steps = {
        "base": batch(engine, [], requests, "base"),
        "one": batch(engine, packed[-1:], requests, "one"),
        "mixed": batch(engine, packed, requests, "mixed"),
        "slots": over_slots(engine, packed, requests),
        "read": reading(engine, packed),
    }
    if with_peft:
        steps["peft one"], steps["peft mixed"] = peft_steps(folder, setting, requests)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            for name, step in steps.items():
                start = time.perf_counter(), time.process_time()
                step()
                if turn >= 2:
                    times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    pairs = [("mixed", "one"), ("slots", "mixed")]
    pairs += [("peft mixed", "peft one"), ("peft one", "one"), ("peft mixed", "mixed")] if with_peft else []
    found: dict[str, Any] = {"requests": requests, "rounds": rounds, "adapters' bytes": sum(p.nbytes for p in packed)}
    for place, clock in enumerate(("seconds", "cpu seconds")):
        found[clock] = {name: statistics.median(one[place] for one in listed) for name, listed in times.items()}
        found[f"ratios, {clock}"] = {
            f"{over} / {under}": statistics.median(
                a[place] / b[place] for a, b in zip(times[over], times[under], strict=True)
            )
            for over, under in pairs
        }
    return found


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="small,100m")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--ranks", default="8;8,16,32,64", help="settings, each the ranks of its adapters in turn")
    parser.add_argument("--targets", default="attention,all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "serving_mixed.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name, ranks, targets in itertools.product(
        given.models.split(","), given.ranks.split(";"), given.targets.split(",")
    ):
        setting = Setting(given.adapters, tuple(map(int, ranks.split(","))), TARGETS[targets])
        with tempfile.TemporaryDirectory() as place:
            folder = SMALL if name == "small" else Path(place)
            if name == "100m":
                make_100m(folder)
            found = measure(folder, setting, given.requests, given.rounds, not given.no_peft)
        results[f"{name}, {given.adapters} adapters, ranks {ranks}, {targets}"] = found
        print(f"{name}, {given.adapters} adapters, ranks {ranks}, {targets}")
        for what in found["seconds"]:
            print(f"  {what:24}{found['seconds'][what] * 1e3:9.2f} ms{found['cpu seconds'][what] * 1e3:9.2f} ms CPU")
        for what, ratio in found["ratios, seconds"].items():
            print(f"  {what:24}{ratio:9.2f}   {found['ratios, cpu seconds'][what]:9.2f}    CPU")
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
