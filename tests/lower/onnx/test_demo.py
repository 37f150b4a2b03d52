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
from urllib.parse import quote

import pytest

import surgeon
from surgeon.errors import UnsupportedError, UsageError
from surgeon.lower.onnx import demo, web
from surgeon.lower.onnx.profiles import PROFILES

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


def greedy(folder: Path, prompt: str, count: int) -> list[int]:
    """What transformers generates."""
    model = surgeon.load(folder)
    inputs = model.tokenizer(prompt, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0].tolist()
    return [int(token) for token in made[inputs["input_ids"].shape[1] :]]


NODE = """
import { AutoTokenizer, AutoModelForCausalLM, env } from '@huggingface/transformers';
const [folder, text, count] = process.argv.slice(2);
env.allowRemoteModels = false;
const tokenizer = await AutoTokenizer.from_pretrained(folder, { local_files_only: true });
const model = await AutoModelForCausalLM.from_pretrained(folder, { local_files_only: true });
const inputs = tokenizer(text);
const made = await model.generate({ ...inputs, max_new_tokens: Number(count), do_sample: false });
console.log(JSON.stringify(made.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number)));
"""


@pytest.fixture(scope="module")
def shared_web(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared Llama as a web export with its page; the page's runtime comes from npm."""
    out = tmp_path_factory.mktemp("demo") / "web"
    surgeon.export(shared / "models" / "pystdlib-llama", out, profile="web", demo=True)
    return out


@pytest.mark.slow
def test_a_browser_generates_the_tokens_of_transformers(shared_web: Path, shared: Path, tmp_path: Path) -> None:
    with served(shared_web) as url:
        page = shown(f"{url}/#prompt={quote(PROMPT)}&tokens={TOKENS}", tmp_path)
    assert '<p id="problem" role="alert"></p>' in page
    assert generated(page) == {"base": greedy(shared / "models" / "pystdlib-llama", PROMPT, TOKENS)}


@pytest.mark.slow
def test_transformers_js_generates_them_too(shared_web: Path, shared: Path, tmp_path: Path) -> None:
    subprocess.run(
        ["npm", "install", "--ignore-scripts", "--silent", "@huggingface/transformers@4.3.1"],
        cwd=tmp_path, check=True, capture_output=True, timeout=400,
    )  # fmt: skip
    (tmp_path / "run.mjs").write_text(NODE)
    command = ["node", "run.mjs", str(shared_web), PROMPT, str(TOKENS)]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=400)
    expected = greedy(shared / "models" / "pystdlib-llama", PROMPT, TOKENS)
    assert json.loads(done.stdout.splitlines()[-1]) == expected
