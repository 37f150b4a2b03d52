"""Profiles by name, in what is written and in what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from benchmarks.zoo import graphs
from surgeon.errors import UsageError
from surgeon.lower.onnx import export, profiles


def test_every_profile_is_found_by_its_name() -> None:
    assert set(profiles.PROFILES) == {"ort", "genai", "web", "openvino"}
    assert all(profiles.find(name).name == name for name in profiles.PROFILES)
    assert all(profile.optional_slots == (profile.attention == "gqa") for profile in profiles.PROFILES.values())


def test_a_wrong_name_is_told_the_right_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no profile wbe") as caught:
        export.export_onnx(graphs.graph_of("llama"), tmp_path / "onnx", profile="wbe")
    assert "web" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_portable_profile_has_standard_operators_only(tmp_path: Path) -> None:
    report = export.export_onnx(graphs.graph_of("llama"), tmp_path / "onnx", profile="openvino", verify=False)
    assert (report.profile, report.opset) == ("openvino", 21)
    model = ir.load(report.folder / export.MODEL)
    assert model.opset_imports == {"": 21}
    assert json.loads((report.folder / export.MANIFEST).read_text())["profile"] == "openvino"
