"""What installs is what is on disk, under one name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LINKED = ("passes", "kernels", "cli")


@pytest.fixture(scope="session")
def project(repo: Path) -> dict[str, Any]:
    return tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def unpacked(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, unpacked."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("surgeon", *LINKED):
        shutil.copytree(repo / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo / name, copy / name)
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(copy)]
    subprocess.run([sys.executable, "-m", *command], check=True, cwd=out)
    (wheel,) = out.glob("model_surgeon-*.whl")
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def import_there(target: Path, statement: str) -> subprocess.CompletedProcess[str]:
    """Run a statement in a process that finds the unpacked wheel first, and nothing of the clone."""
    env = {**os.environ, "PYTHONPATH": str(target)}
    return subprocess.run([sys.executable, "-c", statement], cwd=target, env=env, capture_output=True, text=True)


def folders_with_code(repo: Path) -> set[str]:
    """The packages there are: every folder under the four roots that holds Python files, by its installed name."""
    found = set()
    for root, prefix in ((repo / "surgeon", ()), *((repo / name, ("surgeon",)) for name in LINKED)):
        for folder, subfolders, files in os.walk(root):  # does not follow the links
            subfolders[:] = [name for name in subfolders if name != "__pycache__"]
            if any(name.endswith(".py") for name in files):
                found.add(".".join((*prefix, *Path(folder).relative_to(repo).parts)))
    return found


def test_packages_are_the_folders_on_disk(repo: Path, project: dict[str, Any]) -> None:
    setuptools = project["tool"]["setuptools"]
    assert set(setuptools["packages"]) == folders_with_code(repo)
    assert set(setuptools["package-dir"]) == set(setuptools["packages"])
    for package, folder in setuptools["package-dir"].items():
        assert (repo / folder / "__init__.py").is_file(), package


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_lead_to_the_folder_beside(repo: Path, name: str) -> None:
    link = repo / "surgeon" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_wheel_holds_every_module_once(repo: Path, unpacked: Path) -> None:
    folders = [Path(*package.split(".")) for package in folders_with_code(repo)]
    expected = {folder / path.name for folder in folders for path in (repo / folder).glob("*.py")}
    assert {path.relative_to(unpacked) for path in unpacked.rglob("*.py")} == expected
    assert (unpacked / "surgeon" / "py.typed").is_file()
    assert [path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"] == ["surgeon"]


@pytest.mark.parametrize("name", LINKED)
def test_only_the_inner_name_imports_from_a_wheel(unpacked: Path, name: str) -> None:
    inner = import_there(unpacked, f"import surgeon.{name} as m; print(m.__file__)")
    assert Path(inner.stdout.strip()) == unpacked / "surgeon" / name / "__init__.py", inner.stderr
    outer = import_there(unpacked, f"import {name}")
    assert outer.returncode == 1
    assert f"ModuleNotFoundError: No module named '{name}'" in outer.stderr


def test_wheel_has_the_console_script(unpacked: Path) -> None:
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "surgeon = surgeon.cli.main:run" in entry_points.read_text()


@pytest.mark.parametrize("name", LINKED)
def test_linter_refuses_the_top_level_name(repo: Path, name: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", "surgeon/probe.py", "-"],
        input=f"import {name}\n",
        cwd=repo,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert f"import surgeon.{name}" in found.stdout


def test_supported_ranges(project: dict[str, Any]) -> None:
    assert project["project"]["requires-python"] == ">=3.10"
    assert {"torch>=2.11", "transformers>=5.17"} <= set(project["project"]["dependencies"])


def test_constraints_pin_every_requirement(repo: Path, project: dict[str, Any]) -> None:
    lines = (repo / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*(; python_version >= \"3\.11\")?$", pin) for pin in pins)
    assert "torch==2.13.0" in pins
    pinned = {normal(pin) for pin in pins}
    extras = project["project"]["optional-dependencies"]
    wanted = {
        normal(line)
        for group in [project["project"]["dependencies"], *extras.values()]
        for line in group
        if ";" not in line
    }
    assert wanted - {"model-surgeon"} <= pinned


def normal(requirement: str) -> str:
    """A requirement's distribution name, normalised as package indexes do."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=;!~ ]", requirement)[0]).lower()
