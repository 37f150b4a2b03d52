"""What requests may say, as OpenAI's and vLLM's clients say it, and errors in their shape."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.serve.registry import UnknownAdapter
from surgeon.serve.request import Busy, Late
from surgeon.serve.sampling import Sampling


class Body(BaseModel):
    """Fields that all requests for text have; unknown ones are an error, so that nothing asked for is left out."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    timeout: float | None = None
    ignore_eos: bool = False

    @field_validator("stop")
    @classmethod
    def _few(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > 16:
            raise ValueError("at most 16 stop strings")
        return stop

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, logprobs: int, number: int, vocabulary: int) -> Sampling:
        """How tokens are chosen, for the n-th answer to this request.

        Raises:
            UsageError: `logit_bias` names no token.
        """
        bias = {}
        for key, value in (self.logit_bias or {}).items():
            if not key.isdecimal() or int(key) >= vocabulary:
                raise UsageError(f"logit_bias names {key!r}", "logit_bias", f"token ids from 0 to {vocabulary - 1}")
            bias[int(key)] = value
        seed = None if self.seed is None else (self.seed + number) % 2**63
        return Sampling(
            self.temperature, self.top_p, max(0, self.top_k), seed, self.presence_penalty, self.frequency_penalty,
            bias, logprobs,
        )  # fmt: skip


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    suffix: None = None
    best_of: Literal[1] | None = None


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = None

    @field_validator("response_format")
    @classmethod
    def _text(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is not None and given.get("type", "text") != "text":
            raise ValueError("only {'type': 'text'} is supported")
        return given

    def turns(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it.

        Raises:
            UsageError: a part of a message is no text.
        """
        found = []
        for message in self.messages:
            content = message.content
            if isinstance(content, list):
                odd = [part.get("type") for part in content if part.get("type") != "text"]
                if odd:
                    raise UsageError(f"a message has a part of type {odd[0]!r}", "messages", "this model reads text")
                content = "".join(str(part.get("text", "")) for part in content)
            found.append({**message.model_dump(exclude={"content"}), "content": content or ""})
        return found


class LoadBody(BaseModel):
    """POST /v1/load_lora_adapter, as vLLM has it; `rank` is of adapters that have every rank."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_path: str
    lora_int_id: int | None = None
    load_inplace: bool = False
    rank: int | None = Field(None, ge=1)


class UnloadBody(BaseModel):
    """POST /v1/unload_lora_adapter; `force` lets what runs with it finish."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_int_id: int | None = None
    force: bool = False


class Refused(SurgeonError):
    """An error with its HTTP status."""

    def __init__(self, status: int, what: str, where: str = "", hint: str = "", code: str = "") -> None:
        super().__init__(what, where, hint)
        self.status, self.code = status, code


_STATUS: tuple[tuple[type[Exception], int, str, str], ...] = (
    (UnknownAdapter, 404, "model_not_found", "invalid_request_error"),
    (Busy, 429, "queue_full", "rate_limit_error"),
    (Late, 504, "deadline_exceeded", "timeout_error"),
    (UnsupportedError, 400, "not_supported", "invalid_request_error"),
    (UsageError, 400, "invalid_value", "invalid_request_error"),
)


def failure(error: Exception) -> tuple[int, dict[str, Any]]:
    """The HTTP status of an error, and OpenAI's shape of it: what went wrong, where, and what to do."""
    if isinstance(error, Refused):
        kind = "authentication_error" if error.status == 401 else "invalid_request_error"
        status, code = error.status, error.code
    else:
        found = next((row[1:] for row in _STATUS if isinstance(error, row[0])), (500, "internal_error", "server_error"))
        status, code, kind = found
    if isinstance(error, SurgeonError):
        message = error.what + (f" ({error.where})" if error.where else "") + (f"; {error.hint}" if error.hint else "")
        where: str | None = error.where or None
    else:
        message, where = f"{type(error).__name__}: {error}".splitlines()[0], None
    return status, {"error": {"message": message, "type": kind, "param": where, "code": code}}
