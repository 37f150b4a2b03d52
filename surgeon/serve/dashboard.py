"""The live view: what the page `/dashboard` shows, as one object."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from surgeon.serve.memory import Memory
from surgeon.serve.server import Server

PAGE = Path(__file__).with_suffix(".html")
MOST = 200
"""Adapters that the page lists; the ones in use come first."""


def state(server: Server) -> dict[str, Any]:
    """Pool, queue and adapters now; to be asked on the service's own thread."""
    service = server.service
    memory, scheduler, counters = service.engine.memory, service.scheduler, service.counters
    return {
        "model": server.options.names[0],
        "time": time.monotonic(),
        "tokens": sum(counters.new_tokens.values()),
        "running": len(scheduler.running),
        "waiting": scheduler.queued,
        "pages": memory.pool.pages,
        "free": memory.pool.free,
        "known": len(server.registry.entries()),
        "map": pool_map(memory),
        "adapters": _adapters(server),
    }


def pool_map(memory: Memory) -> list[tuple[str, int]]:
    """Runs of pages with the same kind of owner: free, tokens, adapter, idle (nobody uses it now) or bank."""

    def kind(page: int) -> str:
        owner = memory.pool.owner(page)
        if not owner:
            return "free"
        found = memory.residents.get(owner)
        if found is None:
            return "tokens"
        if owner.startswith("bank "):
            return "bank"
        return "adapter" if found.pins else "idle"

    return [(name, sum(1 for _ in run)) for name, run in itertools.groupby(map(kind, range(memory.pool.pages)))]


def _adapters(server: Server) -> list[dict[str, Any]]:
    memory, scheduler = server.service.engine.memory, server.service.scheduler
    rows: list[dict[str, Any]] = []
    for name, key in [("", ""), *((entry.name, entry.key) for entry in server.registry.entries())]:
        found = memory.residents.get(key)
        rows.append(
            {
                "name": name or f"{server.options.names[0]} (base)",
                "pages": len(found.pages) if found is not None else 0,
                "users": found.pins if found is not None else 0,
                "waiting": len(scheduler.waiting.get(name, ())),
                "running": sum(request.adapter == name for request in scheduler.running),
                "tokens": server.service.counters.new_tokens.get(name, 0),
            }
        )
    rows[1:] = sorted(rows[1:], key=lambda row: (-row["users"], -row["waiting"], -row["pages"], -row["tokens"]))
    return rows[:MOST]
