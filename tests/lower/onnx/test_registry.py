"""torch's exporter reads what it knows once for all parts, and everybody else gets what they had."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from surgeon.lower.onnx import registry
from surgeon.lower.onnx.registry import read_once


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


def test_it_is_read_once_for_an_opset_and_given_back() -> None:
    before = vars(ONNXRegistry)["from_torchlib"]
    with read_once():
        first, again = (ONNXRegistry.from_torchlib(opset_version=21) for _ in range(2))
        other = ONNXRegistry.from_torchlib(opset_version=18)
    with read_once():
        later = ONNXRegistry().from_torchlib(opset_version=21)
    assert first is again is later
    assert (first.opset_version, other.opset_version) == (21, 18)
    assert vars(ONNXRegistry)["from_torchlib"] is before
    with pytest.raises(ZeroDivisionError), read_once():
        1 / 0  # noqa: B018
    assert vars(ONNXRegistry)["from_torchlib"] is before


def test_exports_leave_it_as_it_is() -> None:
    with read_once():
        known = ONNXRegistry.from_torchlib(opset_version=21)
        count = {target: len(forms) for target, forms in known.functions.items()}
        torch.onnx.export(Doubled().eval(), (torch.ones(2),), dynamo=True, opset_version=21, verbose=False)
    assert {target: len(forms) for target, forms in known.functions.items()} == count


@pytest.mark.parametrize("moved", [None, SimpleNamespace()])
def test_where_torch_has_moved_it_nothing_is_done(moved: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", lambda: moved)
    with read_once():
        assert ONNXRegistry.from_torchlib() is not ONNXRegistry.from_torchlib()
