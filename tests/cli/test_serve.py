"""`surgeon serve`: what it refuses before it listens, and that it listens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from surgeon.cli.main import main
from surgeon.cli.serve import size


def test_sizes() -> None:
    assert [size("--pool", text) for text in ("512M", "2G", "1.5k", "100", "3GiB")] == [
        512 * 10**6, 2 * 10**9, 1500, 100, 3 * 10**9,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--pool", "much"], "--pool is 'much'"),
        (["--running", "0"], "--running is 0"),
        (["--adapters", "nowhere"], "there is no such folder"),
        (["--adapter", "poet"], "NAME=FOLDER"),
        (["--tensor-parallel", "2"], "torchrun --nproc-per-node 2"),
        (["--dtype", "int3"], "--dtype is 'int3'"),
        (["--chat-template", "none.jinja"], "there is no such file"),
    ],
)
def test_bad_options(options: list[str], told: str, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(shared / "models" / "pystdlib-llama"), *options]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_it_listens_and_stops(shared: Path, repo: Path, processes: int) -> None:
    port = "18341"
    start = [sys.executable]
    start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [*start, "-m", "surgeon", "serve", str(shared / "models" / "pystdlib-llama"), "--port", port]
    command += ["--tensor-parallel", str(processes)]
    process = subprocess.Popen([*command, "--pool", "64M"], cwd=repo, env={**os.environ, "SURGEON_API_KEY": "k"})
    try:
        for _ in range(300):
            time.sleep(0.2)
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/completions", headers={"Authorization": "Bearer k"}, timeout=60,
            json={"model": "pystdlib-llama", "prompt": "import ", "max_tokens": 3},
        )  # fmt: skip
        assert answer.json()["usage"]["completion_tokens"] == 3
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
