"""The Ray Serve application: what it is told, what it hands on, and a local Ray that brings adapters to replicas."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
from ray import serve

from benchmarks.zoo.graphs import randomised
from surgeon import api, module, run, store
from surgeon.chat import complete
from surgeon.errors import UsageError
from surgeon.passes import make
from surgeon.serve.on_ray import Settings, _model, answered, application


def test_settings_come_from_texts() -> None:
    found = Settings.parse({"base": "a/model/", "replicas": "3", "cpus": "0.5", "adapters": "x,y"})
    assert (found.replicas, found.cpus, found.title) == (3, 0.5, "model")
    for given, told in (
        ({}, "no base model is named"),
        ({"base": "x", "replica": "3"}, "there is no setting 'replica'"),
        ({"base": "x", "replicas": "many"}, "replicas is 'many'"),
    ):
        with pytest.raises(UsageError, match=told):
            application(given)


def test_the_model_of_a_request() -> None:
    assert _model(b'{"model": "poet", "prompt": "x"}') == "poet"
    assert [_model(body) for body in (b"", b"{", b"[1]", b'{"model": 3}', b'{"model": "%s"}' % (b"x" * 999))] == [
        ""
    ] * 5


def test_a_request_that_is_left_is_told_so() -> None:
    heard = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.append((scope["path"], (await receive())["body"]))
        await send({"type": "http.response.start", "status": 201, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        heard.append((await receive())["type"])

    async def leave() -> list[Any]:
        stream = answered(app, "POST", "/v1/x", [], b"body")
        found = [await anext(stream), await anext(stream)]
        await stream.aclose()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return found

    assert asyncio.run(leave()) == [(201, [(b"a", b"b")]), b"first"]
    assert heard == [("/v1/x", b"body"), "http.disconnect"]


@pytest.fixture
def client(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[openai.OpenAI, Path]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = api.read(shared / "models" / "pystdlib-llama", "causal-lm")
    for number in range(4):
        graph = randomised(run.apply(base, make("lora", rank=2 + number)), seed=number, std=0.05)
        store.save(graph, tmp_path / "adapters" / f"a{number}")
    # Ray gives its agents seconds to start and its workers the lowest priority: on a busy machine they never do.
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "300000")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    # A request goes to any replica when the one that has its adapter has not answered for this long.
    monkeypatch.setenv("RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S", "60")
    ray.init(num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    given = {"base": base.source, "name": "base", "adapters": str(tmp_path / "adapters"), "pool": str(32 << 20)}
    serve.run(application({**given, "replicas": "2", "cpus": "0.5", "keys": "k"}), route_prefix="/")
    try:
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0), tmp_path / "adapters"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_local_ray_serves_openais_api(client: tuple[openai.OpenAI, Path], shared: Path) -> None:
    llama = shared / "models" / "pystdlib-llama"
    tokenizer, prompt, places = api.tokenizer_of(llama), "import os\n", set[str]()
    graphs = {"base": api.read(llama, "causal-lm")} | {p.name: store.load(p) for p in sorted(client[1].iterdir())}
    for name, graph in graphs.items():
        wanted = complete(module.load(graph), tokenizer, [prompt], max_new_tokens=6, do_sample=False)[0]
        seen = set()
        for stream in (False, True, False):
            ask = client[0].completions.with_raw_response.create
            answer = ask(model=name, prompt=prompt, max_tokens=6, temperature=0, stream=stream)
            seen.add(answer.headers["x-surgeon-replica"])
            parsed: Any = answer.parse()
            text = "".join(c.choices[0].text for c in parsed) if stream else parsed.choices[0].text
            assert text == wanted
        if name != "base":
            assert len(seen) == 1
            places |= seen
    assert {model.id for model in client[0].models.list()} == set(graphs)
    with pytest.raises(openai.NotFoundError, match="no model or adapter is called 'nobody'"):
        client[0].completions.create(model="nobody", prompt=prompt)
    with pytest.raises(openai.AuthenticationError):
        client[0].with_options(api_key="wrong").completions.create(model="base", prompt=prompt)
    with pytest.raises(openai.BadRequestError, match="has the adapters of its folders"):
        client[0].post("/load_lora_adapter", body={"lora_name": "x", "lora_path": "y"}, cast_to=object)
    assert places
