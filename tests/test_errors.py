from __future__ import annotations

import pytest

from surgeon.errors import CheckFailed, SurgeonError, UnsupportedError, UsageError, nearest


def test_three_lines_what_where_and_what_to_try() -> None:
    error = UsageError("no module matches 'x'", "--targets", "the model has e.g. 'q_proj'")
    assert str(error).splitlines() == [
        "no module matches 'x'", "  where: --targets", "  try:   the model has e.g. 'q_proj'",
    ]  # fmt: skip
    assert str(SurgeonError("broken")) == "broken"
    assert str(SurgeonError("broken", hint="mend it")) == "broken\n  try:   mend it"


@pytest.mark.parametrize(
    ("kind", "code"), [(SurgeonError, 1), (CheckFailed, 1), (UsageError, 2), (UnsupportedError, 3)]
)
def test_exit_codes(kind: type[SurgeonError], code: int) -> None:
    assert kind("x").exit_code == code
    assert issubclass(kind, SurgeonError)


def test_nearest() -> None:
    known = ["lora", "vera", "kv_cache", "lora"]
    assert nearest("lorra", known).split(", ")[0] == "lora"
    assert nearest("zzz", known) == "lora, vera, kv_cache"
    assert nearest("zzz", known, 1) == "lora"
    assert nearest("x", []) == ""
