"""`surgeon doctor` against versions that are there, too old, and missing."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

from surgeon.cli import doctor
from surgeon.cli.main import main


def by_name(checks: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in checks}


def test_json_names_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--no-probe", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    checks = by_name(result["checks"])
    assert result["ok"] is True
    expected = {"python", "torch", "transformers", "onnx", "onnxruntime", "triton", "peft", "cpu", "cuda", "disk"}
    assert expected | {"memory"} <= set(checks)
    assert checks["torch"]["found"] == metadata.version("torch")
    assert {check["status"] for check in result["checks"]} <= {"ok", "note"}


def test_text_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--no-probe"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert metadata.version("transformers") in err


@pytest.mark.parametrize(
    ("found", "shown"), [("2.4.0", "torch: 2.4.0, supported is >=2.11"), (None, "torch: not installed")]
)
def test_required_package_missing_or_old_fails(
    found: str | None, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name != "torch":
            return real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    assert main(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"] is False
    assert err.splitlines() == [shown, "  where: surgeon doctor", '  try:   pip install "torch>=2.11"']


def test_optional_package_missing_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    optional = [check for check in doctor.packages() if check.name in doctor.EXTRAS]
    assert {check.status for check in optional} == {"note"}
    assert by_name([vars(check) for check in optional])["onnx"]["hint"] == 'pip install "onnx>=1.18"'


def test_local_build_of_a_supported_version_is_supported() -> None:
    check = doctor._versioned("torch", "2.13.0+cu128", ">=2.11", required=True, install="")
    assert check.status == "ok"
