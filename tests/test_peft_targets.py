"""PEFT's rules for targets and patterns, read and written."""

from __future__ import annotations

from surgeon.peft_files import base_name
from surgeon.peft_targets import lookup, patterns, target_modules, targeted


def test_targets_are_written_short_and_exact() -> None:
    modules = {"a.0.q", "a.1.q", "a.0.k", "b.0.q", "a.0", "a", "x.a.0.q"}
    assert target_modules(["a.0.k"], modules) == ["k"]
    assert target_modules(["b.0.q", "a.1.q"], modules) == ["a.1.q", "b.0.q"]
    pattern = target_modules(["a.0.q"], modules)
    assert isinstance(pattern, str)
    assert targeted({"target_modules": pattern}, sorted(modules)) == ["a.0.q"]


def test_patterns_are_written_short_and_exact() -> None:
    values = {"a.0.q": 4, "a.1.q": 4, "a.0.k": 8, "a.1.k": 2, "x.a.1.k": 8}
    found = patterns(values, 8)
    assert all(lookup(found, path, 8) == value for path, value in values.items())
    assert patterns({"a.0.q": 4, "a.1.q": 4, "a.0.k": 8}, 8) == {"q": 4}
    assert patterns({"a.q": 8}, 8) == {}


def test_a_base_of_the_hub_is_named_by_its_id() -> None:
    revision = "0123456789" * 4
    assert base_name(f"/home/me/.cache/hub/models--org--some-model/snapshots/{revision}") == (
        "org/some-model",
        revision,
    )
    assert base_name("/models/org--some-model") == ("/models/org--some-model", None)
