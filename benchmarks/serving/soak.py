"""A server under everything at once: many clients, some of whom leave, adapters that come and go, corrupt ones too.

    python -m benchmarks.serving.soak                                  # 20 minutes, 200 clients
    python -m benchmarks.serving.soak --minutes 0.5 --clients 8 --out /tmp/soak.json

`surgeon serve` runs in a process of its own over ../shared/models/pystdlib-llama, with adapters of six methods. Every
complete greedy answer is compared with what the adapter's own folder gave before the soak; a difference counts as wrong
unless the two likeliest tokens of the reference, where the texts part, are within 1e-3. At the end the pool has to be
empty but for idle adapters, and the resident size, once it has levelled off (after the first third), must not grow by
more than 5 %. What was seen so far is written every half minute, and the resident size plotted at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.train_step import SMALL

METHODS = ("lora", "dora", "vera", "prefix", "prompt", "dylora")
PROMPTS = ("import os\n", "def read(self, path):\n", "class Server:\n    ", "for name in ", "    return ")
TOKENS = 24
PORT = 18377


def prepare(root: Path) -> tuple[Any, dict[str, Path]]:
    """Work folders of every method, and the base's graph."""
    from benchmarks.zoo.graphs import randomised
    from surgeon import api, run, store
    from surgeon.passes import make

    base, folders = api.read(SMALL, "causal-lm"), {}
    options: dict[str, dict[str, Any]] = {"lora": {"targets": "all-linear"}, "vera": {"rank": 16}}
    for number, name in enumerate(METHODS):
        folders[name] = root / "watched" / name
        folders[name].parent.mkdir(parents=True, exist_ok=True)
        step = make(name, **options.get(name, {}))
        store.save(randomised(run.apply(base, step), seed=number, std=0.05), folders[name])
    return base, folders


def references(base: Any, folders: dict[str, Path]) -> dict[tuple[str, str], list[tuple[str, float]]]:
    """(adapter, prompt) → the text after each greedy token, and the gap between the two likeliest tokens there."""
    from surgeon import api, module, store
    from surgeon.generate import generator

    tokenizer, found = api.tokenizer_of(SMALL), {}
    for name in ("base", *folders):
        model = generator(module.load(store.load(folders[name]) if name in folders else base))
        for prompt in PROMPTS:
            given = tokenizer(prompt, return_tensors="pt")
            made = model.generate(
                given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=TOKENS, do_sample=False,
                output_scores=True, return_dict_in_generate=True, pad_token_id=0,
            )  # fmt: skip
            new = made.sequences[0, given["input_ids"].shape[1] :].tolist()
            gaps = [float(torch.diff(scores[0].topk(2).values.flip(0))) for scores in made.scores]
            texts = [tokenizer.decode(new[: i + 1], skip_special_tokens=True) for i in range(len(new))]
            found[name, prompt] = list(zip(texts, gaps, strict=True))
    return found


def right(text: str, expected: list[tuple[str, float]]) -> bool:
    """Whether an answer is the reference, or parts from it where two tokens are as good as equal."""
    if text == expected[-1][0]:
        return True
    first = next((i for i, (piece, _) in enumerate(expected) if not text.startswith(piece)), len(expected) - 1)
    return min(gap for _, gap in expected[: first + 1]) < 1e-3


class Soak:
    """The clients, and what they have seen."""

    def __init__(self, root: Path, folders: dict[str, Path], wanted: Any, seconds: float, out: Path) -> None:
        self.out = out
        self.root, self.folders, self.wanted, self.seen = root, folders, wanted, Counter[str]()
        self.end = time.monotonic() + seconds
        self.wrong: list[str] = []
        self.client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{PORT}", timeout=600, limits=httpx.Limits(max_connections=None)
        )

    async def ask(self, number: int) -> None:
        """One client: asks again and again, and sometimes leaves in the middle."""
        draw = random.Random(number)
        while time.monotonic() < self.end:
            name, prompt = draw.choice(("base", *METHODS)), draw.choice(PROMPTS)
            body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
            kind = draw.random()
            if kind < 0.15:
                with contextlib.suppress(httpx.HTTPError, asyncio.TimeoutError):
                    await asyncio.wait_for(self.client.post("/v1/completions", json=body), draw.random() * 2)
                self.seen["left"] += 1
                continue
            if kind < 0.2:
                await self.refused(draw)
                continue
            text = await (self.streamed(body) if kind < 0.6 else self.whole(body))
            if text is None:
                await asyncio.sleep(draw.random())
                continue
            self.seen["answers"] += 1
            if not right(text, self.wanted[name, prompt]):
                self.wrong.append(f"{name} {prompt!r}: {text!r}")

    async def whole(self, body: dict[str, Any]) -> str | None:
        """An answer at once; None where the server is busy."""
        answer = await self.client.post("/v1/completions", json=body)
        return self.text(answer.status_code, answer.text)

    def text(self, status: int, text: str) -> str | None:
        """The text of a response."""
        if status == 429:
            self.seen["busy"] += 1
            return None
        if status != 200:
            self.wrong.append(f"status {status}: {text[:300]}")
            return None
        found: str = json.loads(text)["choices"][0]["text"]
        return found

    async def streamed(self, body: dict[str, Any]) -> str | None:
        """The same in pieces."""
        async with self.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                return self.text(answer.status_code, (await answer.aread()).decode())
            pieces = [line[6:] async for line in answer.aiter_lines() if line.startswith("data: {")]
        return "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces)

    async def refused(self, draw: random.Random) -> None:
        """Requests that have to be refused."""
        bad, status = draw.choice([
            ({"model": "nobody", "prompt": "x"}, 404),
            ({"model": "base", "prompt": "x", "timeout": -1}, 400),
            ({"model": "broken", "prompt": "x"}, 400),
            ({"model": "base", "prompt": [10**9]}, 400),
        ])  # fmt: skip
        answer = await self.client.post("/v1/completions", json=bad)
        self.seen[f"refused {answer.status_code}"] += 1
        if answer.status_code not in (status, 429):
            self.wrong.append(f"{bad} gave {answer.status_code}: {answer.text[:200]}")

    async def churn(self) -> None:
        """Adapters that are loaded, used and unloaded all the time."""
        draw, count = random.Random(0), 0
        while time.monotonic() < self.end:
            method, count = draw.choice(METHODS), count + 1
            place = self.root / "more" / f"{method}-{count}"
            shutil.copytree(self.folders[method], place)
            name = place.name
            loaded = await self.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(place)})
            self.expect(loaded, 200)
            prompt = draw.choice(PROMPTS)
            body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
            text = await self.whole(body)
            if text is not None and not right(text, self.wanted[method, prompt]):
                self.wrong.append(f"{name} {prompt!r}: {text!r}")
            self.expect(await self.client.post("/v1/unload_lora_adapter", json={"lora_name": name, "force": True}), 200)
            shutil.rmtree(place)
            self.seen["loaded and unloaded"] += 1
            await asyncio.sleep(draw.random())

    def expect(self, answer: httpx.Response, status: int) -> None:
        """Note a response with another status."""
        if answer.status_code != status:
            self.wrong.append(f"{answer.request.url.path}: {answer.status_code} {answer.text[:200]}")

    def note(self, sizes: list[tuple[float, int]]) -> None:
        """Progress, for whoever waits."""
        left = max(0.0, self.end - time.monotonic()) / 60
        found = {"minutes left": left, "seen": dict(self.seen), "wrong": self.wrong[:20], "resident": sizes[-1][1]}
        print(json.dumps(found), flush=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.with_suffix(".progress.json").write_text(json.dumps(found) + "\n")

    async def run(self, clients: int, process: int) -> list[tuple[float, int]]:
        """Everything at once; returns (time, resident bytes) of the server."""
        sizes: list[tuple[float, int]] = []

        async def watch() -> None:
            while time.monotonic() < self.end:
                sizes.append((time.monotonic(), resident(process)))
                if len(sizes) % 30 == 0:
                    self.note(sizes)
                await asyncio.sleep(1)

        await asyncio.gather(watch(), self.churn(), *(self.ask(number) for number in range(clients)))
        await asyncio.sleep(2)
        metrics = (await self.client.get("/metrics")).text
        await self.client.aclose()
        promised = re.search(r"^surgeon_pool_promised_pages (\S+)", metrics, re.M)
        if promised is None or float(promised[1]):
            self.wrong.append("pages are promised to nobody")
        return sizes


def resident(process: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def plot(watched: list[tuple[float, int]], file: Path) -> None:
    """The server's resident size over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.2))
    axis.plot([(when - watched[0][0]) / 60 for when, _ in watched], [size / 2**20 for _, size in watched])
    axis.set(xlabel="minutes", ylabel="resident, MiB", ylim=(0, None))
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run, print, exit with 1 for any wrong answer, leak or crash."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "serving_soak.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "more").mkdir()
        base, folders = prepare(root)
        wanted = references(base, folders)
        shutil.copytree(folders["lora"], root / "watched" / "broken")
        (root / "watched" / "broken" / "adapter_model.safetensors").write_bytes(b"not safetensors")
        command = [sys.executable, "-m", "surgeon", "serve", str(SMALL), "--name", "base", "--port", str(PORT)]
        command += ["--adapters", str(root / "watched"), "--allow", str(root / "more"), "--pool", "256M"]
        server = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            found = asyncio.run(soak(root, folders, wanted, given, server.pid))
            found["crashed"] = server.poll() is not None
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
    print(json.dumps(found, indent=1))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    given.out.with_suffix(".progress.json").unlink(missing_ok=True)
    sys.exit(bool(found["wrong"] or found["crashed"] or found["grown"] > 1.05))


async def soak(root: Path, folders: Any, wanted: Any, given: Any, process: int) -> dict[str, Any]:
    """Wait for the server, soak it, and sum up."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}") as client:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get("/health")).status_code == 200:
                    break
            await asyncio.sleep(0.2)
    run = Soak(root, folders, wanted, given.minutes * 60, given.out)
    watched = await run.run(given.clients, process)
    plot(watched, given.out.with_suffix(".svg"))
    sizes = [size for _, size in watched]
    third = max(1, len(sizes) // 3)
    middle, last = sorted(sizes[third : 2 * third]), sorted(sizes[-third:])
    return {
        "minutes": given.minutes,
        "clients": given.clients,
        "seen": dict(run.seen),
        "wrong": run.wrong[:20],
        "resident, middle third": middle[len(middle) // 2] if middle else sizes[-1],
        "resident, last third": last[len(last) // 2],
        "grown": last[len(last) // 2] / (middle[len(middle) // 2] if middle else sizes[-1]),
    }


if __name__ == "__main__":
    main()
