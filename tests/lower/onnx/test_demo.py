"""The page beside a web export: whole, from local files alone, and in a real browser the tokens of the replay."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest

import surgeon
from benchmarks.zoo.oracles import nudged
from surgeon.errors import UnsupportedError, UsageError
from surgeon.lower.onnx import demo, web
from surgeon.lower.onnx.profiles import PROFILES
from surgeon.model import SurgeonModel
from tests.lower.onnx.runtimes import by_transformers_js

NAMES = web.Layout("onnx/model.onnx", "onnx/model.onnx_data")
PROMPT, TOKENS = "def load(", 8


def node_modules(place: Path) -> Path:
    """A folder in which npm put the page's runtime, without what is in its files."""
    for name in demo.FILES:
        (place / "some-package" / "dist").mkdir(parents=True, exist_ok=True)
        (place / "some-package" / "dist" / name).write_text(f"// {name}")
    return place


def test_the_page_lists_the_model_and_its_adapters(tmp_path: Path) -> None:
    folder = tmp_path / "web"
    (folder / "onnx").mkdir(parents=True)
    (folder / "adapters").mkdir()
    (folder / "tokenizer.json").write_text("{}")
    for name in (NAMES.data, "adapters/base.safetensors", "adapters/one.safetensors", "adapters/two.safetensors"):
        (folder / name).write_bytes(b"")
    with demo.runtime(node_modules(tmp_path / "modules")) as files:
        demo.write(folder, NAMES, files, "llama & <co>", {})
    told = json.loads((folder / demo.LIST).read_text())
    assert told["adapters"] == [
        {"name": name, "file": f"adapters/{name}.safetensors"} for name in ("base", "one", "two")
    ]
    assert (told["model"], told["data"]) == (NAMES.model, NAMES.data)
    assert sorted(path.name for path in (folder / demo.RUNTIME).iterdir()) == sorted(demo.FILES)
    page = (folder / demo.PAGE).read_text()
    assert "<title>llama &amp; &lt;co&gt;</title>" in page
    assert not re.findall(r"https?://", page)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (node_modules(tmp_path) / "some-package" / "dist" / "tokenizers.min.mjs").unlink()
    with pytest.raises(UsageError, match=r"no tokenizers\.min\.mjs"), demo.runtime(tmp_path):
        pass
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UnsupportedError, match="npm, which is not installed"), demo.runtime(None):
        pass
    with pytest.raises(UsageError, match="in a browser"):
        demo.check(PROFILES["ort"], SimpleNamespace())
    with pytest.raises(UsageError, match="needs a tokenizer"):
        demo.check(PROFILES["web"], None)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder as `python -m http.server` serves it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def shown(url: str, profile: Path) -> str:
    """The page in Chromium, once nothing is left for it to do."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.fail("no Chromium or Chrome to show the page in", pytrace=False)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=120000", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=True).stdout


def generated(page: str) -> dict[str, list[int]]:
    """Adapter → the tokens that the page generated with it."""
    found = re.findall(r'<pre data-adapter="([^"]*)" data-ids="([\d,]*)"', page)
    return {html.unescape(name): [int(token) for token in ids.split(",")] for name, ids in found}


def greedy(model: SurgeonModel) -> list[int]:
    """What torch generates."""
    inputs = model.tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
    return [int(token) for token in made[inputs["input_ids"].shape[1] :]]


@pytest.mark.slow
def test_a_browser_generates_with_every_adapter_what_torch_does(shared: Path, tmp_path: Path) -> None:
    """The runtime comes from npm, the page from a plain file server, and nothing from anywhere else."""
    base = shared / "models" / "pystdlib-llama"
    expected = {"base": greedy(surgeon.load(base))}
    options: dict[str, dict[str, Any]] = {"lora": {"rank": 4}, "ia3": {}}
    for name, method, std in (("one", "lora", 0.1), ("two", "ia3", 0.5)):
        model = nudged(surgeon.apply(base, method, **options[method]), std)
        expected[name] = greedy(model)
        model.save(tmp_path / name)
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    folders = [tmp_path / "one", tmp_path / "two"]
    surgeon.export(base, tmp_path / "web", profile="web", adapters="slots", adapter=folders, demo=True)
    with served(tmp_path / "web") as url:
        page = shown(f"{url}/#prompt={quote(PROMPT)}&tokens={TOKENS}", tmp_path / "profile")
    assert '<p id="problem" role="alert"></p>' in page
    assert generated(page) == expected


@pytest.mark.slow
def test_transformers_js_generates_what_torch_does(shared: Path, tmp_path: Path) -> None:
    base = shared / "models" / "pystdlib-llama"
    surgeon.export(base, tmp_path / "web", profile="web")
    assert by_transformers_js(tmp_path / "web", tmp_path, PROMPT, TOKENS)[0] == greedy(surgeon.load(base))
