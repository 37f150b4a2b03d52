"""Throughput, first-token latency and SLO attainment against the number of adapters, on the paper's synthetic traces.

    python -m benchmarks.serving.traces                                # 5 to 2,000 adapters, about 40 minutes
    python -m benchmarks.serving.traces --adapters 2,6 --seconds 5 --rate 2

Base: ../shared/models/pystdlib-llama; LoRA of ranks 8, 16, 32 and 64 in turn on q, k, v and o, in folders on disk.
Traces (Sheng et al. 2023, §7.1, and their code; methods.md §11): `code`, one Gamma process of rate R and coefficient of
variation cv for all requests, adapters floor(n · u) with u of density α u^(α − 1); `paper`, a Gamma process of its own
for every adapter, rates following a power law of exponent α. Prompts and answers have U[8, 64] tokens (the paper: 512).

Throughput counts requests that ended, over the whole run; latency is from arrival to the first token; a request attains
the SLO if its first token comes within `--slo` seconds. Memory is the peak resident size.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_step import SMALL

RANKS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Arrival:
    """A request: when, for which adapter, how long its prompt and its answer are."""

    when: float
    adapter: int
    prompt: int
    answer: int


def trace(
    kind: str, adapters: int, rate: float, seconds: float, alpha: float, cv: float, seed: int = 42
) -> list[Arrival]:
    """The requests of one run, `int(rate · seconds)` of them, in order."""
    draw = random.Random(seed)
    count = int(rate * seconds)
    if kind == "code":
        moments, now = [], 0.0
        for _ in range(count):
            now += draw.gammavariate(1 / cv**2, cv**2 / rate)
            moments.append((now, min(adapters - 1, int(adapters * draw.random() ** (1 / alpha)))))
    else:
        weights = [(i + 1) ** -alpha for i in range(adapters)]
        moments = []
        for adapter, weight in enumerate(weights):
            own, now = rate * weight / sum(weights), 0.0
            while now < seconds:
                now += draw.gammavariate(1 / cv**2, cv**2 / own)
                moments.append((now, adapter))
        moments = sorted(moments)[:count]
    lengths = [(draw.randint(8, 64), draw.randint(8, 64)) for _ in moments]
    return [Arrival(when, who, *length) for (when, who), length in zip(moments, lengths, strict=True)]


def make_adapters(folder: Path, count: int) -> list[Path]:
    """PEFT folders with random values."""
    from surgeon import api, peft_files, run
    from surgeon.passes import make
    from surgeon.passes.base import Adapter
    from surgeon.replaced import Held

    base, generator = api.read(SMALL, "causal-lm"), torch.Generator().manual_seed(0)
    graphs = {rank: run.apply(base, make("lora", rank=rank, targets="*.{q,k,v,o}_proj")) for rank in RANKS}
    places = []
    for number in range(count):
        graph = graphs[RANKS[number % len(RANKS)]].copy()
        for name in graph.trainable():
            graph.inserted[name] = Held(torch.randn(graph.tensors[name].shape, generator=generator) * 0.02)
        step = graph.applied[-1]
        assert isinstance(step, Adapter)
        places.append(folder / f"a{number}")
        peft_files.write_adapter(graph, "lora", step, places[-1])
    return places


def served(places: list[Path], pool_bytes: int, running: int) -> tuple[Any, Any]:
    """A service over the base, and the registry of its adapters."""
    from surgeon import api
    from surgeon.serve.open import engine_of
    from surgeon.serve.registry import Registry
    from surgeon.serve.scheduler import Limits
    from surgeon.serve.service import Service

    engine = engine_of(api.read(SMALL, "causal-lm"), pool_bytes=pool_bytes)
    pages = engine.memory.pool.pages
    registry = Registry(engine.loader, reserved=["base"], host_bytes=256 << 20, page_limit=pages)
    for place in places:
        registry.add(place.name, place)
    service = Service(engine, Limits(running=running, adapters=running, queue=10**6))
    service.start()
    return service, registry


def replay(arrivals: list[Arrival], service: Any, registry: Any, slo: float) -> dict[str, Any]:
    """Send a trace and wait for the last answer."""
    from concurrent.futures import ThreadPoolExecutor

    from surgeon.serve.request import Event, Request
    from surgeon.serve.sampling import Sampling

    left, over, lock = len(arrivals), threading.Event(), threading.Lock()
    done: list[Request] = []

    def send(arrival: Arrival, due: float) -> None:
        packed = registry.get(f"a{arrival.adapter}")
        ids = [5 + (arrival.adapter + i) % 1000 for i in range(arrival.prompt)]

        def tell(event: Event) -> None:
            nonlocal left
            if event.finish or event.error is not None:
                with lock:
                    left -= 1
                    done.append(made)
                    if not left:
                        over.set()

        made = Request(f"a{arrival.adapter}", packed, ids, arrival.answer, Sampling(temperature=0), tell, arrived=due)
        service.submit(made)

    start, steps, busy = time.monotonic(), service.counters.steps, service.counters.busy
    with ThreadPoolExecutor(1) as readers:
        for arrival in arrivals:
            time.sleep(max(0.0, start + arrival.when - time.monotonic()))
            readers.submit(send, arrival, start + arrival.when)
    over.wait()
    took = time.monotonic() - start
    waits = sorted(request.first - request.arrived for request in done)
    return {
        "requests": len(done),
        "seconds": took,
        "throughput": len(done) / took,
        "tokens per second": sum(len(r.answer) for r in done) / took,
        "first token, mean": sum(waits) / len(waits),
        "first token, median": waits[len(waits) // 2],
        "first token, 99 %": waits[int(len(waits) * 0.99)],
        "SLO attainment": sum(wait <= slo for wait in waits) / len(waits),
        "steps": service.counters.steps - steps,
        "busy": service.counters.busy - busy,
        "evictions": service.engine.memory.evictions,
        "peak memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Throughput, first-token latency and SLO attainment against the number of adapters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4))
    for axis, key in zip(axes, ("throughput", "first token, mean", "SLO attainment"), strict=True):
        for kind in dict.fromkeys(row["trace"] for row in rows):
            chosen = [row for row in rows if row["trace"] == kind]
            axis.plot([row["adapters"] for row in chosen], [row[key] for row in chosen], marker="o", label=kind)
        axis.set(xscale="log", xlabel="adapters", title=key, ylim=(0, None))
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run, print, write JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", default="5,100,1000,2000")
    parser.add_argument("--traces", default="code,paper")
    parser.add_argument("--rate", type=float, default=4.0)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--cv", type=float, default=1.0)
    parser.add_argument("--slo", type=float, default=6.0)
    parser.add_argument("--pool", type=int, default=256 << 20)
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "serving_traces.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    numbers, rows = [int(n) for n in given.adapters.split(",")], []
    with tempfile.TemporaryDirectory() as scratch:
        places = make_adapters(Path(scratch), max(numbers))
        for kind in given.traces.split(","):
            for count in numbers:
                service, registry = served(places[:count], given.pool, given.running)
                arrivals = trace(kind, count, given.rate, given.seconds, given.alpha, given.cv)
                found = replay(arrivals, service, registry, given.slo)
                service.stop()
                rows.append({"trace": kind, "adapters": count, "pool": given.pool, **found})
                print(json.dumps(rows[-1]), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"options": {k: str(v) for k, v in vars(given).items()}, "rows": rows}, indent=1))
    plot(rows, given.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
