"""What a client asked for, from the queue to the last token."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from surgeon.errors import SurgeonError
from surgeon.serve.detokenise import Detokeniser
from surgeon.serve.packed import Packed
from surgeon.serve.sampling import Choice, Sampler, Sampling
from surgeon.serve.sequence import Sequence

_numbers = itertools.count()
STOP, LENGTH = "stop", "length"


class Late(SurgeonError):
    """A request's deadline has passed."""


class Busy(SurgeonError):
    """The queue is full."""


@dataclass(frozen=True)
class Event:
    """News of a request.

    Attributes:
        text: new text.
        choices: new tokens, with their log probabilities where asked for.
        finish: why it ended, "" while it goes on.
        error: why it failed.
    """

    text: str = ""
    choices: tuple[Choice, ...] = ()
    finish: str = ""
    error: Exception | None = None


@dataclass(eq=False)
class Request:
    """One answer to be made; no two are equal, whatever they ask for.

    Attributes:
        adapter: its adapter's name, "" for the bare base.
        packed: that adapter.
        prompt: token ids.
        most: new tokens it may have.
        sampling: how they are chosen.
        tell: called with every event, from the server's own thread.
        detokeniser: makes text of tokens; None for tokens alone.
        ends: tokens that end an answer.
        deadline: when it must be done, by `time.monotonic`; 0 for never.
        arrived: when it came.
    """

    adapter: str
    packed: Packed | None
    prompt: list[int]
    most: int
    sampling: Sampling
    tell: Callable[[Event], None]
    detokeniser: Detokeniser | None = None
    ends: frozenset[int] = frozenset()
    deadline: float = 0.0
    arrived: float = field(default_factory=time.monotonic)
    number: int = field(default_factory=lambda: next(_numbers))
    began: float = 0.0
    first: float = 0.0
    cancelled: bool = False
    answer: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sequence = Sequence.of(f"request {self.number}", self.packed, self.prompt, self.most)
        self.sampler = Sampler(self.sampling)

    def late(self, now: float) -> bool:
        """Whether its deadline has passed."""
        return bool(self.deadline) and now >= self.deadline

    def accept(self, choice: Choice) -> Event:
        """One more token: what the client hears of it."""
        ended = choice.token in self.ends
        piece = ""
        if not ended:
            self.answer.append(choice.token)
            self.sequence.tokens.append(choice.token)
            piece = self.detokeniser.add(choice.token) if self.detokeniser is not None else ""
        stopped = ended or bool(self.detokeniser is not None and self.detokeniser.stopped)
        finish = STOP if stopped else LENGTH if len(self.answer) >= self.most else ""
        if finish and self.detokeniser is not None:
            piece += self.detokeniser.finish()
        return Event(piece, () if ended else (choice,), finish)

    def usage(self) -> dict[str, Any]:
        """Counts of tokens, as OpenAI reports them."""
        made, asked = len(self.answer), len(self.prompt)
        return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
