"""An export replayed later and elsewhere: against its own record, with ONNX Runtime and NumPy alone.

First the files: present, of their size, of their sha256. Then the probes: each token that was generated when the model
was exported is fed again, and its logit must be the one that was written down, and no other token's may be larger.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.errors import CheckFailed, UnsupportedError, UsageError
from surgeon.lower.onnx import pair
from surgeon.lower.onnx.adapter_file import Loaded, as_loaded, load
from surgeon.lower.onnx.files import AGAIN, MANIFEST, MODEL, check_files
from surgeon.lower.onnx.session import (
    Array,
    empty_cache,
    follow,
    left_padded,
    machine,
    numbered,
    open_session,
    padded,
)

SCHEMA = 1
Run = Callable[[Mapping[str, Any], float, Loaded | None], tuple[float, float]]
"""Error and agreement of one batch of a record, by its bound, with an adapter."""


@dataclass(frozen=True)
class Verified:
    """What a replay found.

    Attributes:
        max_error: largest |Δlogit| against what was written down, at the tokens that were.
        bound: what it may be: that of the export against torch.
        token_agreement: share of tokens that are still the best, ties within the bound counted.
        probes: rows replayed.
        files: files checked.
        versions: of what was run here.
        seconds: time taken.
    """

    max_error: float
    bound: float
    token_agreement: float
    probes: int
    files: int
    versions: Mapping[str, str]
    seconds: float

    def require(self, where: str) -> None:
        """Raise CheckFailed if anything differs."""
        if not self.max_error <= self.bound or self.token_agreement < 1:
            what = f"the export computes something else than when it was made: |Δlogit| {self.max_error:.3g}, "
            what += f"may be {self.bound:.3g}; {self.token_agreement:.1%} of the tokens agree"
            raise CheckFailed(what, where, "another version of ONNX Runtime, or export it again")


def is_export(folder: Path) -> bool:
    """Whether a folder is an ONNX export."""
    return (folder / MANIFEST).is_file()


def read_record(folder: Path) -> dict[str, Any]:
    """What an export wrote down about itself.

    Raises:
        UsageError: there is no such file, or it is damaged.
        UnsupportedError: it was written by a newer surgeon.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"the folder has no {MANIFEST}", str(folder), "surgeon export work/ --target onnx makes one")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema, _ = int(found["schema"]), found["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{MANIFEST} is damaged: {type(error).__name__} {error}", str(path), AGAIN) from error
    if schema > SCHEMA:
        what = f"the export has schema {schema}, this surgeon reads up to {SCHEMA}"
        raise UnsupportedError(what, str(path), "update surgeon: pip install -U model-surgeon")
    return found


def verify(folder: Path) -> Verified:
    """Check the files of an export and replay its probes.

    Raises:
        UsageError: a file is missing, cut short or changed, or the export was written without probes.
        UnsupportedError: this ONNX Runtime cannot load it.
    """
    began = time.perf_counter()
    record = read_record(folder)
    _check_machine(record, folder)
    check_files(folder, record["files"])
    verified = record.get("verified")
    if not verified:
        hint = "export it without --no-verify; its files are those that were written"
        raise UsageError("the export was written unverified: there are no probes", str(folder / MANIFEST), hint)
    bound = float(verified["bound"])
    results = _replayed(folder, record)
    replayed = [verified, *(adapter["verified"] or {"batches": ()} for adapter in record.get("adapters", ()))]
    errors, agreements = ([result[place] for result in results] for place in (0, 1))
    return Verified(
        float(np.max(errors)), bound, float(np.mean(agreements)),
        sum(len(batch["prompts"]) for one in replayed for batch in one["batches"]), len(record["files"]),
        {"onnxruntime": machine()["onnxruntime"], "numpy": np.__version__},
        time.perf_counter() - began,
    )  # fmt: skip


def _replayed(folder: Path, record: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Error and agreement of every batch."""
    verified = record["verified"]
    batches, bound = verified["batches"], float(verified["bound"])
    if "encoder" in record:
        run = _two(folder, record)
    else:
        run = _one(folder, record) if verified["steps"] else _whole(folder, record)
    slots = as_loaded({}, record) if "slots" in record else None
    results = [run(batch, bound, slots) for batch in batches]
    for adapter in record.get("adapters", ()):
        results += _adapted(run, folder, adapter, record)
    return results


def _one(folder: Path, record: Mapping[str, Any]) -> Run:
    session = open_session(folder / record.get("model", MODEL))
    return lambda batch, bound, given: _forced(session, batch, bound, given)


def _whole(folder: Path, record: Mapping[str, Any]) -> Run:
    session, pad = open_session(folder / record.get("model", MODEL)), int(record.get("pad", 0))
    return lambda batch, bound, given: _once(session, batch, pad, given)


def _two(folder: Path, record: Mapping[str, Any]) -> Run:
    both, first = pair.open_record(folder, record), record["first"]
    return lambda batch, bound, given: pair.forced(replace(both, given=given), batch, first, bound)


def _check_machine(record: Mapping[str, Any], folder: Path) -> None:
    made, here = record.get("prepacked"), machine()
    if made and made != here:
        said = (f"onnxruntime {where['onnxruntime']} on {where['processor']}" for where in (made, here))
        what = "the export was prepacked for {}, this is {}".format(*said)
        raise UnsupportedError(what, str(folder), "prepack the export again, here: surgeon prepack")


def _adapted(
    run: Run, folder: Path, adapter: Mapping[str, Any], record: Mapping[str, Any]
) -> list[tuple[float, float]]:
    """Error and agreement of the batches of one of the export's adapters, the error as if its bound were the base's."""
    verified, fed = adapter["verified"], load(folder / adapter["file"], folder)
    if verified is None:
        return []
    given = replace(fed, ids=(1,)) if fed.ids else fed
    own, bound = float(verified["bound"]), float(record["verified"]["bound"])
    found = [run(batch, own, given) for batch in verified["batches"]]
    return [(error * bound / own, agreement) for error, agreement in found]


def _forced(session: Any, batch: Mapping[str, Any], bound: float, given: Loaded | None) -> tuple[float, float]:
    """Error and agreement of one batch, see `surgeon.lower.onnx.session.follow`."""
    ids, mask = left_padded(batch["prompts"])
    past = {**empty_cache(session, len(ids)), **(given.past(len(ids)) if given else {})}
    if given and given.length and len(ids) > 1:  # GroupQueryAttention goes on with several rows by one token each
        for end in range(1, ids.shape[1]):
            past = step_logits(session, ids[:, end - 1 : end], mask[:, :end], past, given)[1]
        ids = ids[:, -1:]

    def step(new: Array) -> Array:
        nonlocal mask, past
        logits, past = step_logits(session, new, mask, past, given)
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)  # with the token that is fed next
        return logits

    return follow(batch, bound, ids, step)


def step_logits(
    session: Any, ids: Array, mask: Array, past: Mapping[str, Array], given: Loaded | None = None
) -> tuple[Array, dict[str, Array]]:
    """The last token's logits `[b, vocab]` in fp32, and the cache with what was fed.

    Args:
        session: of an export.
        ids: new tokens `[b, t]`.
        mask: of all tokens, `[b, past + t]`.
        past: keys and values of what was before.
        given: an adapter for the model's slots.
    """
    own, start = (given.feed(len(ids)), given.length) if given else ({}, 0)
    outputs = [node.name for node in session.get_outputs()]
    feed: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": np.pad(mask, ((0, 0), (start, 0)), constant_values=1),
        "position_ids": numbered(mask)[:, -ids.shape[1] :] + start,
        "token_type_ids": np.zeros_like(ids),
        "num_logits_to_keep": np.array(1, np.int64),
        **past,
    }
    fed = {node.name: feed[node.name] for node in session.get_inputs() if node.name not in own}
    results = dict(zip(outputs, session.run(outputs, {**fed, **own}), strict=True))
    kept = {f"past_key_values.{k.removeprefix('present.')}": v for k, v in results.items() if k.startswith("present.")}
    return results["logits"][:, -1].astype(np.float32), kept


def _once(session: Any, batch: Mapping[str, Any], pad: int, given: Loaded | None) -> tuple[float, float]:
    """Error and agreement of one batch of a model that is run once; see `surgeon.lower.onnx.once`."""
    text = padded(batch["prompts"], pad, choices=len(session.get_inputs()[0].shape) == 3)
    outputs = [node.name for node in session.get_outputs()]
    made = session.run(outputs, fed_once(session, text, given.feed() if given else {}))
    found = [value.astype(np.float32).max(-1).ravel() for value in told(outputs, made)]
    errors = [np.abs(f - np.array(w)).max() for f, w in zip(found, batch["best_logits"], strict=True)]
    return float(np.max(errors)), 1.0


def fed_once(session: Any, text: Mapping[str, Array], slots: Mapping[str, Array]) -> dict[str, Array]:
    """What a model that is run once takes of a text, and an adapter's slots."""
    return {node.name: text[node.name] for node in session.get_inputs() if node.name not in slots} | {**slots}


def told(outputs: list[str], values: list[Array]) -> list[Array]:
    """Those outputs of a model that its record tells of: scores, or else the first."""
    scores = [value for name, value in zip(outputs, values, strict=True) if name.endswith("logits")]
    return scores or values[:1]
