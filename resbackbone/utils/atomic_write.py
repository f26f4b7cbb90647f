"""Atomic writes: a file appears under its name complete, or not at all."""

from __future__ import annotations

import errno
import importlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ABANDONED_AFTER = 24 * 3600.0  # seconds without a change, on file systems without locks
_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
_STEM = 50  # characters of the target's name in the temporary one: even of four bytes each they fit into 255
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.writing(\..*)?", re.DOTALL)


@contextmanager
def atomic_write(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside a file, which replaces the file at the end unless the block raises.

    The temporary file is locked meanwhile. So the next call deletes what killed processes have left in the folder, and
    nothing that another process is writing. A link is followed, a device or pipe is written to directly.

    Args:
        path: The file. An earlier one is replaced.
        sync: Whether to wait until bytes and name are on the disk, so that a power cut cannot leave an empty file.

    Raises:
        OSError: If the file cannot be written, with its name and the system's reason, such as a full disk. The block's
            own exceptions pass, except those that hide such a reason.
    """
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if target.exists() and not target.is_file():
        yield target
        return
    try:
        delete_abandoned(target.parent)
        temporary, descriptor = _create(target, path.suffix)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        yield temporary
        if sync:
            _sync(temporary)
        temporary.replace(target)
        if sync and os.name == "posix":  # elsewhere folders cannot be opened
            _sync(target.parent)
    except Exception as error:
        reason = _system_error(error, temporary)
        if reason is None:
            raise
        raise OSError(reason.errno, reason.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
        if descriptor is not None:
            _unlock(descriptor)


def delete_abandoned(folder: Path) -> None:
    """Delete the temporary files in a folder that no process is writing any more."""
    for path in folder.glob(".*.writing*"):
        if _TEMPORARY.fullmatch(path.name):
            with suppress(OSError):  # another user's, or gone meanwhile
                _delete_if_abandoned(path)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for the same folder; without locks do not wait."""
    if _fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks, or with none for folders
            _fcntl.flock(descriptor, _fcntl.LOCK_EX)
        yield
    finally:
        _unlock(descriptor)


def _create(target: Path, suffix: str) -> tuple[Path, int | None]:
    """Create and lock a temporary file; return it and the open descriptor that holds the lock, if there is one."""
    while True:
        temporary = target.with_name(f".{target.stem[:_STEM]}.{secrets.token_hex(4)}.writing{suffix}")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if _fcntl is None:
            os.close(descriptor)  # or it could not be renamed
            return temporary, None
        _lock(descriptor)
        if temporary.exists():  # and was not deleted as abandoned before it was locked
            return temporary, descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Lock a file until the descriptor is closed; return False if another has locked it, None if nobody can."""
    try:
        _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _unlock(descriptor: int) -> None:
    with suppress(OSError):  # also of processes that were forked meanwhile, which have the descriptor, too
        _fcntl.flock(descriptor, _fcntl.LOCK_UN)
    os.close(descriptor)


def _delete_if_abandoned(path: Path) -> None:
    if _fcntl is None:  # Windows, where a file that is open, here or in the process that writes it, cannot be deleted
        if _is_old(path):
            path.unlink()
        return
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        locked = _lock(descriptor)
        if locked or (
            locked is None and _is_old(path)
        ):  # still held, so that a process that is about to write there sees that the file is gone
            path.unlink()
    finally:
        os.close(descriptor)


def _is_old(path: Path) -> bool:
    return time.time() - path.lstat().st_mtime > ABANDONED_AFTER


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _system_error(error: Exception, temporary: Path) -> OSError | None:
    """Return why a file cannot be written: the error itself, or what it hides; None if it is about something else."""
    if isinstance(error, OSError) and error.errno is not None:
        return error if error.filename in (None, str(temporary), temporary) else None
    try:  # libraries raise errors of their own, which do not say why; so see whether the file can grow
        with temporary.open("ab") as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as reason:
        return reason
    return None
