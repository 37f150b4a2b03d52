"""The live view, in a real browser without a window."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import KEY, METHODS, Running


def test_the_state_counts_every_page(running: Running) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "vera", "prompt": "import ", "max_tokens": 2}
    httpx.post(f"{running.url}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()
    state = httpx.get(f"{running.url}/dashboard/state", headers=headers).json()
    assert sum(count for _, count in state["map"]) == state["pages"]
    assert sum(count for kind, count in state["map"] if kind == "free") == state["free"]
    assert {"bank", "idle"} <= {kind for kind, _ in state["map"]}
    rows = {row["name"]: row for row in state["adapters"]}
    assert set(rows) == {"llama (base)", *METHODS}
    assert rows["vera"]["pages"] > 0
    assert rows["vera"]["tokens"] >= 2
    assert httpx.get(f"{running.url}/dashboard/state").status_code == 401


def dump(url: str, profile: Path) -> str:
    """The page as a browser has it after three seconds."""
    browser = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
    if browser is None:
        pytest.fail("no Chromium or Chrome to show the page in", pytrace=False)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
    done = subprocess.run([*command, "--virtual-time-budget=3000", url], capture_output=True, text=True, timeout=120)
    return done.stdout


def test_a_browser_shows_it(running: Running, tmp_path: Path) -> None:
    page = dump(f"{running.url}/dashboard#key={KEY}", tmp_path)
    assert all(f"<td>{name}</td>" in page for name in ("llama (base)", *METHODS))
    assert "tokens/s" in page
    assert '<p id="problem" role="alert"></p>' in page
    refused = dump(f"{running.url}/dashboard", tmp_path / "other")
    assert "the API key is missing or wrong" in refused
