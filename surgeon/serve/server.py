"""A server without its network: requests in OpenAI's words become requests of the service, events become answers."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from surgeon.errors import SurgeonError, UsageError
from surgeon.serve.answering import Answering, logprobs
from surgeon.serve.detokenise import Detokeniser
from surgeon.serve.packed import Packed
from surgeon.serve.protocol import Body, ChatBody, CompletionBody, LoadBody, Refused, UnloadBody
from surgeon.serve.registry import Entry, Registry
from surgeon.serve.request import Request
from surgeon.serve.service import Service

DEFAULT_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Options:
    """How a server behaves.

    Attributes:
        names: of the base model; the first is what adapters have as their parent.
        keys: API keys; none for no check.
        roots: folders that adapters may be loaded from by request.
        watched: folders whose subfolders are adapters.
        body: bytes a request may have.
        prompt: tokens a prompt may have, 0 for as many as the model has.
        deadline: seconds a request may take where it says nothing, 0 for any.
        template: a chat template in place of the tokenizer's own.
    """

    names: tuple[str, ...]
    keys: frozenset[str] = frozenset()
    roots: tuple[Path, ...] = ()
    watched: tuple[Path, ...] = ()
    body: int = 1 << 20
    prompt: int = 0
    deadline: float = 0.0
    template: str = ""


class Server:
    """One base model, its adapters by name, and everything that can be asked of them."""

    def __init__(self, service: Service, registry: Registry, tokenizer: Any, options: Options) -> None:
        self.service, self.registry, self.tokenizer, self.options = service, registry, tokenizer, options
        self.ends = _ends(service)
        self.wrong: dict[str, str] = {}
        self._readers = ThreadPoolExecutor(2, "surgeon-read")
        self._watcher = threading.Thread(target=self._watch, name="surgeon-watch", daemon=True)
        self._stopping = threading.Event()

    def start(self, interval: float = 5.0) -> None:
        """Serve, and look at the watched folders from time to time."""
        self._interval = interval
        self.scan()
        self.service.start()
        if self.options.watched:
            self._watcher.start()

    def stop(self) -> None:
        """Stop serving."""
        self._stopping.set()
        self.service.stop()
        self._readers.shutdown(wait=False)

    def scan(self) -> None:
        """Bring the watched folders' adapters up to date."""
        wrong: dict[str, str] = {}
        for folder in self.options.watched:
            try:
                *_, failed = self.registry.scan(folder)
            except OSError as error:
                wrong[str(folder)] = str(error)
                continue
            wrong.update((line.partition(":")[0], line) for line in failed)
        self.wrong = wrong

    def _watch(self) -> None:
        while not self._stopping.wait(self._interval):
            self.scan()

    def models(self) -> list[dict[str, Any]]:
        """The base and its adapters, as /v1/models lists them."""
        base = self.options.names[0]
        start = int(time.time())
        limit = self.service.engine.limit or None
        head = {"object": "model", "owned_by": "surgeon"}
        found = [
            {"id": name, **head, "created": start, "root": self.service.engine.base.source, "parent": None,
             "max_model_len": limit}
            for name in self.options.names
        ]  # fmt: skip
        return [*found, *(self.model(entry) | {"parent": base} for entry in self.registry.entries())]

    def model(self, entry: Entry) -> dict[str, Any]:
        """One adapter."""
        made = {"id": entry.name, "object": "model", "owned_by": "surgeon", "created": entry.created}
        return {**made, "root": str(entry.path), "parent": self.options.names[0], "rank": entry.rank}

    async def adapter(self, name: str) -> tuple[str, Packed | None]:
        """The adapter that a request's `model` names; the base is "" and None.

        Raises:
            UnknownAdapter: there is none of this name.
            SurgeonError: it cannot be served.
        """
        if name in self.options.names:
            return "", None
        self.registry.entry(name)
        return name, await asyncio.get_running_loop().run_in_executor(self._readers, self.registry.get, name)

    async def load(self, body: LoadBody) -> Entry:
        """Load an adapter from a folder below one of the roots; it is read at once, and refused if it does not fit."""
        place = self._allowed(body.lora_path)
        known = {entry.name for entry in self.registry.entries()}
        if body.load_inplace and body.lora_name in known:
            self.registry.remove(body.lora_name)
        elif body.lora_name in known:
            what = f"the adapter {body.lora_name!r} is loaded already"
            raise Refused(409, what, "lora_name", "unload it first, or load_inplace=true", "already_loaded")
        entry = self.registry.add(body.lora_name, place, body.rank)
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._readers, self.registry.get, entry.name)
        except SurgeonError:
            self.registry.remove(entry.name)
            raise
        return entry

    def _allowed(self, path: str) -> Path:
        """A folder below one of the roots, links resolved."""
        roots = [root.resolve() for root in (*self.options.roots, *self.options.watched)]
        place = Path(path).resolve() if Path(path).is_absolute() else None
        places = [place] if place is not None else [(root / path).resolve() for root in roots]
        for found in places:
            if found is not None and any(found.is_relative_to(root) and found != root for root in roots):
                if found.is_dir():
                    return found
                raise Refused(404, "there is no such folder", path, "name a folder with an adapter", "not_found")
        told = ", ".join(map(str, roots)) or "none: start the server with --adapters or --allow"
        raise Refused(403, "adapters are not loaded from there", path, f"folders below {told}", "path_not_allowed")

    async def unload(self, body: UnloadBody) -> int:
        """Forget an adapter; returns how many requests still use it.

        Raises:
            Refused: some do, and `force` was not given.
        """
        entry = self.registry.entry(body.lora_name)
        loop = asyncio.get_running_loop()
        users: int = await loop.run_in_executor(None, self.service.do, lambda: self._users(entry.name))
        if users and not body.force:
            what = f"{users} requests use {entry.name!r}"
            raise Refused(409, what, "lora_name", "wait for them, or force=true lets them finish", "in_use")
        self.registry.remove(entry.name)
        await loop.run_in_executor(None, self.service.do, lambda: self.service.engine.memory.drop(entry.key))
        return users

    def _users(self, name: str) -> int:
        scheduler = self.service.scheduler
        return sum(r.adapter == name for r in scheduler.running) + len(scheduler.waiting.get(name, ()))

    async def answer(self, body: Body) -> Answering:
        """Begin to answer a request; raises SurgeonError for one that cannot be."""
        name, packed = await self.adapter(body.model)
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(None, self._prompts, body)
        answering = Answering(self.service, self.tokenizer, body)
        try:
            for number in range(len(prompts) * body.n):
                prompt = prompts[number // body.n]
                answering.submit(self._request(body, name, packed, prompt, number, answering))
        except SurgeonError:
            answering.cancel()
            raise
        return answering

    def _request(
        self, body: Body, name: str, packed: Packed | None, prompt: list[int], number: int, answering: Answering
    ) -> Request:
        seconds = body.timeout if body.timeout is not None else self.options.deadline
        if body.timeout is not None and body.timeout <= 0:
            raise UsageError("the deadline of the request has passed", "timeout", "give it more than 0 seconds")
        most = body.max_tokens or getattr(body, "max_completion_tokens", None) or self._room(prompt, packed)
        vocabulary = self.service.engine.vocabulary
        sampling = body.sampling(logprobs(body), number % body.n, vocabulary)
        return Request(
            name, packed, prompt, most, sampling, answering.teller(number), Detokeniser(self.tokenizer, body.stops),
            frozenset() if body.ignore_eos else self.ends, time.monotonic() + seconds if seconds else 0.0,
        )  # fmt: skip

    def _room(self, prompt: list[int], packed: Packed | None) -> int:
        """New tokens where a request names no number."""
        limit = self.service.engine.limit
        taken = len(prompt) + (packed.virtual[1] + packed.shift if packed is not None else 0)
        return max(1, min(DEFAULT_TOKENS, limit - taken)) if limit else DEFAULT_TOKENS

    def _prompts(self, body: Body) -> list[list[int]]:
        """The prompts of a request as token ids."""
        if isinstance(body, ChatBody):
            found = [self._conversation(body)]
        else:
            assert isinstance(body, CompletionBody)
            given = body.prompt
            listed: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
            found = [self.tokenizer(one)["input_ids"] if isinstance(one, str) else list(one) for one in listed]
        vocabulary, limit = self.service.engine.vocabulary, self.options.prompt
        for prompt in found:
            if not prompt:
                raise UsageError("the prompt has no token", "prompt", "give it some text")
            if not all(0 <= token < vocabulary for token in prompt):
                raise UsageError("the prompt has an unknown token id", "prompt", f"ids from 0 to {vocabulary - 1}")
            if limit and len(prompt) > limit:
                what = f"the prompt has {len(prompt)} tokens, and this server takes {limit}"
                raise Refused(400, what, "prompt", "a shorter prompt", "context_length_exceeded")
        if not found:
            raise UsageError("there is no prompt", "prompt", "give at least one")
        return found

    def _conversation(self, body: ChatBody) -> list[int]:
        template = self.options.template or getattr(self.tokenizer, "chat_template", None)
        if not template:
            hint = "POST /v1/completions takes plain text; or start the server with --chat-template"
            raise UsageError("the model has no chat template", "messages", hint)
        try:
            ids = self.tokenizer.apply_chat_template(
                body.turns(), add_generation_prompt=True, chat_template=template, return_dict=True
            )["input_ids"]
        except SurgeonError:
            raise
        except Exception as error:  # templates raise whatever jinja and their authors raise
            reason = f"the chat template refuses the conversation: {error}".splitlines()[0]
            raise UsageError(reason, "messages", "some templates know no system message") from error
        return list(ids)


def _ends(service: Service) -> frozenset[int]:
    """Tokens that end a text, as the checkpoint says."""
    from surgeon.generate import generation_config

    ends = generation_config(service.engine.base).eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())
