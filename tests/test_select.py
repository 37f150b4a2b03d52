from __future__ import annotations

import fnmatch
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgeon.errors import UsageError
from surgeon.select import check_words, matches, words

PATHS = [
    *(f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"model.layers.{i}.mlp.{name}" for i in range(3) for name in ("gate_proj", "up_proj", "down_proj")),
    "lm_head",
]
NAMES = st.text("abcdefgh_0123456789", min_size=1, max_size=6)


def chosen(pattern: str) -> list[str]:
    return [path for path in PATHS if matches(pattern, path)]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("*.{q,v}_proj", 6),
        ("*.{q,k,v,o}_proj", 12),
        ("model.layers.[0-1].*", 14),
        ("model.layers.{0,2}.self_attn.q_proj", 2),
        ("q_proj", 3),
        ("self_attn.q_proj", 3),
        ("proj", 0),
        ("q_proj v_proj", 6),
        ("q_proj, v_proj", 6),
        ("q_proj,,v_proj,", 6),
        ("*", 22),
        ("re:.*\\.(q|v)_proj", 6),
        ("re:model\\.layers\\.\\d+\\.mlp\\..*", 9),
        ("re:q_proj", 0),
        ("lm_head", 1),
        ("head", 0),
        ("", 0),
        ("{*.q_proj,lm_head}", 4),
        ("*.{self_attn.{q,k},mlp.up}_proj", 9),
    ],
)
def test_patterns(pattern: str, count: int) -> None:
    assert len(chosen(pattern)) == count


def test_a_word_without_wildcards_is_a_whole_name_anywhere() -> None:
    assert not matches("proj", "layers.0.q_proj")
    assert matches("q_proj", "q_proj")
    assert matches("0.q_proj", "layers.0.q_proj")
    assert not matches("0.q_proj", "layers.10.q_proj")
    assert not matches("a.b", "axb")


@given(st.lists(NAMES, min_size=1, max_size=4))
def test_braces_are_the_union_of_their_words(names: list[str]) -> None:
    braces = "*.{" + ",".join(names) + "}_proj"
    assert words(braces) == [f"*.{name}_proj" for name in names]
    for path in (f"layers.0.{name}_proj" for name in [*names, "zz"]):
        assert matches(braces, path) == any(matches(word, path) for word in words(braces))


@given(st.lists(NAMES, min_size=1, max_size=5).map(".".join))
def test_a_path_matches_itself_its_leaf_and_its_suffixes(path: str) -> None:
    parts = path.split(".")
    assert all(matches(".".join(parts[i:]), path) for i in range(len(parts)))
    assert matches("re:" + re.escape(path), path)
    assert not matches(path + "x", path)


@given(
    st.text("ab.*?", min_size=1, max_size=8).filter(lambda text: "*" in text or "?" in text), st.text("ab.", max_size=8)
)
def test_wildcards_are_those_of_the_shell(pattern: str, path: str) -> None:
    assert matches(pattern, path) == fnmatch.fnmatchcase(path, pattern)


@given(st.text(max_size=12), NAMES)
def test_any_text_is_a_pattern_or_a_usage_error(pattern: str, path: str) -> None:
    message = "is not a pattern"
    try:
        assert matches(pattern, path) in (True, False)
    except UsageError as error:
        message = error.what
    assert "is not a pattern" in message


@pytest.mark.parametrize(
    ("word", "suggested"),
    [
        ("*.qproj", "q_proj"),
        ("*.q_porj", "q_proj"),
        ("model.layers.0.self_attn.q_prj", "q_proj"),
        ("down_project", "down_proj"),
        ("re:.*gate_prj", "gate_proj"),
        ("lm_haed", "lm_head"),
    ],
)
def test_a_dead_word_suggests_the_nearest_real_path(word: str, suggested: str) -> None:
    with pytest.raises(UsageError, match="no module matches") as caught:
        check_words(word, PATHS)
    assert word in caught.value.what
    hint = caught.value.hint
    assert any(f"'{path}'" in hint for path in PATHS)
    assert f"{suggested}'" in hint


def test_every_word_must_match() -> None:
    check_words("q_proj *.{k,v}_proj all-linear", PATHS)
    with pytest.raises(UsageError, match=r"\*\.z_proj"):
        check_words("*.{q,z}_proj", PATHS)


def test_nothing_to_match_is_said_so() -> None:
    with pytest.raises(UsageError) as caught:
        check_words("q_proj", [])
    assert "no module this method fits" in caught.value.hint


def test_a_broken_expression_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="is not a pattern"):
        matches("re:(", "a")
