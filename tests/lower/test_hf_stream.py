"""The streamed checkpoint: right bits where it changes, the base's bytes elsewhere, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from surgeon.checkpoint import INDEX, SINGLE, Checkpoint
from surgeon.errors import CheckFailed, SurgeonError, UnsupportedError, UsageError
from surgeon.lower import stream
from surgeon.lower.hf import Derived, WholeDelta, write_merged

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Q, HEAD, EMBED = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight"


def base(folder: Path, dtype: torch.dtype = torch.bfloat16, shards: bool = True, tied: bool = False) -> Checkpoint:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="24KB" if shards else "1GB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("hello")
    (folder / "README.md").write_text("the base's card")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return Checkpoint.open(folder)


def low_rank(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], 4, generator=generator) @ torch.randn(4, shape[1], generator=generator) / 8


def adds(delta: torch.Tensor) -> Callable[[torch.Tensor, slice], torch.Tensor]:
    return lambda weight, rows: weight.add_(delta[rows])


def stored_bytes(checkpoint: Checkpoint, name: str) -> bytes:
    info = checkpoint.info(name)
    return info.file.read_bytes()[info.start : info.stop]


@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_changed_tensors_have_the_reference_bits_and_the_others_their_bytes(
    tmp_path: Path, dtype: torch.dtype, shards: bool
) -> None:
    checkpoint = base(tmp_path / "base", dtype, shards)
    names = [name for name in checkpoint.tensors if "_proj" in name]
    deltas = {name: low_rank(checkpoint.info(name).shape) for name in names}
    report = write_merged(checkpoint, {name: adds(delta) for name, delta in deltas.items()}, tmp_path / "out")
    merged = Checkpoint.open(tmp_path / "out")
    assert list(merged.tensors) == list(checkpoint.tensors)
    for name in merged.tensors:
        if name in deltas:
            assert torch.equal(merged.read(name), (checkpoint.read(name).float() + deltas[name]).to(dtype))
        else:
            assert stored_bytes(merged, name) == stored_bytes(checkpoint, name)
        assert merged.info(name).file.name == checkpoint.info(name).file.name
    assert set(report.merged) == set(names)
    assert report.copied_bytes + report.merged_bytes == checkpoint.nbytes
    assert (len(report.files) > 1) == shards


@pytest.mark.parametrize("shards", [True, False])
def test_from_pretrained_loads_it(tmp_path: Path, shards: bool) -> None:
    checkpoint = base(tmp_path / "base", shards=shards)
    delta = low_rank((32, 32))
    write_merged(checkpoint, {Q: adds(delta)}, tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    before[Q] = (before[Q].float() + delta).bfloat16()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_row_blocks_and_whole_tensors_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = base(tmp_path / "base")
    delta, seen = low_rank((32, 32)), []

    def by_rows(weight: torch.Tensor, rows: slice) -> torch.Tensor:
        seen.append((rows.start, rows.stop, tuple(weight.shape)))
        return weight + delta[rows]

    write_merged(checkpoint, {Q: by_rows}, tmp_path / "one")
    monkeypatch.setattr(stream, "BLOCK_BYTES", 7 * 32 * 4)
    write_merged(checkpoint, {Q: by_rows}, tmp_path / "rows")
    write_merged(checkpoint, {Q: WholeDelta(lambda weight: weight + delta)}, tmp_path / "whole")
    assert seen[0] == (0, 32, (32, 32))
    assert [rows[:2] for rows in seen[1:]] == [(0, 7), (7, 14), (14, 21), (21, 28), (28, 32)]
    one, rows, whole = (Checkpoint.open(tmp_path / name) for name in ("one", "rows", "whole"))
    for name in one.tensors:
        assert stored_bytes(one, name) == stored_bytes(rows, name) == stored_bytes(whole, name)


def test_copy_without_help_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = base(tmp_path / "base")

    def refuse(*args: Any, **options: Any) -> int:
        raise OSError(errno.EXDEV, "another filesystem")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(stream, "BLOCK_BYTES", 4000)
    write_merged(checkpoint, {}, tmp_path / "out")
    merged = Checkpoint.open(tmp_path / "out")
    assert all(stored_bytes(merged, name) == stored_bytes(checkpoint, name) for name in merged.tensors)


def test_auxiliary_files_and_index_are_the_bases(tmp_path: Path) -> None:
    checkpoint = base(tmp_path / "base")
    write_merged(checkpoint, {Q: adds(low_rank((32, 32)))}, tmp_path / "out")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", INDEX):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert not (tmp_path / "out/pytorch_model.bin").exists()
    assert not (tmp_path / "out/README.md").exists()


@pytest.mark.parametrize("shards", [True, False])
def test_an_untied_head_is_added_in_a_file_of_its_own(tmp_path: Path, shards: bool) -> None:
    checkpoint = base(tmp_path / "base", shards=shards, tied=True)
    assert HEAD not in checkpoint.tensors
    delta = low_rank((96, 32))
    extra = {HEAD: Derived(EMBED, adds(delta))}
    update = {"tie_word_embeddings": False, "rope_parameters": {"rope_theta": 2e4}}
    report = write_merged(checkpoint, {}, tmp_path / "out", extra_tensors=extra, config_update=update)
    merged = Checkpoint.open(tmp_path / "out")
    assert merged.info(HEAD).file.name == report.files[-1]
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"] == merged.nbytes
    assert merged.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 2e4}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, (checkpoint.read(EMBED).float() + delta).bfloat16())
    assert torch.equal(model.model.embed_tokens.weight, checkpoint.read(EMBED))


def test_replaced_and_dropped_tensors(tmp_path: Path) -> None:
    checkpoint = base(tmp_path / "base", shards=False)
    grown = torch.ones(100, 32)
    write_merged(checkpoint, {}, tmp_path / "out", extra_tensors={EMBED: grown}, drop=[HEAD])
    merged = Checkpoint.open(tmp_path / "out")
    assert torch.equal(merged.read(EMBED), grown)
    assert HEAD not in merged.tensors
    assert len(merged.tensors) == len(checkpoint.tensors) - 1


def test_another_dtype(tmp_path: Path) -> None:
    checkpoint = base(tmp_path / "base", torch.float32)
    delta = low_rank((32, 32))
    write_merged(checkpoint, {Q: adds(delta)}, tmp_path / "out", dtype=torch.bfloat16)
    merged = Checkpoint.open(tmp_path / "out")
    assert torch.equal(merged.read(Q), (checkpoint.read(Q) + delta).bfloat16())
    assert torch.equal(merged.read(EMBED), checkpoint.read(EMBED).bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    checkpoint, calls = base(tmp_path / "base"), []
    write_merged(checkpoint, {}, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert len(calls) == len(checkpoint.tensors)
    assert calls[-1][1] == calls[-1][2] == checkpoint.nbytes


def nothing_written(tmp_path: Path) -> bool:
    return {entry.name for entry in tmp_path.iterdir()} == {"base"}


def zero(weight: torch.Tensor, rows: slice) -> torch.Tensor:
    return weight.zero_()


def test_wrong_requests_write_nothing(tmp_path: Path) -> None:
    checkpoint = base(tmp_path / "base")
    with pytest.raises(UsageError, match="no tensor") as caught:
        write_merged(checkpoint, {Q.removesuffix(".weight"): zero}, tmp_path / "out")
    assert Q in caught.value.hint
    with pytest.raises(UsageError, match="also left out"):
        write_merged(checkpoint, {Q: zero}, tmp_path / "out", drop=[Q])
    with pytest.raises(UsageError, match="the base itself"):
        write_merged(checkpoint, {}, tmp_path / "base", overwrite=True)
    with pytest.raises(UsageError, match="another base"):
        write_merged(checkpoint, {Q: lambda weight, rows: weight[:, :3]}, tmp_path / "out")
    assert nothing_written(tmp_path)


def test_codes_are_not_changed(tmp_path: Path) -> None:
    checkpoint = base(tmp_path / "base")
    coded = {"codes": torch.ones(3, dtype=torch.uint8)}
    write_merged(checkpoint, {}, tmp_path / "coded", extra_tensors=coded)
    with pytest.raises(UnsupportedError, match="uint8"):
        write_merged(Checkpoint.open(tmp_path / "coded"), {"codes": zero}, tmp_path / "out")


@pytest.mark.parametrize(("value", "message"), [(1e5, "overflow torch.float16"), (float("nan"), "not finite")])
def test_values_that_are_not_finite_write_nothing(tmp_path: Path, value: float, message: str) -> None:
    checkpoint = base(tmp_path / "base", torch.float16)
    with pytest.raises(CheckFailed, match=message):
        write_merged(checkpoint, {Q: lambda weight, rows: weight + value}, tmp_path / "out")
    assert nothing_written(tmp_path)


def test_a_failed_check_writes_nothing_and_keeps_the_old_folder(tmp_path: Path) -> None:
    checkpoint = base(tmp_path / "base")

    def check(folder: Path) -> None:
        assert Checkpoint.open(folder).nbytes == checkpoint.nbytes
        raise CheckFailed("tokens differ")

    with pytest.raises(CheckFailed, match="tokens differ"):
        write_merged(checkpoint, {Q: zero}, tmp_path / "out", check=check)
    assert nothing_written(tmp_path)
    write_merged(checkpoint, {}, tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        write_merged(checkpoint, {Q: zero}, tmp_path / "out")
    with pytest.raises(CheckFailed):
        write_merged(checkpoint, {Q: zero}, tmp_path / "out", check=check, overwrite=True)
    assert stored_bytes(Checkpoint.open(tmp_path / "out"), Q) == stored_bytes(checkpoint, Q)


def test_a_base_cut_short_while_it_is_read(tmp_path: Path) -> None:
    checkpoint = base(tmp_path / "base", shards=False)
    os.truncate(tmp_path / "base" / SINGLE, 2000)
    for deltas in ({}, dict.fromkeys(checkpoint.tensors, zero)):
        with pytest.raises(UsageError, match="the file ended inside"):
            write_merged(checkpoint, deltas, tmp_path / "out")
    assert nothing_written(tmp_path)


CHILD = """
import os, signal, sys
from surgeon.checkpoint import Checkpoint
from surgeon.lower.hf import write_merged
def kill(name, done, total):
    if sys.argv[3] == "kill" and done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
write_merged(Checkpoint.open(sys.argv[1]), {sys.argv[4]: lambda w, r: w.zero_()}, sys.argv[2],
             progress=kill, overwrite=True)
"""


def merge_in_child(tmp_path: Path, how: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def lower_the_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-c", CHILD, str(tmp_path / "base"), str(tmp_path / "out"), how, Q]
    return subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=lower_the_limit)


def test_kill_in_the_middle_leaves_nothing_or_the_old_folder(tmp_path: Path) -> None:
    checkpoint = base(tmp_path / "base")
    assert merge_in_child(tmp_path, "kill").returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    write_merged(checkpoint, {}, tmp_path / "out")
    assert merge_in_child(tmp_path, "kill").returncode == -signal.SIGKILL
    assert stored_bytes(Checkpoint.open(tmp_path / "out"), Q) == stored_bytes(checkpoint, Q)
    assert merge_in_child(tmp_path, "finish").returncode == 0
    assert not Checkpoint.open(tmp_path / "out").read(Q).any()
    assert {entry.name for entry in tmp_path.iterdir()} == {"base", "out"}


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = base(tmp_path / "base")
    write, room = os.write, [30_000]

    def limited(handle: int, data: Any) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    monkeypatch.setattr(os, "write", limited)
    with pytest.raises(SurgeonError, match="the disk is full") as caught:
        write_merged(checkpoint, dict.fromkeys(checkpoint.tensors, zero), tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 3
    assert nothing_written(tmp_path)


def test_the_system_refuses_a_large_file(tmp_path: Path) -> None:
    base(tmp_path / "base", shards=False)
    child = merge_in_child(tmp_path, "finish", limit=20_000)
    assert child.returncode == 1
    assert "the disk is full" in child.stderr
    assert nothing_written(tmp_path)
