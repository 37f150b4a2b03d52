"""Options read off dataclasses and docstrings, and option strings there and back."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from surgeon.errors import UsageError
from surgeon.options import equation, methods, options_of, parse_spec, summary
from surgeon.passes.base import Adapter
from surgeon.passes.lora import Lora
from surgeon.passes.vera import Vera


def test_options_are_the_documented_fields() -> None:
    found = {option.name: option for option in options_of(Lora)}
    assert list(found)[:4] == ["rank", "alpha", "dropout", "rslora"]
    assert {"targets", "exclude"} <= set(found)
    assert (found["rank"].type, found["rank"].default, found["rank"].flag) == ("int", 8, "--rank")
    assert (found["ranks"].type, found["ranks"].value, found["alphas"].value) == ("pairs", "int", "float")
    assert found["ranks"].help.endswith("the first wins.")
    assert "max_in" not in {option.name for option in options_of(Vera)}
    assert next(option for option in options_of(Vera) if option.name == "d_initial").flag == "--d-initial"


@pytest.mark.parametrize("name", methods())
def test_every_method_documents_itself(name: str) -> None:
    method = methods()[name]
    assert summary(method).endswith(".")
    assert equation(method)
    for option in options_of(method):
        assert option.help, option
        assert option.type in ("int", "float", "bool", "text", "pairs")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 4},
        {"rank": 4, "alpha": 0.5, "rslora": True},
        {"targets": "*.{q,v}_proj, mlp.up_proj", "exclude": "model.layers.[0-3].*"},
        {"targets": r"re:.*\.(q|v)_proj", "dropout": 0.05},
        {"ranks": (("*.q_proj", 3), ("it's", 2)), "alphas": (("*.{k,v}_proj", 1.5),)},
    ],
)
def test_an_option_string_makes_the_pass_that_wrote_it(options: dict[str, Any]) -> None:
    step = Lora(**options)
    name, values = parse_spec(step.spec())
    assert name == "lora"
    assert Lora.make(values) == step


def test_quotes_may_be_left_out() -> None:
    name, values = parse_spec("vera( rank=64, targets=*.{q,v}_proj, up_proj , d-initial=1e-7)")
    assert (name, values) == ("vera", {"rank": 64, "targets": "*.{q,v}_proj, up_proj", "d_initial": 1e-7})
    assert parse_spec("lora(ranks=*.{q,k}_proj=4, rslora=yes)")[1] == {
        "ranks": (("*.q_proj", 4), ("*.k_proj", 4)),
        "rslora": True,
    }


@pytest.mark.parametrize(
    ("spec", "what", "hint"),
    [
        ("lorra", "unknown method 'lorra'", "lora"),
        ("lora(rnk=4)", "lora has no option 'rnk'", "rank"),
        ("lora(rank=four)", "--rank is 'four'", "a whole number"),
        ("lora(rank)", "'rank' in 'lora(rank)' is not an option=value", "rank"),
        ("lora(rslora=perhaps)", "--rslora is 'perhaps'", "true or false"),
        ("lora(ranks=4)", "--ranks is '4'", "pattern=value"),
        ("lora(rank=4", "'lora(rank=4' is not a method", "lora(rank=8"),
    ],
)
def test_bad_option_strings_say_what_is_near(spec: str, what: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_spec(spec)
    assert caught.value.what == what
    assert hint in caught.value.hint


def test_reading_options_imports_no_torch() -> None:
    code = "import sys; from surgeon.options import methods, options_of; [options_of(m) for m in methods().values()]"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


def test_adapters_share_their_options() -> None:
    shared = [option.name for option in options_of(Adapter)]
    for method in (Lora, Vera):
        assert [option.name for option in options_of(method)][-len(shared) :] == shared
