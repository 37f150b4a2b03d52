"""From folders on disk to a server."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from surgeon import api, run
from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.passes import parse
from surgeon.passes.base import Adapter
from surgeon.serve.engine import Engine
from surgeon.serve.partition import Share
from surgeon.serve.registry import Registry
from surgeon.serve.scheduler import Limits
from surgeon.serve.server import Options, Server
from surgeon.serve.service import Service

log = logging.getLogger("surgeon.serve")


def open_server(
    base: str | Path,
    *,
    options: Options,
    adapters: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    pool_bytes: int = 1 << 30,
    host_bytes: int = 4 << 30,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    quantise: str = "",
    deterministic: bool = False,
    targets: str = "*",
    block: int = 0,
    share: Share | None = None,
) -> Server:
    """A server for a base model, not started yet.

    Args:
        base: folder or hub id.
        options: names, keys, folders and limits on what is asked.
        adapters: name → folder, or `folder@rank` for an adapter that has every rank.
        limits: on what runs at once.
        pool_bytes: of the pool for K/V pages and adapters.
        host_bytes: of adapters kept in the host's memory.
        dtype: of the model; None keeps the checkpoint's.
        device: where the model and the pool are.
        quantise: a pass that quantises the base, `nf4` or `intq(bits=4)`; "" for none.
        deterministic: whether answers have the same bits whatever else is asked.
        targets: the linears that adapters may change.
        block: tokens per page, 0 for what fits the model.
        share: the first of several processes that share the model; the others `follow`.

    Raises:
        UsageError: the base or an adapter cannot be opened.
        UnsupportedError: the model cannot be served.
    """
    graph = api.read(base, "causal-lm")
    tokenizer = api.tokenizer_of(base)
    if tokenizer is None:
        raise UsageError("there is no tokenizer", str(base), "put tokenizer.json beside the model")
    engine = engine_of(
        graph, quantise, pool_bytes=pool_bytes, dtype=dtype, device=device, deterministic=deterministic,
        targets=targets, block=block, share=share,
    )  # fmt: skip
    pages = engine.memory.pool.pages
    registry = Registry(engine.loader, reserved=options.names, host_bytes=host_bytes, page_limit=pages)
    for name, place in (adapters or {}).items():
        folder, _, rank = place.rpartition("@") if place.rpartition("@")[2].isdecimal() else (place, "", "")
        registry.add(name, Path(folder).absolute(), int(rank) if rank else None)
        registry.get(name)
    return Server(Service(engine, limits), registry, tokenizer, options)


def engine_of(graph: Graph, quantise: str = "", **options: Any) -> Engine:
    """The engine of a base, quantised first if asked for."""
    if any(isinstance(step, Adapter) for step in graph.applied):
        raise UsageError("this is an adapter", graph.source, "serve its base, and load it with --adapter NAME=FOLDER")
    graph = run.apply(graph, parse(quantise)) if quantise else graph
    share = options.get("share")
    if share is not None and share.rank == 0:
        from surgeon.serve.parallel import Told

        return Told(graph, **options)
    return Engine(graph, **options)


def follow(base: str | Path, quantise: str = "", **options: Any) -> None:
    """Be one of the other processes of a server, with the options of `engine_of`, until the first one stops."""
    from surgeon.serve.parallel import Follower

    Follower(engine_of(api.read(base, "causal-lm"), quantise, **options)).run()


def named(given: Sequence[str]) -> dict[str, str]:
    """`NAME=FOLDER` each; raises UsageError for anything else."""
    found = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UsageError(f"--adapter is {text!r}", "--adapter", "NAME=FOLDER, or NAME=FOLDER@RANK")
        found[name] = folder
    return found
