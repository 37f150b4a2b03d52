"""Whatever comes in, the right status and an error that says what to do, and the rest is served on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch

from benchmarks.zoo.graphs import randomised
from surgeon import run, store
from surgeon.passes import make
from surgeon.serve.request import Request
from surgeon.serve.sampling import Sampling
from tests.serve.conftest import KEY, Running

GOOD = {"model": "lora", "prompt": "import ", "max_tokens": 2, "temperature": 0}
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown model": ({"model": "lora2"}, 404, "no model or adapter is called 'lora2'"),
    "path as a model": ({"model": "../../etc"}, 404, "GET /v1/models lists them"),
    "unknown field": ({"best": 1}, 400, "no such parameter (best)"),
    "temperature": ({"temperature": -1}, 400, "greater than or equal to 0 (temperature)"),
    "empty prompt": ({"prompt": []}, 400, "there is no prompt"),
    "prompt without tokens": ({"prompt": ""}, 400, "no token"),
    "token id": ({"prompt": [5, 10**6]}, 400, "ids from 0 to 4095"),
    "long prompt": ({"prompt": [5] * 500}, 400, "the prompt has 500 tokens, and this server takes 400"),
    "long answer": ({"max_tokens": 4000}, 400, "the model has 2048 positions"),
    "past deadline": ({"timeout": -1}, 400, "the deadline of the request has passed"),
    "logit bias": ({"logit_bias": {"x": 1}}, 400, "logit_bias names 'x'"),
    "no number": ({"max_tokens": "many"}, 400, "valid integer"),
}


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as made:
        yield made


@pytest.fixture(autouse=True)
def serves_on(client: httpx.Client) -> Iterator[None]:
    yield
    answer = client.post("/v1/completions", json=GOOD)
    assert answer.status_code == 200, answer.text
    assert client.get("/health").json()["status"] == "ok"


def told(answer: httpx.Response, status: int) -> str:
    """The message of an error in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message: str = error["message"]
    return message


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request(client: httpx.Client, what: str) -> None:
    change, status, message = BAD[what]
    assert message in told(client.post("/v1/completions", json={**GOOD, **change}), status)


def test_bodies_and_keys(client: httpx.Client, running: Running) -> None:
    assert "not valid JSON" in told(client.post("/v1/completions", content=b'{"model":'), 400)
    assert "more than 65536 bytes" in told(client.post("/v1/completions", json={**GOOD, "prompt": "x" * 70000}), 413)

    def chunks() -> Iterator[bytes]:
        yield from [b" " * 1000] * 100

    assert "more than 65536 bytes" in told(client.post("/v1/completions", content=chunks()), 413)
    assert "API key" in told(httpx.post(f"{running.url}/v1/completions", json=GOOD), 401)
    assert "API key" in told(client.get("/v1/models", headers={"Authorization": "Bearer wrong"}), 401)
    assert httpx.get(f"{running.url}/health").status_code == 200
    assert told(client.get("/v1/nothing"), 404)
    assert told(client.get("/v1/completions"), 405)
    chat = {"model": "llama", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    assert "part of type 'image_url'" in told(client.post("/v1/chat/completions", json=chat), 400)


def load(client: httpx.Client, name: str, path: Path | str, **more: Any) -> httpx.Response:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


def test_loading_what_is_no_adapter(client: httpx.Client, running: Running, tmp_path: Path) -> None:
    root = running.root / ".given"  # the watched folder does not take names with a dot in front
    root.mkdir(exist_ok=True)
    assert "adapters are not loaded from there" in told(load(client, "x", tmp_path), 403)
    assert "adapters are not loaded from there" in told(load(client, "x", f"{root}/../../{tmp_path.name}"), 403)
    (running.root / ".given" / "link").unlink(missing_ok=True)
    (running.root / ".given" / "link").symlink_to(tmp_path)
    assert "adapters are not loaded from there" in told(load(client, "x", root / "link"), 403)
    assert "cannot be the name" in told(load(client, "../x", running.folders["lora"]), 400)
    assert "base model's name" in told(load(client, "llama", running.folders["lora"]), 400)
    assert "no such folder" in told(load(client, "x", root / "nothing"), 404)
    shutil.copytree(running.folders["lora"], root / "copy", dirs_exist_ok=True)
    assert "loaded already" in told(load(client, "lora", root / "copy"), 409)
    assert "no model or adapter" in told(client.post("/v1/unload_lora_adapter", json={"lora_name": "x"}), 404)


def test_adapters_that_do_not_fit_are_refused(client: httpx.Client, running: Running, monkeypatch: Any) -> None:
    root = running.root / ".bad"
    shutil.rmtree(root, ignore_errors=True)
    peft = root / "peft"
    store.save(randomised(run.apply(running.base, make("lora", rank=2))), peft)
    (peft / "surgery.json").unlink()

    def changed(name: str, change: Any) -> Path:
        shutil.copytree(peft, root / name)
        change(root / name)
        return root / name

    def pickled(folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")

    def cut(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    def configured(**fields: Any) -> Any:
        def change(folder: Path) -> None:
            file = folder / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

        return change

    wrong = {
        "pickle": (pickled, "never loaded"),
        "cut": (cut, "adapter_model.safetensors"),
        "more": (configured(target_modules=["q_proj", "k_proj", "v_proj"]), "missing adapter keys"),
        "less": (configured(target_modules=["q_proj"]), "unexpected adapter keys"),
        "other": (configured(target_modules=["query_key_value"]), "query_key_value"),
        "rank": (configured(r=4), "its place in the base is [4, 256]"),
        "task": (configured(task_type="SEQ_CLS"), "the adapter is for SEQ_CLS"),
    }
    for name, (change, message) in wrong.items():
        assert message in told(load(client, name, changed(name, change)), 400), name
        told(client.post("/v1/completions", json={**GOOD, "model": name}), 404)
    monkeypatch.setattr(running.server.registry, "page_limit", 6)
    assert "its rank is too high" in told(load(client, "large", peft), 400)


def test_an_adapter_for_another_base_is_refused(client: httpx.Client, running: Running, tmp_path: Path) -> None:
    root = running.root / ".foreign"
    shutil.rmtree(root, ignore_errors=True)
    work = root / "work"
    shutil.copytree(running.folders["lora"], work)
    record = json.loads((work / "surgery.json").read_text())
    record["base"] |= {"fingerprint": "0" * len(record["base"]["fingerprint"]), "path": "models/other"}
    (work / "surgery.json").write_text(json.dumps(record))
    answer = load(client, "foreign", work)
    message = told(answer, 400)
    assert "the adapter was made for another base (fingerprint)" in message
    assert "serve models/other for it" in message
    assert answer.json()["error"]["type"] == "invalid_request_error"

    other = tmp_path / "other"  # the base that PEFT's folder names lies here, with the same shapes and other values
    shutil.copytree(running.base.source, other)
    weights = safetensors.torch.load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    safetensors.torch.save_file(weights, other / "model.safetensors")
    peft = root / "peft"
    shutil.copytree(running.folders["lora"], peft)
    (peft / "surgery.json").unlink()
    config = json.loads((peft / "adapter_config.json").read_text())
    (peft / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    assert f"serve {other} for it" in told(load(client, "foreign", peft), 400)
    told(client.post("/v1/completions", json={**GOOD, "model": "foreign"}), 404)


def test_load_use_and_unload(client: httpx.Client, running: Running) -> None:
    path = running.folders["dylora"]
    for rank in (1, 3):
        assert load(client, f"dylora@{rank}", path, rank=rank).status_code == 200
    assert "has no rank 9" in told(load(client, "dylora9", path, rank=9), 400)
    asked = [{**GOOD, "model": f"dylora@{rank}", "max_tokens": 12} for rank in (1, 3)]
    texts = [client.post("/v1/completions", json=body).json()["choices"][0]["text"] for body in asked]
    assert texts[0] != texts[1]
    service = running.server.service
    packed = running.server.registry.get("dylora@1")
    slow = Request("dylora@1", packed, [5, 6], 1500, Sampling(temperature=0), lambda event: None)
    service.submit(slow)
    unload = {"lora_name": "dylora@1"}
    answer = client.post("/v1/unload_lora_adapter", json=unload)
    assert "1 requests use 'dylora@1'" in told(answer, 409)
    assert answer.headers["x-should-retry"] == "false"
    assert client.post("/v1/unload_lora_adapter", json={**unload, "force": True}).status_code == 200
    assert "no model or adapter" in told(client.post("/v1/completions", json={**GOOD, "model": "dylora@1"}), 404)
    service.cancel(slow)
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "dylora@3"}).status_code == 200


def test_a_watched_folder_comes_and_goes(client: httpx.Client, running: Running) -> None:
    server, place = running.server, running.root / "late"
    shutil.copytree(running.folders["vera"], place)
    server.scan()
    answer = client.post("/v1/completions", json={**GOOD, "model": "late"})
    assert answer.status_code == 200, answer.text
    shutil.rmtree(place)
    server.scan()
    assert "no model or adapter" in told(client.post("/v1/completions", json={**GOOD, "model": "late"}), 404)


def test_a_full_queue_and_a_deadline(client: httpx.Client, running: Running) -> None:
    service = running.server.service
    limit = service.scheduler.limits
    count = limit.running + limit.queue
    most = [Request("", None, [5], 400, Sampling(temperature=0), lambda event: None) for _ in range(count)]
    for request in most:
        service.submit(request)
    service.do(lambda: None)
    answer = client.post("/v1/completions", json=GOOD)
    assert "requests are waiting already" in told(answer, 429)
    assert answer.headers["Retry-After"] == "1"
    for request in most:
        service.cancel(request)
    service.do(lambda: None)
    late = client.post("/v1/completions", json={**GOOD, "max_tokens": 1500, "timeout": 0.3, "ignore_eos": True})
    assert "deadline passed" in told(late, 504)


def test_metrics_count_by_adapter(client: httpx.Client, running: Running) -> None:
    client.post("/v1/completions", json=GOOD)
    text = client.get("/metrics").text
    assert 'surgeon_generated_tokens_total{adapter="lora"}' in text
    assert "surgeon_pool_free_pages" in text
    assert 'surgeon_first_token_seconds_bucket{le="+Inf"}' in text


def test_a_failing_step_fails_its_requests_alone(client: httpx.Client, running: Running, monkeypatch: Any) -> None:
    engine = running.server.service.engine

    def broken(pieces: Any) -> Any:
        monkeypatch.undo()
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(engine, "step", broken)
    assert "no memory left" in told(client.post("/v1/completions", json=GOOD), 500)
    assert client.post("/v1/completions", json=GOOD).status_code == 200, "on the same connection"
    assert engine.memory.promised == 0
