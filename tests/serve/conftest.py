"""A server over the real small Llama with an adapter of every kind on disk, and the texts their own models make."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from benchmarks.zoo.graphs import randomised
from surgeon import api, module, run, store
from surgeon.chat import complete
from surgeon.graph import Graph
from surgeon.passes import make
from surgeon.serve.app import make_app
from surgeon.serve.open import engine_of
from surgeon.serve.registry import Registry
from surgeon.serve.scheduler import Limits
from surgeon.serve.server import Options, Server
from surgeon.serve.service import Service

METHODS = {
    "lora": make("lora", rank=3, targets="all-linear"),
    "dora": make("dora", rank=2),
    "vera": make("vera", rank=4),
    "prefix": make("prefix", tokens=3),
    "prompt": make("prompt", tokens=4),
    "dylora": make("dylora", rank=4),
}
KEY = "secret"
TEMPLATE = "{% for m in messages %}# {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}def "


@dataclass
class Running:
    """A server that listens.

    Attributes:
        url: where.
        server: the server itself.
        base: graph of the base.
        folders: of the adapters, by name.
    """

    url: str
    server: Server
    base: Graph
    folders: dict[str, Path]
    root: Path

    def expected(self, name: str, prompt: str, tokens: int) -> str:
        """What an adapter's own work folder makes of a prompt, greedily."""
        graph = store.load(self.folders[name]) if name in self.folders else self.base
        tokenizer = self.server.tokenizer
        return complete(module.load(graph), tokenizer, [prompt], max_new_tokens=tokens, do_sample=False)[0]


@pytest.fixture(scope="session")
def running(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder, root = shared / "models" / "pystdlib-llama", tmp_path_factory.mktemp("adapters")
    base = api.read(folder, "causal-lm")
    folders = {name: root / name for name in METHODS}
    for number, (name, step) in enumerate(METHODS.items()):
        store.save(randomised(run.apply(base, step), seed=number, std=0.05), folders[name])
    engine = engine_of(base, pool_bytes=48 << 20)
    registry = Registry(engine.loader, reserved=["llama"], host_bytes=1 << 28, page_limit=engine.memory.pool.pages)
    options = Options(("llama",), frozenset([KEY]), (root,), (root,), 1 << 16, 400, 0.0, TEMPLATE)
    server = Server(Service(engine, Limits(running=32, queue=40)), registry, api.tokenizer_of(folder), options)
    with listening(make_app(server)) as url:
        yield Running(url, server, base, folders, root)


class listening:
    """uvicorn on a free port, in a thread."""

    def __init__(self, app: Any) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        # Kept alive for longer than a busy machine may pause between two requests of a client.
        options: dict[str, Any] = {"log_level": "error", "timeout_graceful_shutdown": 2, "timeout_keep_alive": 600}
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, **options))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.02)
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(10)
        self.socket.close()
