"""Every kernel for every target: no spills, no tile product over fewer than 16 values (checked by `aot.build`)."""

from __future__ import annotations

import pytest

from surgeon import kernels
from surgeon.kernels import aot

VARIANTS = [variant for module in kernels.files() for variant in module.VARIANTS]
FIRST = list({variant.kernel.name: variant for variant in reversed(VARIANTS)}.values())
"""One for each kernel, the first that its file declares."""
FEW = [(variant, target) for variant in FIRST for target in aot.TARGETS]
REST = [(variant, target) for variant in VARIANTS for target in aot.TARGETS if (variant, target) not in FEW]


@pytest.mark.parametrize(("variant", "target"), FEW, ids=lambda one: getattr(one, "name", one))
def test_compiles(variant: aot.Variant, target: str) -> None:
    assert aot.build(variant, aot.target(target)).code


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "target"), REST, ids=lambda one: getattr(one, "name", one))
def test_compiles_too(variant: aot.Variant, target: str) -> None:
    assert aot.build(variant, aot.target(target)).code


def test_names_are_those_of_files() -> None:
    names = [variant.name for variant in VARIANTS]
    assert len(set(names)) == len(names), "two variants share a name"
