"""Checkpoints are checked from their headers; everything broken is an error of three lines."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgeon.checkpoint import INDEX, SINGLE, Checkpoint
from surgeon.errors import UnsupportedError, UsageError
from surgeon.safetensors_file import DTYPES, header_bytes


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(5, 3), "b": torch.randn(7).bfloat16(), "c": torch.randn(4, 2).half(), "s": torch.tensor(3)}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    save_file(tensors(), tmp_path / SINGLE, metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    every, files = tensors(), {"x-1.safetensors": ("a", "b"), "x-2.safetensors": ("c", "s")}
    for file, names in files.items():
        save_file({name: every[name] for name in names}, tmp_path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 94}, "weight_map": weight_map}))
    return tmp_path


def edit_header(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def refused(folder: Path, message: str, kind: type[UsageError | UnsupportedError] = UsageError) -> None:
    with pytest.raises(kind, match=message) as caught:
        Checkpoint.open(folder)
    assert len(str(caught.value).splitlines()) == 3
    assert str(folder) in caught.value.where


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_equal_what_was_saved(layout: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint.open(request.getfixturevalue(layout))
    assert set(checkpoint.tensors) == set(tensors())
    for name, value in tensors().items():
        read = checkpoint.read(name)
        assert read.dtype == value.dtype
        assert torch.equal(read, value)
        checkpoint.release()
        assert torch.equal(read, value)
    assert checkpoint.nbytes == 5 * 3 * 4 + 7 * 2 + 8 * 2 + 8
    starts = [info.start for info in checkpoint.tensors.values() if info.file.name in (SINGLE, "x-1.safetensors")]
    assert starts == sorted(starts)


def test_a_write_to_a_read_tensor_does_not_reach_the_file(single: Path) -> None:
    Checkpoint.open(single).read("a").zero_()
    assert torch.equal(Checkpoint.open(single).read("a"), tensors()["a"])


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "F8_E8M0"])
def test_every_dtype_and_empty_tensors_round_trip(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    value = torch.arange(6).reshape(2, 3).to(DTYPES[name])
    save_file({"x": value, "none": value[:0].clone()}, tmp_path / SINGLE)
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.read("x").view(torch.uint8), value.view(torch.uint8))
    assert checkpoint.read("none").shape == (0, 3)
    assert checkpoint.info("x").dtype == value.dtype


def test_an_unaligned_tensor_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    byte, word = torch.tensor([7], dtype=torch.uint8), torch.tensor([1.5, -2.0])
    header = header_bytes([("byte", byte.dtype, (1,)), ("word", word.dtype, (2,))])
    (tmp_path / SINGLE).write_bytes(header + b"\x07" + word.numpy().tobytes())
    assert torch.equal(Checkpoint.open(tmp_path).read("word"), word)


def test_a_folder_with_config_only(single: Path) -> None:
    (single / SINGLE).unlink()
    assert Checkpoint.open(single, weights=False).config["hidden_size"] == 8
    refused(single, "no weights")


def test_no_folder_no_config_broken_config(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text('{"model_type": ')
    refused(tmp_path, "not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "not a JSON object")


def test_an_adapter_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        Checkpoint.open(tmp_path)
    assert "adapter" in caught.value.hint


def test_a_pickle_is_refused_and_never_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(tmp_path, "pickle")


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated(single: Path, keep: int) -> None:
    file = single / SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    refused(single, "truncated")


def test_trailing_bytes(single: Path) -> None:
    with (single / SINGLE).open("ab") as stream:
        stream.write(b"more")
    refused(single, "4 bytes beyond")


def test_corrupt_header(single: Path) -> None:
    file = single / SINGLE
    data = bytearray(file.read_bytes())
    data[9] = 0xFF
    file.write_bytes(data)
    refused(single, "not JSON")
    file.write_bytes(struct.pack("<Q", 2) + b"[]")
    refused(single, "not a table")


def shift(header: dict[str, Any], by: int) -> None:
    second = sorted((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])[1]
    second["data_offsets"] = [position + by for position in second["data_offsets"]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: shift(h, -4), "overlaps"),
        (lambda h: shift(h, 4), "hole"),
        (lambda h: h["a"].update(shape=[5, 4]), "a is F32"),
        (lambda h: h["a"].update(shape=[-5, -3]), "a is F32"),
        (lambda h: h["a"].pop("dtype"), "the entry of a"),
        (lambda h: h["a"].update(data_offsets=[1]), "the entry of a"),
        (lambda h: h.update(a=3), "the entry of a"),
        (lambda h: h.update(__metadata__=3), "metadata"),
    ],
)
def test_broken_entries(single: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    edit_header(single / SINGLE, edit)
    refused(single, message)


def test_unknown_dtype(single: Path) -> None:
    edit_header(single / SINGLE, lambda h: h["a"].update(dtype="F6_E2M3"))
    refused(single, "F6_E2M3", UnsupportedError)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "x-2.safetensors").unlink()
    refused(sharded, "missing file: x-2.safetensors")


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda i: i["weight_map"].update(ghost="x-1.safetensors"), "says ghost is in"),
        (lambda i: i["weight_map"].update(a="x-2.safetensors"), "says a is in"),
        (lambda i: i["weight_map"].pop("b"), "holds b, which the index does not name"),
        (lambda i: i["weight_map"].update(a="../x-1.safetensors"), "outside the folder"),
        (lambda i: i.pop("weight_map"), "no weight_map"),
    ],
)
def test_index_and_shards_disagree(sharded: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    edit_index(sharded, edit)
    refused(sharded, message)


def test_unknown_tensor_suggests_a_name(single: Path) -> None:
    with pytest.raises(UsageError, match="no tensor aa") as caught:
        Checkpoint.open(single).read("aa")
    assert "a" in caught.value.hint


def fingerprint(folder: Path, values: dict[str, torch.Tensor], config: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    save_file(values, folder / SINGLE)
    return Checkpoint.open(folder).fingerprint()


def test_fingerprint_tells_bases_apart(tmp_path: Path, sharded: Path) -> None:
    config = '{"model_type": "llama", "hidden_size": 8}'
    base = Checkpoint.open(sharded).fingerprint()
    # The same tensors in one file, and a config that differs only in where it came from, are the same base.
    moved = config[:-1] + ', "_name_or_path": "elsewhere", "dtype": "bfloat16"}'
    assert fingerprint(tmp_path / "moved", tensors(), moved) == base
    assert fingerprint(tmp_path / "config", tensors(), config.replace("8", "9")) != base
    assert fingerprint(tmp_path / "dtype", {**tensors(), "a": tensors()["a"].half()}, config) != base
    assert fingerprint(tmp_path / "shape", {**tensors(), "a": tensors()["a"].T.contiguous()}, config) != base
    assert fingerprint(tmp_path / "tuned", {**tensors(), "a": tensors()["a"] * 1.01}, config) != base
    assert fingerprint(tmp_path / "more", {**tensors(), "d": torch.ones(1)}, config) != base
