"""The server as a Ray Serve application: replicas behind one address, and an adapter's requests to those that have it.

    serve run surgeon.serve.on_ray:application base=model/ adapters=adapters/ replicas=4

Every replica is a whole server (`surgeon.serve.app`) over the same folders of adapters. The router reads the `model` of
a request and names it to Ray Serve as the multiplexed model, which prefers replicas that have it in memory, and puts
new ones where there is room. Keys, limits and errors are the replicas' own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from surgeon.errors import SurgeonError, UsageError
from surgeon.serve.app import make_app
from surgeon.serve.open import open_server
from surgeon.serve.protocol import Refused, failure
from surgeon.serve.scheduler import Limits
from surgeon.serve.server import Options

_HERE_ONLY = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
KNOWN = 256
"""Adapters that requests are brought to a replica for: the last it has read."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `serve run … key=value` may say.

    Attributes:
        base: the base model: folder or hub id.
        adapters: folders whose subfolders are adapters, separated by commas; every replica watches them.
        name: what requests call the base; its folder's name if empty.
        replicas: how many servers.
        cpus: cores each of them is given.
        pool: bytes of a replica's pool.
        host_cache: bytes of adapters a replica keeps in the host's memory.
        running: requests at once in a replica.
        active: adapters at once in a batch.
        body: bytes a request may have.
        keys: API keys, separated by commas.
        quantise: a pass that quantises the base.
    """

    base: str
    adapters: str = ""
    name: str = ""
    replicas: int = 1
    cpus: float = 1.0
    pool: int = 1 << 30
    host_cache: int = 4 << 30
    running: int = 64
    active: int = 64
    body: int = 1 << 20
    keys: str = ""
    quantise: str = ""

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Settings:
        """From texts; raises UsageError for what is unknown or no number."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        odd = sorted(set(given) - set(fields))
        if odd or not given.get("base"):
            what = f"there is no setting {odd[0]!r}" if odd else "no base model is named"
            raise UsageError(what, "serve run", f"base=FOLDER and any of {', '.join(list(fields)[1:])}")
        found: dict[str, Any] = {}
        for name, value in given.items():
            kind: Any = {"int": int, "float": float}.get(str(fields[name].type), str)
            try:
                found[name] = kind(value)
            except ValueError as error:
                raise UsageError(f"{name} is {value!r}", "serve run", f"a number: {name}=2") from error
        return cls(**found)

    @property
    def title(self) -> str:
        """What requests call the base."""
        return self.name or Path(self.base).absolute().name


class Replica:
    """One server, which answers requests that the router hands on."""

    def __init__(self, settings: Settings) -> None:
        folders = tuple(Path(text).absolute() for text in settings.adapters.split(",") if text)
        keys = frozenset(key for key in settings.keys.split(",") if key)
        options = Options((settings.title,), keys, (), folders, settings.body)
        self.server = open_server(
            settings.base, options=options, limits=Limits(settings.running, settings.active), pool_bytes=settings.pool,
            host_bytes=settings.host_cache, quantise=settings.quantise,
        )  # fmt: skip
        self.app = make_app(self.server)
        self.number = serve.get_replica_context().replica_id.unique_id.encode()
        self.server.start()

    @serve.multiplexed(max_num_models_per_replica=KNOWN)  # type: ignore[untyped-decorator]
    async def adapter(self, name: str) -> str:
        """Read an adapter; Ray Serve remembers that this replica has it."""
        await self.server.adapter(name)
        return name

    async def handle(
        self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> AsyncIterator[tuple[int, list[tuple[bytes, bytes]]] | bytes]:
        """A request through the server's own routes: its status and headers, then its body in pieces."""
        name = serve.get_multiplexed_model_id()
        if name:
            with contextlib.suppress(SurgeonError):  # the route says what is wrong with it, in OpenAI's words
                await self.adapter(name)
        async for piece in answered(self.app, method, path, headers, body):
            yield piece if isinstance(piece, bytes) else (piece[0], [*piece[1], (b"x-surgeon-replica", self.number)])

    def check_health(self) -> None:
        """For Ray: raises when the server has failed."""
        if not self.server.service.alive:
            raise SurgeonError("the server's loop has ended", self.server.options.names[0], "see the replica's log")


async def answered(
    app: Any, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes
) -> AsyncIterator[tuple[int, list[tuple[bytes, bytes]]] | bytes]:
    """What an ASGI application answers: (status, headers), then the body in pieces; closed early, it hears of it."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": None, "server": None, "state": {},
    }  # fmt: skip
    sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    given, gone = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()

    async def receive() -> dict[str, Any]:
        if given:
            return given.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(scope, receive, sent.put)
        finally:
            await sent.put(None)

    task = asyncio.create_task(run())
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                yield message["status"], [(bytes(k), bytes(v)) for k, v in message["headers"]]
            elif message.get("body"):
                yield message["body"]
        await task
    finally:
        gone.set()


class Router:
    """Hands requests to replicas, those of one adapter to the replicas that have it."""

    def __init__(self, replicas: Any, base: str, limit: int) -> None:
        self.replicas, self.base, self.limit = replicas.options(method_name="handle", stream=True), base, limit

    async def __call__(self, request: Request) -> Response:
        """Any route of the server."""
        if request.url.path in _HERE_ONLY:
            hint = "put the adapter's folder into the watched ones, or take it out"
            what = "a Ray application has the adapters of its folders"
            status, told = failure(Refused(400, what, request.url.path, hint, "not_supported"))
            return JSONResponse(told, status)
        body = await self._body(request)
        name = _model(body)
        chosen = self.replicas.options(multiplexed_model_id=name) if name not in ("", self.base) else self.replicas
        stream = chosen.remote(request.method, request.url.path, request.headers.raw, body)
        status, headers = await anext(stream)
        made = StreamingResponse(stream, status)
        made.raw_headers = headers
        return made

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than a replica needs to refuse it."""
        found = b""
        async for piece in request.stream():
            found += piece
            if len(found) > self.limit:
                break
        return found


def _model(body: bytes) -> str:
    """What a request names as its model, "" where it names none."""
    try:
        found = json.loads(body) if body else {}
    except ValueError:
        return ""
    name = found.get("model") if isinstance(found, dict) else None
    return name if isinstance(name, str) and len(name) <= 256 else ""


def application(given: dict[str, str]) -> Application:
    """The application, for `serve run surgeon.serve.on_ray:application base=… adapters=…`; see `Settings`.

    Raises:
        UsageError: a setting is unknown or missing.
    """
    settings = Settings.parse(given)
    replica = serve.deployment(
        Replica, num_replicas=settings.replicas, max_ongoing_requests=16 * settings.running,
        ray_actor_options={"num_cpus": settings.cpus},
    )  # fmt: skip
    router: Any = serve.deployment(Router, max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0})
    bound: Application = router.bind(replica.bind(settings), settings.title, settings.body)  # type: ignore[attr-defined]
    return bound
