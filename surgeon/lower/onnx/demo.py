"""`surgeon export --profile web --demo`: a page beside the model that generates in the browser and swaps adapters.

Everything it loads lies in the export's folder: onnxruntime-web (WebAssembly) and Hugging Face's tokenizers in
`runtime/`, copied from a folder or taken from npm when the export is made, and never from the network by the page.
"""

from __future__ import annotations

import contextlib
import html
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.lower.onnx.adapter_file import SLOTS
from surgeon.lower.onnx.adapter_file import write as write_slots
from surgeon.lower.onnx.profiles import Profile
from surgeon.lower.onnx.web import PACKAGE, Layout

PAGE, LIST, RUNTIME, ADAPTERS = "index.html", "demo.json", "runtime", "adapters"
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm", "tokenizers.min.mjs")
PACKAGES = ("onnxruntime-web@1.30.0", "@huggingface/tokenizers@0.2.0")
"""What npm is asked for; their `dist/` folders have `FILES`."""
BASE = "base"
_HINT = f"npm install {' '.join(PACKAGES)}, and --runtime node_modules"


@contextlib.contextmanager
def runtime(given: Path | None) -> Iterator[Path]:
    """A folder with `FILES`: one that was given, or a temporary one filled from npm.

    Raises:
        UsageError: the given folder lacks one of them.
        UnsupportedError: there is no npm.
        SurgeonError: npm cannot download them.
    """
    if given is not None:
        find(given)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="surgeon-npm-") as place:
        _pack(Path(place))
        yield Path(place)


def find(folder: Path) -> dict[str, Path]:
    """Where `FILES` are in a folder, at any depth; raises UsageError for one that is missing."""
    found = {name: next(iter(sorted(folder.rglob(name))), None) for name in FILES}
    for name, path in found.items():
        if path is None:
            raise UsageError(f"the folder has no {name}", str(folder), _HINT)
    return {name: path for name, path in found.items() if path is not None}


def check(profile: Profile, tokenizer: Any, task: str = "causal-lm") -> None:
    """Raise UsageError for an export that a page cannot show."""
    if task != "causal-lm":
        what = f"the page is for causal language models; this one is read for {task}"
        raise UsageError(what, "--demo", "leave it out: transformers.js loads what the profile web writes")
    if profile.package != PACKAGE:
        raise UsageError("the page runs models in a browser", f"--profile {profile.name}", "--demo --profile web")
    if tokenizer is None:
        hint = "save a tokenizer beside the model, or leave out --demo"
        raise UsageError("the page needs a tokenizer, and the model has none", "--demo", hint)


def write(folder: Path, names: Layout, files: Path, title: str, record: Mapping[str, Any]) -> None:
    """Put the page, its runtime and the list of adapters into an export.

    Args:
        folder: the export; its adapters are `adapters/*.safetensors`, to which that of the base is added.
        names: of the model.
        files: of `runtime`.
        title: what the page is called.
        record: the export's manifest, as far as it is about slots.

    Raises:
        UnsupportedError: the tokenizer has no tokenizer.json.
    """
    if not (folder / "tokenizer.json").is_file():
        what = "the page reads tokenizer.json, and this tokenizer writes none"
        raise UnsupportedError(what, "--demo", "use a fast tokenizer of transformers")
    (folder / RUNTIME).mkdir()
    for name, path in find(files).items():
        shutil.copyfile(path, folder / RUNTIME / name)
    page = (resources.files("surgeon.lower.onnx") / "demo.html").read_text(encoding="utf-8")
    shown = html.escape(title)
    (folder / PAGE).write_text(page.replace("<title>surgeon<", f"<title>{shown}<"), encoding="utf-8")
    if SLOTS in record:
        (folder / ADAPTERS).mkdir(exist_ok=True)
        write_slots({}, record, folder / ADAPTERS / f"{BASE}.safetensors")
    made = sorted((folder / ADAPTERS).glob("*.safetensors")) if (folder / ADAPTERS).is_dir() else []
    entries = {path.stem: path.relative_to(folder).as_posix() for path in made}
    adapters = [{"name": BASE, "file": entries.pop(BASE, None)}]
    adapters += [{"name": name, "file": file} for name, file in entries.items()]
    data = names.data if (folder / names.data).is_file() else None
    told = {"title": title, "model": names.model, "data": data, "adapters": adapters}
    (folder / LIST).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _pack(place: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise UnsupportedError("the page's runtime comes from npm, which is not installed", "--demo", _HINT)
    command = [npm, "pack", "--ignore-scripts", "--silent", "--pack-destination", str(place), *PACKAGES]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["npm failed"])[-1]
        raise SurgeonError(f"npm cannot download the page's runtime: {reason}", ", ".join(PACKAGES), _HINT)
    for archive in sorted(place.glob("*.tgz")):
        with tarfile.open(archive) as packed:
            for member in packed.getmembers():
                name = Path(member.name).name
                if member.isfile() and name in FILES and (stream := packed.extractfile(member)) is not None:
                    (place / name).write_bytes(stream.read())
        archive.unlink()
