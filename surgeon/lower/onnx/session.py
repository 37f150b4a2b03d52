"""Running an exported model in ONNX Runtime: sessions, and greedy decoding through the K/V cache.

Nothing here needs torch: an export can be replayed where only ONNX Runtime and NumPy are installed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgeon.errors import UnsupportedError
from surgeon.lower.onnx.adapter_file import Loaded

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]


def open_session(file: Path) -> onnxruntime.InferenceSession:
    """A CPU session that says nothing about what it optimises, on as many threads as OMP_NUM_THREADS says.

    Raises:
        UnsupportedError: ONNX Runtime has no kernel for a part of the model.
    """
    import onnxruntime  # an export that is not replayed does without its memory

    try:
        return onnxruntime.InferenceSession(str(file), options_of(), providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding's own classes, one per status code
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedError(f"ONNX Runtime: {reason}", file.name, "--target hf writes a checkpoint") from error


def machine() -> dict[str, str]:
    """The runtime and the processor, which prepacked weights hold for."""
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__, "processor": platform.machine()}


def options_of() -> onnxruntime.SessionOptions:
    """What every session is opened with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    return options


def left_padded(prompts: list[list[int]]) -> tuple[Array, Array]:
    """Token ids and mask `[b, t]` of prompts of different lengths."""
    length = max(len(prompt) for prompt in prompts)
    ids = np.array([[0] * (length - len(prompt)) + prompt for prompt in prompts], np.int64)
    mask = np.array([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int64)
    return ids, mask


def padded(rows: list[list[int]], pad: int, *, choices: bool = False) -> dict[str, Array]:
    """Ids, mask and types `[b, t]`, padded on the right; of multiple choice two choices, itself and itself reversed."""
    length = max(len(row) for row in rows)
    ids = np.array([row + [pad] * (length - len(row)) for row in rows], np.int64)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int64)
    if choices:
        turned = np.array([row[::-1] + [pad] * (length - len(row)) for row in rows], np.int64)
        ids, mask = np.stack([ids, turned], 1), np.stack([mask, mask], 1)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def follow(batch: Mapping[str, Any], bound: float, ids: Array, step: Callable[[Array], Array]) -> tuple[float, float]:
    """Error and agreement of one batch of an export's record, fed with the tokens that were generated.

    Args:
        batch: its tokens `[b, t]`, and the best logit of each.
        bound: logits that differ by less than twice this are a tie.
        ids: what is fed first `[b, ..]`.
        step: logits `[b, vocab]` after new tokens.
    """
    tokens, wanted = np.array(batch["tokens"], np.int64), np.array(batch["best_logits"])
    rows, errors, agrees = np.arange(len(tokens)), [], []
    for place in range(tokens.shape[1]):
        logits = step(ids)
        found = logits[rows, tokens[:, place]]
        errors.append(np.abs(found - wanted[:, place]).max())
        agrees.append(logits.max(-1) - found <= 2 * bound)
        ids = tokens[:, place : place + 1]
    return float(np.max(errors)), float(np.mean(agrees))


def numbered(mask: Array) -> Array:
    """Positions `[b, t]` that count the tokens from 0; padding is at 0."""
    found: Array = np.maximum(mask.cumsum(-1) - 1, 0)
    return found


def decode(
    session: Any, ids: Array, mask: Array, steps: int, given: Loaded | None = None
) -> tuple[Array, Array, Array]:
    """Greedy decoding through the model's K/V cache.

    Args:
        session: an ONNX Runtime session with the inputs and outputs of an export.
        ids: the prompts `[b, t]`, padded on the left.
        mask: 1 at tokens, 0 at padding.
        steps: tokens to generate.
        given: an adapter for the model's slots.

    Returns:
        The ids and the mask with what was generated `[b, t + steps]`, and the logits `[b, t + steps - 1, vocab]` in
        fp32.
    """
    names = [node.name for node in session.get_inputs()]
    outputs = [node.name for node in session.get_outputs()]
    own = given.feed(len(ids)) if given else {}
    start = given.length if given else 0
    past = {**empty_cache(session, len(ids)), **(given.past(len(ids)) if given else {})}
    # GroupQueryAttention takes several rows either from the first token on or one token at a time.
    prompt = [1] * ids.shape[1] if start and len(ids) > 1 else [ids.shape[1]]
    logits, end = [], 0
    for width in [*prompt, *[1] * (steps - 1)]:
        end += width
        seen = mask[:, :end]
        feed = {
            "input_ids": ids[:, end - width : end],
            "attention_mask": np.pad(seen, ((0, 0), (start, 0)), constant_values=1),
            "position_ids": numbered(seen)[:, -width:] + start,
            "token_type_ids": np.zeros_like(ids[:, end - width : end]),
            "num_logits_to_keep": np.array(0, np.int64),
            **past,
        }
        fed = {name: feed[name] for name in names if name not in own}
        results = dict(zip(outputs, session.run(None, {**fed, **own}), strict=True))
        past = {f"past_key_values.{k.removeprefix('present.')}": v for k, v in results.items() if k != "logits"}
        logits.append(results["logits"].astype(np.float32))
        if end == ids.shape[1]:
            ids = np.concatenate([ids, logits[-1][:, -1:].argmax(-1)], 1)
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    return ids, mask, np.concatenate(logits, 1)


def empty_cache(session: Any, batch: int) -> dict[str, Array]:
    """Keys and values of no token."""
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return {
        node.name: np.zeros((batch, node.shape[1], 0, node.shape[3]), kinds[node.type])
        for node in session.get_inputs()
        if node.name.startswith("past_key_values.")
    }
