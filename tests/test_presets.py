"""Presets: the passes and options of QLoRA and QA-LoRA, as the command line makes them."""

from __future__ import annotations

import pytest

from surgeon.cli.methods import chosen
from surgeon.errors import UsageError
from surgeon.passes import make
from surgeon.presets import steps_of


def test_qlora_is_lora_on_every_linear_over_nf4() -> None:
    expected = [make("nf4"), make("lora", targets="all-linear", rank=64, alpha=16.0, dropout=0.05)]
    assert steps_of("qlora", {}) == chosen(["qlora"], {}) == expected
    assert expected[0].options()["double"] is True


def test_qa_lora_pools_the_groups_of_the_integers() -> None:
    assert chosen(["qa-lora"], {}) == [make("intq"), make("qalora", rank=64, alpha=16.0)]


def test_options_go_to_the_passes_that_have_them() -> None:
    quantiser, adapter = chosen(["qa-lora(bits=2)"], {"rank": "4"})
    assert (quantiser, adapter) == (make("intq", bits=2), make("qalora", rank=4))
    with pytest.raises(UsageError, match="no option 'bits'"):
        steps_of("qlora", {"bits": 3})
