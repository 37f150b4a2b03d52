"""Answers in OpenAI's shapes, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from surgeon.serve.sampling import Choice


@dataclass
class Answer:
    """One of a request's answers while it is made.

    Attributes:
        index: which of them.
        text: its text.
        choices: its tokens.
        finish: why it ended.
    """

    index: int
    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    finish: str | None = None


@dataclass
class Shape:
    """How answers to one request look.

    Attributes:
        chat: whether they are turns of a conversation.
        model: what the request called the model.
        tokenizer: of the model, for the texts of tokens.
        logprobs: whether log probabilities are part of them.
    """

    chat: bool
    model: str
    tokenizer: Any
    logprobs: bool

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, answers: Sequence[Answer], usage: dict[str, int]) -> dict[str, Any]:
        """Everything at once."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [self._choice(answer) for answer in answers], "usage": usage}

    def piece(self, answer: Answer, text: str, choices: Sequence[Choice], *, first: bool = False) -> dict[str, Any]:
        """What is new of an answer."""
        logprobs = self._logprobs(choices, len(answer.text) - len(text)) if self.logprobs and choices else None
        choice: dict[str, Any] = {"index": answer.index, "logprobs": logprobs, "finish_reason": answer.finish}
        if self.chat:
            choice["delta"] = {**({"role": "assistant"} if first else {}), "content": text}
        else:
            choice["text"] = text
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [choice]}

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """The counts of tokens, when a stream ends."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, answer: Answer) -> dict[str, Any]:
        logprobs = self._logprobs(answer.choices, 0) if self.logprobs else None
        made: dict[str, Any] = {"index": answer.index, "logprobs": logprobs, "finish_reason": answer.finish}
        if self.chat:
            made["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            made["text"] = answer.text
        return made

    def _text(self, token: int) -> str:
        text: str = self.tokenizer.decode([token])
        return text

    def _logprobs(self, choices: Sequence[Choice], offset: int) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._entry(c.token, c.logprob, c.top) for c in choices], "refusal": None}
        texts = [self._text(choice.token) for choice in choices]
        offsets = [offset + sum(map(len, texts[:position])) for position in range(len(texts))]
        top = [{self._text(token): value for token, value in choice.top} for choice in choices]
        return {
            "tokens": texts,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _entry(self, token: int, value: float, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
        text = self._text(token)
        entry: dict[str, Any] = {"token": text, "logprob": value, "bytes": list(text.encode())}
        entry["top_logprobs"] = [
            {"token": (t := self._text(other)), "logprob": found, "bytes": list(t.encode())} for other, found in top
        ]
        return entry
