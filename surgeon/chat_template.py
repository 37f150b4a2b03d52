"""Chat rows through the tokenizer's own template, and which of the tokens are the assistant's."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from surgeon.data import Row
from surgeon.errors import UsageError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


def chat_tokens(row: Row, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The ids of a row's conversation, and for each whether the assistant says it.

    A template with `{% generation %}` marks tells; otherwise the conversation is rendered up to the start and up to
    the end of each assistant turn. The last turn gets an end token if the template closes it with nothing special.
    Raises UsageError if there is no template, or it refuses the conversation, or turns cannot be told apart.
    """
    template, (messages, tools) = tokenizer.chat_template, _conversation(row)
    if not template:
        hint = "use an instruction-tuned model's tokenizer, or data with `prompt` and `completion`"
        raise UsageError("the data is chat, and the tokenizer has no chat template", row.where, hint)
    if isinstance(template, str) and _GENERATION.search(template):
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        encoded = _templated(row, tokenizer, messages, tools, tokenize=True, **options)
        ids, mask = list(encoded["input_ids"]), [bool(said) for said in encoded["assistant_masks"]]
    else:
        text = _templated(row, tokenizer, messages, tools)
        ids, mask = _tokens(text, _assistant_spans(row, tokenizer, messages, tools, text), tokenizer)
    if messages[-1]["role"] == "assistant" and not _closed(ids, tokenizer):
        ids, mask = [*ids, tokenizer.eos_token_id], [*mask, True]
    return ids, mask


def _closed(ids: list[int], tokenizer: Any) -> bool:
    """Whether the last turn ends with a special token (and spaces), so that the model learns to stop."""
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    printed = (i for i in reversed(ids) if i in special or tokenizer.decode([i]).strip())
    return tokenizer.eos_token_id is None or next(printed, None) in special


def _conversation(row: Row) -> tuple[list[dict[str, Any]], Any]:
    """The messages, each checked, and the tools of a chat row."""
    messages, tools = row.values["messages"], row.values.get("tools")
    if not isinstance(messages, list) or not messages:
        raise UsageError("`messages` is not a list with messages", row.where, "give `role` and `content` in each")
    for number, message in enumerate(messages, 1):
        known = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not known or (message.get("content") is None and not message.get("tool_calls")):
            what = f"message {number} has no `role`, or neither `content` nor `tool_calls`"
            raise UsageError(what, row.where, 'write messages as {"role": "user", "content": "…"}')
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise UsageError(f"`tools` is not JSON: {error}", row.where, "give a list of tools") from error
    return [{key: value for key, value in message.items() if value is not None} for message in messages], tools


def _templated(row: Row, tokenizer: Any, messages: list[dict[str, Any]], tools: Any, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, **{"tokenize": False, **options})
    except Exception as error:  # a template raises what it likes: jinja2 errors, TypeError on odd content, …
        hint = "check the roles and their order, or the template itself"
        raise UsageError(f"the chat template refuses this conversation: {error}", row.where, hint) from error


def _assistant_spans(row: Row, tokenizer: Any, messages: list[dict[str, Any]], tools: Any, text: str) -> list[Span]:
    """The character ranges of the assistant's turns, from the text rendered up to each turn's start and end."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        options = {"add_generation_prompt": True}
        before = _templated(row, tokenizer, messages[:number], tools, **options) if number else ""
        after = _templated(row, tokenizer, messages[: number + 1], tools)
        end = _turn_end(text, len(before), after, message.get("content"))
        if not text.startswith(before) or end is None:
            what = f"the chat template renders message {number + 1} differently inside the whole conversation"
            hint = "use a template with {% generation %} marks, or split the conversation"
            raise UsageError(what, row.where, hint)
        spans.append((len(before), end))
    return spans


def _turn_end(text: str, start: int, after: str, content: Any) -> int | None:
    """Where in `text` the turn ends that ends `after`; templates that drop old reasoning change what stands before."""
    if text.startswith(after):
        return len(after)
    said = content.strip() if isinstance(content, str) else ""
    ending = after[after.rfind(said) :] if said in after else ""
    at = text.find(ending, start) if said and ending else -1
    return None if at < 0 else at + len(ending)


def _tokens(text: str, spans: list[Span], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The ids of a rendered conversation (it holds its special tokens) and which of them start inside a span."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), [any(a <= start < b for a, b in spans) for start in starts]
    edges = [0, *itertools.chain.from_iterable(spans), len(text)]
    ids: list[int] = []
    mask: list[bool] = []
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        piece = tokenizer(text[a:b], add_special_tokens=False)["input_ids"] if b > a else []
        ids += piece
        mask += [number % 2 == 1] * len(piece)
    return ids, mask
