"""From tokens to text as they come: whole characters, and nothing that a stop string may still swallow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"


class Detokeniser:
    """The text of one answer.

    Attributes:
        text: what was made so far, cut off at a stop string.
        stopped: the stop string that ended it, "" for none.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, special: bool = False) -> None:
        """Start.

        Args:
            tokenizer: of the model.
            stop: texts to stop before.
            special: whether special tokens are part of the text.
        """
        self.tokenizer, self.stop, self.special = tokenizer, tuple(filter(None, stop)), special
        self.text, self.stopped = "", ""
        self._tokens: list[int] = []
        self._start = self._read = self._given = 0

    def add(self, token: int) -> str:
        """One more token; returns the text that is new and settled."""
        self._tokens.append(token)
        before = self._decoded(self._start, self._read)
        now = self._decoded(self._start, len(self._tokens))
        if len(now) > len(before) and not now.endswith(_BROKEN):
            self._append(now[len(before) :])
            self._start, self._read = self._read, len(self._tokens)
        return self._take(final=False)

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        rest = self._decoded(self._start, len(self._tokens))[len(self._decoded(self._start, self._read)) :]
        if rest and not self.stopped:
            self._append(rest)
        return self._take(final=True)

    def _decoded(self, start: int, stop: int) -> str:
        text: str = self.tokenizer.decode(self._tokens[start:stop], skip_special_tokens=not self.special)
        return text

    def _append(self, piece: str) -> None:
        begin = max(0, len(self.text) - max(map(len, self.stop), default=0))
        self.text += piece
        places = [(place, word) for word in self.stop if (place := self.text.find(word, begin)) >= 0]
        if places:
            place, self.stopped = min(places)
            self.text = self.text[:place]

    def _take(self, final: bool) -> str:
        """What may be shown: all of it, but for an end that could be the beginning of a stop string."""
        end = len(self.text)
        if not final and not self.stopped:
            end -= max(
                (n for word in self.stop for n in range(1, len(word)) if self.text.endswith(word[:n])), default=0
            )
        piece = self.text[self._given : max(end, self._given)]
        self._given = max(end, self._given)
        return piece
