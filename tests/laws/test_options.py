"""Laws of the options of every registered pass: strings, manifests and dataclasses say the same."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from surgeon.errors import UsageError
from surgeon.passes import PASSES, find, make, parse
from surgeon.passes.base import Adapter, Pass

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    ["", "none", "sites", "all", "both", "step", "prefill", "all-linear", "*.{q,v}_proj", "it's", 'a "b"', "re:.*\\d"]
)
NUMBERS = st.floats(0, 1e6, allow_nan=False)
PAIRS = {"int": st.integers(1, 512), "float": NUMBERS}


def _values(field: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    default = field.default
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(1, 512)
    if isinstance(default, float):
        return st.floats(0, 0.99) | NUMBERS
    if isinstance(default, tuple):
        second = next((s for word, s in PAIRS.items() if word in str(field.type)), WORDS)
        return st.lists(st.tuples(WORDS, second), max_size=3).map(tuple)
    return WORDS


@st.composite
def passes(draw: st.DrawFn, name: str) -> Pass:
    fields = draw(st.lists(st.sampled_from(dataclasses.fields(find(name))), unique=True, max_size=5))
    options = {field.name: draw(_values(field)) for field in fields}
    try:
        return make(name, **options)
    except UsageError:
        assume(False)
        raise


@pytest.mark.parametrize("name", PASSES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(data=st.data())
def test_every_form_of_the_options_gives_the_pass_back(name: str, data: st.DataObject) -> None:
    step = data.draw(passes(name))
    manifest = json.loads(json.dumps({"name": step.name, "options": step.options()}))
    assert make(manifest["name"], **manifest["options"]) == step
    assert parse(step.spec()) == step
    assert parse(step.spec()).spec() == step.spec()
    assert hash(parse(step.spec())) == hash(step)


@pytest.mark.parametrize("name", PASSES)
def test_its_name_is_the_one_it_is_found_by(name: str) -> None:
    assert find(name).name == name
    assert make(name).spec() == name
    assert find(name).keeps in ("exact", "close", "changes")
    assert (find(name).__doc__ or "").strip()


@pytest.mark.parametrize("name", PASSES)
def test_options_are_frozen(name: str) -> None:
    step = make(name)
    field = dataclasses.fields(step)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(step, field, getattr(step, field))


@pytest.mark.parametrize("name", PASSES)
def test_an_unknown_option_names_the_nearest(name: str) -> None:
    field = dataclasses.fields(find(name))[0].name
    with pytest.raises(UsageError, match=f"{name} has no option '{field}x'") as caught:
        make(name, **{f"{field}x": 1})
    assert field in caught.value.hint


@pytest.mark.parametrize("name", [n for n in PASSES if issubclass(find(n), Adapter)])
@pytest.mark.parametrize(
    ("option", "value"), [("targets", 3), ("targets", None), ("exclude", ["q_proj"]), ("bias", "some")]
)
def test_an_option_of_the_wrong_type_is_named(name: str, option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=option):
        make(name, **{option: value})


def test_integers_stand_for_floats_and_not_the_reverse() -> None:
    assert make("lora", alpha=32) == make("lora", alpha=32.0)
    with pytest.raises(UsageError, match="option 'rank'"):
        make("lora", rank=8.0)
    with pytest.raises(UsageError, match="option 'rank'"):
        make("lora", rank=True)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown method 'lorra'") as caught:
        make("lorra")
    assert "lora" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lora(",
        "lora(4)",
        "lora(rank=f())",
        "lora(**{'rank': 4})",
        "__import__('os')",
        "lora.x",
        "1",
        "lora(rank=x)",
    ],
)
def test_what_is_no_option_string_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)
