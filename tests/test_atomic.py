"""A folder or file appears whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from surgeon import atomic
from surgeon.atomic import atomic_file, atomic_folder
from surgeon.errors import SurgeonError, UsageError


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def write(folder: Path, text: str) -> Path:
    with atomic_folder(folder, overwrite=True) as temporary:
        (temporary / "a.txt").write_text(text)
    return folder


def fail_halfway(folder: Path, error: BaseException, need: int | None = None) -> None:
    with atomic_folder(folder, overwrite=True, need=need) as temporary:
        (temporary / "a.txt").write_text("half")
        raise error


def half(file: Path) -> None:
    file.write_text("half")
    raise OSError(errno.EIO, "not full")


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_folder_appears_with_its_files_and_nothing_beside(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    assert (tmp_path / "out/a.txt").read_text() == "one"
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_the_whole_folder(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "one")
    (tmp_path / "out/only_old").touch()
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    write(tmp_path / "out", "two")
    assert (tmp_path / "out/a.txt").read_text() == "two"
    assert names(tmp_path / "out") == {"a.txt"}
    assert names(tmp_path) == {"out"}


def test_existing_folder_is_refused_without_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    with pytest.raises(UsageError, match="not empty"), atomic_folder(tmp_path / "out"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"), atomic_folder(tmp_path / "file", overwrite=True):
        pass
    assert (tmp_path / "out/a.txt").read_text() == "one"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").touch()
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"a"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), SystemExit(3)])
def test_an_exception_leaves_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path / "out", "one")
    with pytest.raises(type(error)):
        fail_halfway(tmp_path / "out", error)
    assert (tmp_path / "out/a.txt").read_text() == "one"
    assert names(tmp_path) == {"out"}


def test_full_disk_is_three_lines_and_removes_the_temporary(tmp_path: Path) -> None:
    with pytest.raises(SurgeonError) as caught:
        fail_halfway(tmp_path / "out", OSError(errno.ENOSPC, "No space left on device"), need=1000)
    assert len(str(caught.value).splitlines()) == 3
    assert caught.value.exit_code == 1
    assert "1,000 bytes" in caught.value.hint
    assert str(tmp_path / "out") == caught.value.where
    assert names(tmp_path) == set()


def test_too_little_room_is_found_before_writing(tmp_path: Path) -> None:
    with pytest.raises(SurgeonError, match="not enough room"), atomic_folder(tmp_path / "out", need=1 << 60):
        pytest.fail("the block must not run")
    assert names(tmp_path) == set()


def test_other_os_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        fail_halfway(tmp_path / "out", PermissionError(errno.EACCES, "no"))


def kill_inside(target: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from surgeon.atomic import atomic_folder\n"
        "with atomic_folder(sys.argv[1], overwrite=True) as t:\n"
        "    (t / 'a.txt').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert child.returncode == -signal.SIGKILL


def test_kill_leaves_the_old_folder_and_the_next_run_sweeps(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    kill_inside(tmp_path / "out")
    assert (tmp_path / "out/a.txt").read_text() == "one"
    assert len(names(tmp_path)) == 2
    write(tmp_path / "out", "two")
    assert (tmp_path / "out/a.txt").read_text() == "two"
    assert names(tmp_path) == {"out"}


def test_kill_before_the_first_folder_leaves_none(tmp_path: Path) -> None:
    kill_inside(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_moved_aside_by_a_killed_command_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    os.rename(tmp_path / "out", tmp_path / f".out.old-{dead_pid()}-0badf00d")
    with pytest.raises(KeyboardInterrupt):
        fail_halfway(tmp_path / "out", KeyboardInterrupt())
    assert (tmp_path / "out/a.txt").read_text() == "one"


def test_a_running_command_keeps_its_temporary(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as first:
        (first / "a.txt").write_text("first")
        # As seen from another container: the pid is unknown there, the lock is not.
        renamed = first.rename(tmp_path / f".out.tmp-{dead_pid()}-00000000")
        atomic.sweep(tmp_path / "out")
        assert (renamed / "a.txt").exists()
        renamed.rename(first)
    assert names(tmp_path) == {"out"}


def test_file_is_replaced_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with atomic_file(path) as temporary:
        temporary.write_text("one")
    with pytest.raises(OSError, match="full"), atomic_file(path) as temporary:
        half(temporary)
    assert path.read_text() == "one"
    assert names(tmp_path) == {"a.json"}
