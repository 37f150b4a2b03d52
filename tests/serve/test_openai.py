"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator

import openai
import pytest

from tests.serve.conftest import KEY, METHODS, Running

PROMPT = "def read(self, path):\n"


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, timeout=120) as made:
        yield made


def test_mixed_adapters_say_what_their_own_folders_say(running: Running, client: openai.OpenAI) -> None:
    names = ["llama", *METHODS] * 2

    def ask(name: str) -> str:
        answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=10, temperature=0)
        return answer.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(ask, names), strict=True))
    for name in dict.fromkeys(names):
        assert found[name] == running.expected(name, PROMPT, 10), name
    assert len(set(found.values())) > 3


def test_models_have_parents(client: openai.OpenAI) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert set(models) == {"llama", *METHODS}
    assert models["llama"]["parent"] is None
    assert {models[name]["parent"] for name in METHODS} == {"llama"}
    assert client.models.retrieve("vera").id == "vera"


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    asked = {"model": "lora", "prompt": PROMPT, "max_tokens": 12, "temperature": 0.8, "seed": 7, "logprobs": 2}
    whole = client.completions.create(**asked)  # type: ignore[call-overload]
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    text = "".join(piece.choices[0].text for piece in pieces if piece.choices)
    assert text == whole.choices[0].text
    assert pieces[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 12
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 12
    assert all(
        len(top) <= 2 and value <= 0 for top, value in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
    )
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == whole.choices[0].finish_reason == "length"


def test_chat_and_its_logprobs(running: Running, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="dora", messages=[{"role": "user", "content": "read a file"}], max_tokens=8, temperature=0,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.message.content == running.expected("dora", "# user: read a file\ndef ", 8)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [3] * 8
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in choice.logprobs.content)
    chunks = list(client.chat.completions.create(
        model="dora", messages=[{"role": "user", "content": "read a file"}], max_tokens=8, temperature=0, stream=True,
    ))  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant"


def test_stop_strings_seeds_and_several_answers(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="llama", prompt=PROMPT, max_tokens=24, temperature=0).choices[0].text
    stop = whole[10:13]
    greedy = {"model": "llama", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    cut = client.completions.create(**greedy, stop=[stop])  # type: ignore[call-overload]
    assert cut.choices[0].text == whole[: whole.find(stop)]
    assert cut.choices[0].finish_reason == "stop"
    stream = client.completions.create(
        model="llama", prompt=PROMPT, max_tokens=24, temperature=0, stop=stop, stream=True
    )
    assert "".join(piece.choices[0].text for piece in stream) == cut.choices[0].text
    asked = {"model": "vera", "prompt": [PROMPT, "import "], "max_tokens": 6, "n": 2, "temperature": 1.5, "seed": 3}
    one, two = (client.completions.create(**asked) for _ in range(2))  # type: ignore[call-overload]
    assert [choice.text for choice in one.choices] == [choice.text for choice in two.choices]
    assert [choice.index for choice in one.choices] == [0, 1, 2, 3]
    assert one.choices[0].text != one.choices[1].text


def test_a_client_that_leaves_frees_the_memory(running: Running, client: openai.OpenAI) -> None:
    asked = {"model": "prefix", "prompt": PROMPT, "max_tokens": 1500, "temperature": 0}
    more = {"extra_body": {"ignore_eos": True}}
    stream = client.completions.create(**asked, **more, stream=True)  # type: ignore[call-overload]
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(max_retries=0).completions.create(**asked, **more, timeout=1.0)  # type: ignore[call-overload]
    service = running.server.service
    deadline = time.monotonic() + 60
    while service.do(lambda: service.scheduler.running) or service.scheduler.waiting:
        assert time.monotonic() < deadline
    memory = service.engine.memory
    assert memory.promised == 0
    assert memory.pool.free + sum(len(found.pages) for found in memory.residents.values()) == memory.pool.pages
