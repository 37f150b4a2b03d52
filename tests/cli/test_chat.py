"""`surgeon chat`: turns from standard input, answered as transformers answers them."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surgeon.cli.main import main

TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)
TOKENS = 6


@pytest.fixture(scope="module")
def llama(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared Llama with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "llama"
    shutil.copytree(shared / "models" / "pystdlib-llama", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def says(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def answers(folder: Path, turns: list[str], system: str = "") -> list[str]:
    """What transformers answers, turn by turn, to the likeliest token."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": system}] if system else []
    found = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = given["input_ids"]
        made = model.generate(ids, attention_mask=given["attention_mask"], max_new_tokens=TOKENS, do_sample=False)
        found.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def test_turns_are_answered_and_remembered(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = "import os", "def main():"
    says(monkeypatch, first, "", second, "/reset", second, "/exit", "never read")
    options = ["--tokens", str(TOKENS), "--temperature", "0", "--system", "Python"]
    assert main(["chat", str(llama), *options]) == 0
    printed = capsys.readouterr()
    remembered, alone = answers(llama, [first, second], "Python"), answers(llama, [second], "Python")
    assert printed.out == "".join(f"{answer}\n" for answer in (*remembered, *alone))
    assert "/exit ends" in printed.err
    assert remembered[1] != alone[0]


def test_the_end_of_input_ends_the_chat(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(monkeypatch)
    assert main(["chat", str(llama)]) == 0
    assert capsys.readouterr().out == ""


def test_a_seed_repeats_a_sampled_answer(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for seed in ("1", "1", "2"):
        says(monkeypatch, "import os", "/quit")
        assert main(["chat", str(llama), "--tokens", "12", "--temperature", "2", "--seed", seed]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_a_refused_conversation_is_three_lines(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = Path(shutil.copytree(llama, tmp_path / "strict"))
    (strict / "chat_template.jinja").write_text("{{ raise_exception('no system message here') }}")
    says(monkeypatch, "hello")
    assert main(["chat", str(strict), "--system", "x"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "/exit ends" not in line]
    assert lines[-3].endswith("the chat template refuses the conversation: no system message here")
    assert len(lines) == 3


def test_without_a_template_it_says_what_to_use(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(shared / "models" / "pystdlib-llama")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0] == "the tokenizer has no chat template"
    assert "surgeon generate" in lines[2]
