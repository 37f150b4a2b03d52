"""An encoder-decoder in ONNX Runtime: the encoder run once for its texts, the decoder for every token.

The decoder is one graph. With an empty cache it computes the keys and values of the encoder's states, returns them with
those of its own tokens, and computes none of them again when they come back. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.lower.onnx.adapter_file import Loaded
from surgeon.lower.onnx.session import Array, empty_cache, follow, open_session, padded

ENCODER, DECODER = "encoder_model", "decoder_model_merged"
"""The files' names, those of optimum and transformers.js."""


@dataclass(frozen=True)
class Pair:
    """Both sessions, the token that pads, and an adapter for the models' slots."""

    encoder: Any
    decoder: Any
    pad: int
    given: Loaded | None = None

    @classmethod
    def open(cls, encoder: Path, decoder: Path, pad: int) -> Pair:
        """Raise UnsupportedError if ONNX Runtime has no kernel for a part of them."""
        return cls(open_session(encoder), open_session(decoder), pad)

    def encode(self, rows: list[list[int]]) -> dict[str, Array]:
        """What the decoder is given with its first tokens: the states of texts padded on the right, an empty cache."""
        given = padded(rows, self.pad)
        (states,) = self.encoder.run(["last_hidden_state"], self._fed(self.encoder, given, len(rows)))
        fed = {"encoder_hidden_states": states, "encoder_attention_mask": given["attention_mask"]}
        return {**fed, **empty_cache(self.decoder, len(rows))}

    def step(self, ids: Array, given: Mapping[str, Array], keep: int = 0) -> tuple[Array, dict[str, Array]]:
        """Logits of new tokens and what goes with the next ones.

        Args:
            ids: new tokens `[b, t]`.
            given: of `encode` or of the step before.
            keep: of how many last tokens; 0 for all, where the decoder can choose.

        Returns:
            The logits `[b, t, vocab]` in fp32, and `given` with the tokens' keys and values.
        """
        outputs = [node.name for node in self.decoder.get_outputs()]
        feed = {**given, "input_ids": ids, "num_logits_to_keep": np.array(keep, np.int64)}
        fed = self._fed(self.decoder, feed, len(ids))
        results = dict(zip(outputs, self.decoder.run(outputs, fed), strict=True))
        logits = results.pop("logits").astype(np.float32)
        past = {name.replace("present", "past_key_values"): value for name, value in results.items()}
        return logits, {**given, **past}

    def _fed(self, session: Any, values: Mapping[str, Array], batch: int) -> dict[str, Array]:
        """What a session is given: its inputs, and the adapter's; slots that nobody gives have the base's values."""
        own = self.given.feed(batch, session) if self.given else {}
        names = [node.name for node in session.get_inputs() if node.name not in own]
        return {name: values[name] for name in names} | own

    def decode(self, rows: list[list[int]], first: list[int], steps: int) -> tuple[Array, Array]:
        """Greedy decoding.

        Args:
            rows: the encoder's texts.
            first: the tokens that every row of the decoder begins with.
            steps: tokens to generate.

        Returns:
            The decoder's ids `[b, len(first) + steps]`, and the logits of all but the last.
        """
        given, ids = self.encode(rows), np.array([first] * len(rows), np.int64)
        new, logits = ids, []
        for _ in range(steps):
            found, given = self.step(new, given)
            new = found[:, -1:].argmax(-1)
            logits.append(found)
            ids = np.concatenate([ids, new], 1)
        return ids, np.concatenate(logits, 1)


def open_record(folder: Path, record: Mapping[str, Any]) -> Pair:
    """The sessions of an export, as its manifest names them."""
    return Pair.open(folder / record["encoder"], folder / record["model"], int(record["pad"]))


def forced(pair: Pair, batch: Mapping[str, Any], first: list[int], bound: float) -> tuple[float, float]:
    """Error and agreement of one batch of an export's record, see `surgeon.lower.onnx.session.follow`."""
    given = pair.encode(batch["prompts"])

    def step(ids: Array) -> Array:
        nonlocal given
        logits, given = pair.step(ids, given, keep=1)
        last: Array = logits[:, -1]
        return last

    return follow(batch, bound, np.array([first] * len(batch["prompts"]), np.int64), step)
