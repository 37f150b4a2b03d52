"""`surgeon serve`: one base model, thousands of adapters, OpenAI's API."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.cli import devices, output
from surgeon.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def command(
    base: Annotated[str, typer.Argument(help="The base model: folder or hub id.")],
    adapter: Annotated[list[str], typer.Option(help="NAME=FOLDER, or NAME=FOLDER@RANK; may repeat.")] = [],  # noqa: B006
    adapters: Annotated[list[Path], typer.Option(help="A folder whose subfolders are adapters; it is watched.")] = [],  # noqa: B006
    allow: Annotated[list[Path], typer.Option(help="A folder below which requests may load adapters.")] = [],  # noqa: B006
    name: Annotated[str, typer.Option(help="What requests call the base model; its folder's name if not given.")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    pool: Annotated[str, typer.Option(help="Memory for K/V pages and adapters.")] = "1G",
    host_cache: Annotated[str, typer.Option(help="Memory for adapters that were read from disk.")] = "4G",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; the checkpoint's if not given.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, …; default: a GPU if there is one.")] = "",
    quantise: Annotated[str, typer.Option(help="Quantise the base: nf4, or intq(bits=4).")] = "",
    deterministic: Annotated[bool, typer.Option(help="The same bits for a request, whatever else is asked.")] = False,
    targets: Annotated[str, typer.Option(help="The linears that adapters may change.")] = "*",
    running: Annotated[int, typer.Option(help="Requests at once.")] = 64,
    active: Annotated[int, typer.Option(help="Different adapters at once.")] = 64,
    step: Annotated[int, typer.Option(help="Tokens per step.")] = 256,
    queue: Annotated[int, typer.Option(help="Requests that may wait.")] = 1024,
    max_prompt: Annotated[int, typer.Option(help="Tokens a prompt may have; 0 for as many as the model has.")] = 0,
    max_body: Annotated[str, typer.Option(help="Bytes a request may have.")] = "1M",
    deadline: Annotated[float, typer.Option(help="Seconds a request may take; 0 for any.")] = 0.0,
    tensor_parallel: Annotated[int, typer.Option(help="Processes that share the model, started by torchrun.")] = 1,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja file, in place of the tokenizer's own.")] = None,
    api_key: Annotated[list[str], typer.Option(help="A key; may repeat. SURGEON_API_KEY is one too.")] = [],  # noqa: B006
) -> None:
    """Serve a base model with any number of adapters, mixed in one batch, over OpenAI's API.

    Requests name an adapter where they name a model. LoRA of any rank, rsLoRA, DoRA, AdaLoRA, DyLoRA, VeRA, IA³, LoHa,
    prefix and prompt tuning are served side by side, from PEFT's folders and surgeon's.

    Examples:
        surgeon serve model/ --adapters adapters/
        surgeon serve model/ --adapter poet=work/ --adapter short=dylora/@4 --api-key secret
        torchrun --nproc-per-node 2 -m surgeon serve model/ --tensor-parallel 2
    """
    sizes = {"--pool": size("--pool", pool), "--host-cache": size("--host-cache", host_cache)}
    for option, count in (
        ("--running", running),
        ("--active", active),
        ("--step", step),
        ("--queue", queue),
        ("--tensor-parallel", tensor_parallel),
    ):
        if count < 1:
            raise UsageError(f"{option} is {count}", option, "1 or more")
    template = _template(chat_template)
    _require()
    from surgeon.serve.app import make_app
    from surgeon.serve.open import follow, named, open_server
    from surgeon.serve.scheduler import Limits
    from surgeon.serve.server import Options

    keys = frozenset(key for key in (*api_key, os.environ.get("SURGEON_API_KEY", "")) if key)
    places = [tuple(path.absolute() for path in folders) for folders in (allow, adapters)]
    _check_folders([*allow, *adapters])
    title = name or Path(base).absolute().name
    options = Options(
        (title,), keys, places[0], places[1], size("--max-body", max_body), max_prompt, deadline, template
    )  # fmt: skip
    limits = Limits(running=running, adapters=active, step=step, queue=queue)
    share = _joined(tensor_parallel)
    model: dict[str, Any] = {
        "pool_bytes": sizes["--pool"], "dtype": _dtype(dtype), "device": _device(device, tensor_parallel),
        "quantise": quantise, "deterministic": deterministic, "targets": targets, "share": share,
    }  # fmt: skip
    if share is not None and share.rank:
        follow(base, **model)
        return
    server = open_server(
        base, options=options, adapters=named(adapter), limits=limits, host_bytes=sizes["--host-cache"], **model
    )
    memory = server.service.engine.memory
    layout = memory.layout
    output.say(f"{title}: {memory.pool.pages} pages of {layout.block} tokens, {output.size(memory.pool.nbytes)}")
    output.say(f"http://{host}:{port}/v1 · /health · /metrics · /dashboard; Ctrl-C stops")
    import uvicorn

    try:
        uvicorn.run(
            make_app(server), host=host, port=port, log_level="warning", timeout_graceful_shutdown=5,
            timeout_keep_alive=75,  # longer than clients keep theirs: who closes first must not be the server
        )  # fmt: skip
    finally:
        server.service.engine.stop()


def _joined(processes: int) -> Any:
    """Which of several processes this one is, None for the only one."""
    if processes == 1:
        return None
    from surgeon.serve.shared import join

    return join(processes)


def size(option: str, text: str) -> int:
    """A number of bytes: `512M`, `2G`, `1000000`.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"{option} is {text!r}", option, "a number of bytes, for example 512M or 2G")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _dtype(text: str) -> Any:
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text and text not in names:
        raise UsageError(f"--dtype is {text!r}", "--dtype", ", ".join(names))
    return names.get(text)


def _device(text: str, processes: int) -> str:
    if processes == 1:
        return devices.chosen(text)
    if text not in ("", "cpu"):
        raise UsageError(f"{processes} processes share the model on {text}", "--tensor-parallel", "--device cpu")
    return "cpu"


def _template(path: Path | None) -> str:
    if path is None:
        return ""
    if not path.is_file():
        raise UsageError("there is no such file", str(path), "--chat-template takes a Jinja file")
    return path.read_text(encoding="utf-8")


def _check_folders(folders: list[Path]) -> None:
    for folder in folders:
        if not folder.is_dir():
            raise UsageError("there is no such folder", str(folder), "name a folder with adapters in it")


def _require() -> None:
    """The libraries of the extra `serve`."""
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        what = f"serving needs {', '.join(missing)}, which is not installed"
        raise UsageError(what, "surgeon serve", "pip install 'model-surgeon[serve]'")
