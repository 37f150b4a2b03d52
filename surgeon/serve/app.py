"""The HTTP face of a server: OpenAI's routes, vLLM's for adapters, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from surgeon.errors import SurgeonError
from surgeon.serve import dashboard
from surgeon.serve.answering import Answering
from surgeon.serve.metrics import Metrics
from surgeon.serve.protocol import Body, ChatBody, CompletionBody, LoadBody, Refused, UnloadBody, failure
from surgeon.serve.server import Server

OPEN = ("/health", "/metrics", "/dashboard")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def make_app(server: Server) -> FastAPI:
    """The application of a server, which starts and stops with it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.start()
        yield
        server.stop()

    app = FastAPI(title="surgeon", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, server=server)
    _errors(app)
    _text(app, server)
    _adapters(app, server)
    _state(app, server)
    return app


def refusal(error: Exception) -> JSONResponse:
    """An error as a response; what cannot succeed when repeated says so to OpenAI's clients."""
    status, body = failure(error)
    headers = {"Retry-After": "1"} if status == 429 else {"x-should-retry": "false"}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status, headers)


def _errors(app: FastAPI) -> None:
    async def known(_: Request, error: Exception) -> Response:
        return refusal(error)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return refusal(_invalid(error))

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        hint = {404: "GET /v1/models, POST /v1/chat/completions, /v1/completions", 405: "another method"}
        return refusal(Refused(error.status_code, str(error.detail), "", hint.get(error.status_code, ""), "http_error"))

    app.add_exception_handler(SurgeonError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, known)


def _invalid(error: RequestValidationError) -> Refused:
    """The first thing wrong with a body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is not valid JSON: {first['ctx']['error']}", "body", "send JSON", "invalid_json")
    path = ".".join(str(part) for part in first["loc"] if part not in ("body",))
    if first["type"] == "extra_forbidden":
        return Refused(400, "this server has no such parameter", path, "leave it out", "unknown_parameter")
    return Refused(400, str(first["msg"]), path, "see the OpenAI API reference", "invalid_value")


def _text(app: FastAPI, server: Server) -> None:
    async def respond(body: Body, request: Request) -> Response:
        answering = await server.answer(body)
        if body.stream:
            return StreamingResponse(_streamed(answering), media_type="text/event-stream")
        try:
            return JSONResponse(await _unless_gone(answering, request))
        except Exception as error:  # of a step; whoever answers it for us closes the connection too
            return refusal(error)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await respond(body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await respond(body, request)


async def _streamed(answering: Answering) -> AsyncIterator[str]:
    """Events of a stream; an error after the first is one of them."""
    try:
        async for event in answering.stream():
            yield event
    except Exception as error:
        yield f"data: {json.dumps(failure(error)[1])}\n\n"
    finally:
        answering.cancel()


async def _unless_gone(answering: Answering, request: Request) -> dict[str, Any]:
    """The whole answer; work stops when the client has gone."""

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.25)
        answering.cancel()

    watcher = asyncio.create_task(gone())
    try:
        return await answering.whole()
    finally:
        watcher.cancel()


def _adapters(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": server.models()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        found = next((model for model in server.models() if model["id"] == name), None)
        return found if found is not None else server.model(server.registry.entry(name))

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadBody) -> Response:
        entry = await server.load(body)
        return PlainTextResponse(f"Success: LoRA adapter '{entry.name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadBody) -> Response:
        left = await server.unload(body)
        tail = f" {left} requests finish with it." if left else ""
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.{tail}")


def _state(app: FastAPI, server: Server) -> None:
    metrics = Metrics(server)

    @app.get("/health")
    async def health() -> Response:
        alive = server.service.alive
        return JSONResponse({"status": "ok" if alive else "failed", "problems": server.wrong}, 200 if alive else 503)

    @app.get("/dashboard")
    async def page() -> Response:
        return HTMLResponse(dashboard.PAGE.read_text(encoding="utf-8"))

    @app.get("/dashboard/state")
    async def shown() -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        found: dict[str, Any] = await loop.run_in_executor(None, server.service.do, lambda: dashboard.state(server))
        return found

    @app.get("/metrics")
    async def measured() -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class Gate:
    """Before any route: API keys, and how large a body may be."""

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        error = self._refused(headers)
        if error is not None:
            await refusal(error)(scope, receive, send)
            return
        body, error = await self._body(receive)
        if error is not None:
            await refusal(error)(scope, receive, send)
            return
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return given.pop() if given else await receive()

        others = [pair for pair in scope["headers"] if pair[0].lower() != b"content-type"]
        await self.app({**scope, "headers": [*others, (b"content-type", b"application/json")]}, replay, send)

    def _refused(self, headers: dict[bytes, bytes]) -> Refused | None:
        keys, limit = self.server.options.keys, self.server.options.body
        token = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        if keys and not any(hmac.compare_digest(token, key.encode()) for key in keys):
            hint = "send Authorization: Bearer KEY"
            return Refused(401, "the API key is missing or wrong", "Authorization", hint, "invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            return _too_large(limit)
        return None

    async def _body(self, receive: Receive) -> tuple[bytes, Refused | None]:
        """The whole body, read no further than the limit."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return b"", Refused(400, "the client has gone", "", "", "disconnected")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = bool(message.get("more_body"))
            if size > self.server.options.body:
                return b"", _too_large(self.server.options.body)
        return b"".join(parts), None


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the body has more than {limit} bytes", "body", "a shorter request", "body_too_large")
