"""Throughput, first-token latency and SLO attainment against the number of adapters, on the paper's synthetic traces.

    python -m benchmarks.serving.traces                                # 5 to 2,000 adapters, about 12 minutes
    python -m benchmarks.serving.traces --adapters 2,6 --seconds 5 --rate 2 --out /tmp/traces.json

Every row is measured in a process of its own and saved at once; started again with the same options, it goes on with
the rows that are missing. `--folder` keeps the adapters (2,000 of them: 2.6 GB) from one run to the next.

Base: ../shared/models/pystdlib-llama; LoRA of ranks 8, 16, 32 and 64 in turn on q, k, v and o, in folders on disk.
Traces (Sheng et al. 2023, §7.1, and their code; methods.md §11): `code`, one Gamma process of rate R and coefficient of
variation cv for all requests, adapters floor(n · u) with u of density α u^(α − 1); `paper`, a Gamma process of its own
for every adapter, rates following a power law of exponent α. Prompts and answers have U[8, 64] tokens (the paper: 512).

Throughput counts requests that ended, over the whole run; latency is from arrival to the first token; a request attains
the SLO if its first token comes within `--slo` seconds. Memory is the process's own (resident without pages of files,
which the system takes back when it needs them), read every half second: what it is when the first quarter of the trace
has come, at the end, and at most. Pool and host cache have 256 MiB each, and are empty at first.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import random
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

    base = api.read(SMALL, "causal-lm")
    graphs = {rank: run.apply(base, make("lora", rank=rank, targets="*.{q,k,v,o}_proj")) for rank in RANKS}
    places = []
    for number in range(count):
        places.append(folder / f"a{number}")
        values = torch.Generator().manual_seed(number)
        if (places[-1] / "adapter_model.safetensors").exists():
            continue
        graph = graphs[RANKS[number % len(RANKS)]].copy()
        for name in graph.trainable():
            graph.inserted[name] = Held(torch.randn(graph.tensors[name].shape, generator=values) * 0.02)
        step = graph.applied[-1]
        assert isinstance(step, Adapter)
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
    done: list[tuple[float, int]] = []  # no requests: they would keep their adapters
    errors: list[str] = []

    def send(arrival: Arrival, due: float) -> None:
        packed = registry.get(f"a{arrival.adapter}")
        ids = [5 + (arrival.adapter + i) % 1000 for i in range(arrival.prompt)]

        def tell(event: Event) -> None:
            nonlocal left
            if event.error is not None:
                errors.append(f"{made.adapter}: {event.error!r}")
            if event.finish or event.error is not None:
                with lock:
                    left -= 1
                    done.append((made.first - made.arrived, len(made.answer)))
                    if not left:
                        over.set()

        made = Request(f"a{arrival.adapter}", packed, ids, arrival.answer, Sampling(temperature=0), tell, arrived=due)
        service.submit(made)

    start, steps, busy = time.monotonic(), service.counters.steps, service.counters.busy
    sizes: list[int] = []
    watcher = threading.Thread(target=watch, args=(sizes, over), daemon=True)
    watcher.start()
    with ThreadPoolExecutor(1) as readers:
        for arrival in arrivals:
            time.sleep(max(0.0, start + arrival.when - time.monotonic()))
            readers.submit(send, arrival, start + arrival.when)
    over.wait()
    took = time.monotonic() - start
    watcher.join()
    if errors:
        raise RuntimeError(f"{len(errors)} requests were not answered:\n" + "\n".join(errors[:5]))
    waits = sorted(wait for wait, _ in done)
    return {
        "requests": len(done),
        "seconds": took,
        "throughput": len(done) / took,
        "tokens per second": sum(tokens for _, tokens in done) / took,
        "first token, mean": sum(waits) / len(waits),
        "first token, median": waits[len(waits) // 2],
        "first token, 99 %": waits[int(len(waits) * 0.99)],
        "SLO attainment": sum(wait <= slo for wait in waits) / len(waits),
        "steps": service.counters.steps - steps,
        "busy": service.counters.busy - busy,
        "evictions": service.engine.memory.evictions,
        "memory, a quarter in": sizes[len(sizes) // 4],
        "memory, at the end": sizes[-1],
        "memory, most": max(sizes),
    }


def watch(sizes: list[int], over: threading.Event) -> None:
    """The memory of this process, until it is over."""
    sizes.append(own_bytes())
    while not over.wait(0.5):
        sizes.append(own_bytes())


def own_bytes() -> int:
    """What is resident and of no file."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def row(kind: str, count: int, folder: str, given: argparse.Namespace) -> dict[str, Any]:
    """One trace over so many adapters, in this process."""
    torch.set_num_threads(1)
    service, registry = served([Path(folder) / f"a{i}" for i in range(count)], given.pool, given.running)
    arrivals = trace(kind, count, given.rate, given.seconds, given.alpha, given.cv)
    found = replay(arrivals, service, registry, given.slo)
    service.stop()
    return {"trace": kind, "adapters": count, **found}


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Throughput, first-token latency, SLO attainment and memory against the number of adapters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = ("throughput", "first token, mean", "SLO attainment", "memory, most")
    figure, axes = pyplot.subplots(1, len(keys), figsize=(4 * len(keys), 3.4))
    for axis, key in zip(axes, keys, strict=True):
        for kind in dict.fromkeys(row["trace"] for row in rows):
            chosen = [row for row in rows if row["trace"] == kind]
            axis.plot([row["adapters"] for row in chosen], [row[key] for row in chosen], marker="o", label=kind)
        axis.set(xscale="log", xlabel="adapters", title=key, ylim=(0, None))
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each trace: throughput and memory with the most adapters over those with the fewest."""
    found = {}
    for kind in dict.fromkeys(row["trace"] for row in rows):
        chosen = sorted((row for row in rows if row["trace"] == kind), key=lambda row: int(row["adapters"]))
        least, most = chosen[0], chosen[-1]
        found[kind] = {
            "adapters": [least["adapters"], most["adapters"]],
            "throughput, most / fewest": most["throughput"] / least["throughput"],
            "memory, most / fewest": most["memory, most"] / least["memory, most"],
            "memory over the run, most": most["memory, at the end"] / most["memory, a quarter in"],
        }
    return found


def save(out: Path, options: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Everything so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {"options": options, "rows": rows, "summary": summary(rows)}
    out.write_text(json.dumps(found, indent=1) + "\n")
    plot(rows, out.with_suffix(".svg"))


def main() -> None:
    """Run, print, write JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", default="5,100,1000,2000")
    parser.add_argument("--traces", default="code,paper")
    parser.add_argument("--rate", type=float, default=8.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--cv", type=float, default=1.0)
    parser.add_argument("--slo", type=float, default=6.0)
    parser.add_argument("--pool", type=int, default=256 << 20)
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="where the adapters are kept; a temporary one if not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "serving_traces.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    apart = ("adapters", "traces", "folder", "out")
    options = {k: str(v) for k, v in vars(given).items() if k not in apart}
    known = json.loads(given.out.read_text()) if given.out.exists() else {}
    rows: list[dict[str, Any]] = known["rows"] if known.get("options") == options else []
    done = {(row["trace"], row["adapters"]) for row in rows}
    wanted = [(kind, int(n)) for kind in given.traces.split(",") for n in given.adapters.split(",")]
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_adapters(folder, max(count for _, count in wanted))
        workers = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
        stack.enter_context(workers)
        for kind, count in wanted:
            if (kind, count) in done:
                continue
            rows.append(workers.submit(row, kind, count, str(folder), given).result())
            print(json.dumps(rows[-1]), flush=True)
            save(given.out, options, rows)
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
