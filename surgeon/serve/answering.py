"""The answers to one request, from the service's events to what the client is sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from surgeon.errors import SurgeonError
from surgeon.serve.answers import Answer, Shape
from surgeon.serve.protocol import Body, ChatBody, CompletionBody
from surgeon.serve.request import Event, Request
from surgeon.serve.service import Service


class Gone(SurgeonError):
    """Nobody waits for the answer any more."""


class Answering:
    """The answers to one request, while they are made."""

    def __init__(self, service: Service, tokenizer: Any, body: Body) -> None:
        self.service, self.tokenizer, self.body = service, tokenizer, body
        self.shape = Shape(isinstance(body, ChatBody), body.model, tokenizer, logprobs(body) >= 0)
        self.requests: list[Request] = []
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def teller(self, number: int) -> Any:
        """What the service calls with news of the n-th answer."""

        def tell(event: Event) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        return tell

    def submit(self, request: Request) -> None:
        """Begin with one more answer."""
        self.service.submit(request)
        self.requests.append(request)

    def cancel(self) -> None:
        """The client has gone: stop."""
        for request in self.requests:
            self.service.cancel(request)
        self._events.put_nowait((0, Event(error=Gone("the client has gone"))))

    async def events(self) -> AsyncIterator[tuple[Answer, Event]]:
        """News of all answers until the last is complete; raises the first error."""
        answers = [Answer(number) for number in range(len(self.requests))]
        open_ = len(answers)
        try:
            while open_:
                number, event = await self._events.get()
                if event.error is not None:
                    raise event.error
                answer = answers[number]
                answer.text += event.text
                answer.choices += event.choices
                if event.finish:
                    answer.finish = event.finish
                    open_ -= 1
                yield answer, event
        finally:
            if open_:
                self.cancel()

    async def whole(self) -> dict[str, Any]:
        """All answers, complete."""
        answers: dict[int, Answer] = {}
        async for answer, _ in self.events():
            answers[answer.index] = answer
        if isinstance(self.body, CompletionBody) and self.body.echo:
            for number, request in enumerate(self.requests):
                answers[number].text = self.tokenizer.decode(request.prompt) + answers[number].text
        return self.shape.whole([answers[number] for number in sorted(answers)], self.usage())

    async def stream(self) -> AsyncIterator[str]:
        """The answers as server-sent events."""
        begun: set[int] = set()
        async for answer, event in self.events():
            if event.text or event.choices or event.finish:
                first = answer.index not in begun
                begun.add(answer.index)
                yield _sent(self.shape.piece(answer, event.text, event.choices, first=first))
        if self.body.usage_at_end:
            yield _sent(self.shape.last(self.usage()))
        yield "data: [DONE]\n\n"

    def usage(self) -> dict[str, int]:
        """Tokens in and out; a prompt that is answered n times counts once."""
        asked = sum(len(request.prompt) for request in self.requests[:: self.body.n])
        made = sum(len(request.answer) for request in self.requests)
        return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


def _sent(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n"


def logprobs(body: Body) -> int:
    """How many likely tokens to report, −1 for no report."""
    if isinstance(body, ChatBody):
        return (body.top_logprobs or 0) if body.logprobs else -1
    assert isinstance(body, CompletionBody)
    return -1 if body.logprobs is None else body.logprobs
