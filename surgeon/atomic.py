"""Files and folders that appear whole or not at all.

Everything is written to a hidden sibling on the same filesystem, synced, then renamed. A command that is killed
leaves the old target or the new one; the sibling it may leave behind is removed by the next command.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from surgeon.errors import SurgeonError, UsageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # all that NumPy's tofile says, without an errno
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False, need: int | None = None) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends, and vanishes when the block raises.

    `need` is the number of bytes about to be written, where it is known: too little room is then an error at once.
    With `overwrite` an existing `path` is replaced in one step. Raises UsageError if `path` exists and is not empty
    (without `overwrite`) or is a file, SurgeonError if the disk is full.
    """
    target = Path(os.path.abspath(path))
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    check_room(target, need)
    temporary = _sibling(target)
    temporary.mkdir()
    handle = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with full_disk(target, need):
            yield temporary
            _sync_tree(temporary)
            check_target(target, overwrite)
            _replace_folder(temporary, target)
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; it replaces `path` when the block ends, and is removed when the block raises."""
    target = Path(os.path.abspath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    temporary = _sibling(target)
    try:
        with full_disk(target, None):
            yield temporary
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Raise UsageError unless `target` may become a new folder: absent, empty, or a folder to overwrite."""
    if target.exists() and not target.is_dir():
        raise UsageError("the output is a file, a folder is needed", str(target), "name another output folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UsageError("the output folder exists and is not empty", str(target), "name another one, or overwrite it")


def check_room(target: Path, need: int | None) -> None:
    """Raise SurgeonError if the filesystem of `target` has less than `need` bytes free."""
    free = shutil.disk_usage(target.parent).free
    if need is not None and free < need:
        hint = f"free {need - free:,} bytes there, or choose an output on another disk"
        raise SurgeonError(f"not enough room: {need:,} bytes are needed, {free:,} are free", str(target), hint)


@contextlib.contextmanager
def full_disk(target: Path, need: int | None) -> Iterator[None]:
    """Turn "no space left", "quota exceeded" and "file too large" into a SurgeonError about `target`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL and not _SHORT_WRITE.fullmatch(str(error)):
            raise
        wanted = f"{need:,} bytes are needed in all" if need is not None else "free some room"
        hint = f"{wanted}; nothing was changed, so the command can be repeated, there or on another disk"
        raise SurgeonError(f"the disk is full ({error.strerror})", str(target), hint) from error


def sweep(target: Path) -> None:
    """Remove what killed commands left beside `target`, and put back a folder that one had moved aside."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(tmp|old)-(\d+)-[0-9a-f]+")
    for entry in list(target.parent.iterdir()):
        found = pattern.fullmatch(entry.name)
        if found is None or _alive(int(found[2])) or _locked(entry):
            continue
        if found[1] == "old" and not target.exists():
            os.rename(entry, target)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sibling(target: Path, kind: str = "tmp") -> Path:
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for file in files:
            sync(Path(root, file))
        sync(Path(root))


def _replace_folder(new: Path, target: Path) -> None:
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        # Between these two renames a kill leaves no target: the next `sweep` puts the old folder back.
        aside = _sibling(target, "old")
        os.rename(target, aside)
        os.rename(new, target)
        shutil.rmtree(aside, ignore_errors=True)
    sync(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step (Linux's renameat2); False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE))
    return done == 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _locked(entry: Path) -> bool:
    # A process of another container has a pid that means nothing here: its lock on the folder is seen nevertheless.
    handle = os.open(entry, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
