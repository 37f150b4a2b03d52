"""What a server tells Prometheus: requests and tokens by adapter, the pool, the queue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from surgeon.serve.server import Server

_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 10.0, 30.0)
_BASE = "(base)"


class Metrics:
    """Reads the counters of a server when it is asked."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        made: bytes = generate_latest(self.registry)
        return made

    def collect(self) -> Iterator[Any]:
        """All metrics."""
        counters, service = self.server.service.counters, self.server.service
        yield from self._by_adapter(counters)
        memory, scheduler = service.engine.memory, service.scheduler
        cached, cached_bytes = self.server.registry.cached()
        gauges = {
            "pool_pages": ("pages of the pool", memory.pool.pages),
            "pool_free_pages": ("pages that nobody has", memory.pool.free),
            "pool_promised_pages": ("pages that what runs may need", memory.promised),
            "pool_bytes": ("bytes of the pool", memory.pool.nbytes),
            "resident_adapters": ("adapters in the pool", len(memory.residents)),
            "known_adapters": ("adapters that have a name", len(self.server.registry.entries())),
            "host_adapters": ("adapters in the host's memory", cached),
            "host_bytes": ("bytes of those", cached_bytes),
            "running_requests": ("requests that are being answered", len(scheduler.running)),
            "waiting_requests": ("requests in the queue", scheduler.queued),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"surgeon_{name}", text, value=value)
        yield CounterMetricFamily("surgeon_steps", "steps of the model", value=counters.steps)
        yield CounterMetricFamily("surgeon_busy_seconds", "seconds spent in steps", value=counters.busy)
        yield CounterMetricFamily("surgeon_evictions", "adapters thrown out of the pool", value=memory.evictions)

    def _by_adapter(self, counters: Any) -> Iterator[Any]:
        for name, text, counts in (
            ("prompt_tokens", "tokens of prompts computed", counters.prompt_tokens),
            ("generated_tokens", "tokens generated", counters.new_tokens),
        ):
            family = CounterMetricFamily(f"surgeon_{name}", text, labels=["adapter"])
            for adapter, count in dict(counts).items():
                family.add_metric([adapter or _BASE], count)
            yield family
        ended = CounterMetricFamily("surgeon_requests", "requests by how they ended", labels=["adapter", "reason"])
        for (adapter, reason), count in dict(counters.finished).items():
            ended.add_metric([adapter or _BASE, reason], count)
        yield ended
        waits = list(counters.waits)
        buckets = [(str(bound), float(sum(wait <= bound for wait in waits))) for bound in _BUCKETS]
        yield HistogramMetricFamily(
            "surgeon_first_token_seconds", "seconds from arrival to the first token, of the latest 10,000 requests",
            buckets=[*buckets, ("+Inf", float(len(waits)))], sum_value=sum(waits),
        )  # fmt: skip
