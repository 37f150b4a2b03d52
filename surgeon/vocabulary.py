"""Words of a model's vocabulary, by text or by index."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from surgeon.errors import UsageError, nearest


def token_ids(words: str, size: int, source: str, flag: str = "--tokens") -> tuple[int, ...]:
    """The indices that a list of words stands for, in its order.

    Args:
        words: separated by commas; numbers are indices, anything else is the text of one token.
        size: rows of the table.
        source: folder of the model, whose tokenizer knows the texts.
        flag: that they were given with.

    Raises:
        UsageError: nothing is named, a word is no token, an index is outside the table, or one is named twice.
    """
    given = [word for word in words.split(",") if word.strip()]
    if not given:
        raise UsageError("no token is named", flag, "texts of tokens, or their indices: '<|im_start|>,<|im_end|>'")
    known = None if all(_is_index(word) for word in given) else _tokenizer(source, flag)
    found = tuple(int(word) if _is_index(word) else _index(known, word, flag) for word in given)
    for index in found:
        if not 0 <= index < size:
            raise UsageError(f"the table has no row {index}", flag, f"an index from 0 to {size - 1}")
    twice = next((index for index in found if found.count(index) > 1), None)
    if twice is not None:
        raise UsageError(f"token {twice} is named twice", flag, "name each token once")
    return found


def _is_index(word: str) -> bool:
    return word.strip().lstrip("-").isdigit()


def _tokenizer(source: str, flag: str) -> Any:
    from surgeon import api

    tokenizer = api.tokenizer_of(source)
    if tokenizer is None:
        raise UsageError("the model has no tokenizer to look the tokens up in", source or flag, "give their indices")
    return tokenizer


def _index(tokenizer: Any, word: str, flag: str) -> int:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    for text in dict.fromkeys((word, word.strip())):
        if text in vocabulary:
            return vocabulary[text]
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return int(ids[0])
    raise UsageError(f"'{word}' is not one token of the vocabulary", flag, _hint(tokenizer, vocabulary, word))


def _hint(tokenizer: Any, vocabulary: Iterable[str], word: str) -> str:
    pieces = tokenizer.tokenize(word)
    if 1 < len(pieces) < 6:
        return f"its tokens: {','.join(pieces)}; a new one needs a row of its own in the base"
    return f"nearest: {nearest(word.strip(), vocabulary)}"
