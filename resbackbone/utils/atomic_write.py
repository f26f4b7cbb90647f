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
_STEM = 50  # characters of the target's name in the temporary name; up to four bytes each, below the limit of 255
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.writing(\..*)?", re.DOTALL)


@contextmanager
def atomic_write(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the file's folder; at the end it replaces the file, unless the block raises.

    The temporary file is locked during the block, so that later calls delete temporary files of killed processes, but
    none that another process is writing. Symbolic links are followed; devices and pipes are written to directly.

    Args:
        path: The file to create or replace.
        sync: Whether to fsync the file and its folder, so that a power failure cannot leave an empty file.

    Raises:
        OSError: If the file cannot be written, with its name and the system's reason, such as a full disk. Other
            exceptions of the block propagate, unless they hide such a reason.
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
        if sync and os.name == "posix":  # on Windows, folders cannot be opened
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
    """Delete temporary files in a folder that no process is writing."""
    for path in folder.glob(".*.writing*"):
        if _TEMPORARY.fullmatch(path.name):
            with suppress(OSError):  # another user's file, or already deleted
                _delete_if_abandoned(path)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock of a folder, waiting for other processes; does nothing where locks are not supported."""
    if _fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # the file system does not support locks on folders
            _fcntl.flock(descriptor, _fcntl.LOCK_EX)
        yield
    finally:
        _unlock(descriptor)


def _create(target: Path, suffix: str) -> tuple[Path, int | None]:
    """Create and lock a temporary file; return its path and the descriptor that holds the lock, if any."""
    while True:
        temporary = target.with_name(f".{target.stem[:_STEM]}.{secrets.token_hex(4)}.writing{suffix}")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if _fcntl is None:
            os.close(descriptor)  # Windows cannot rename open files
            return temporary, None
        _lock(descriptor)
        if temporary.exists():  # not deleted as abandoned before it was locked
            return temporary, descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Lock a file until the descriptor is closed; return False if it is locked, None if locks are unsupported."""
    try:
        _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _unlock(descriptor: int) -> None:
    with suppress(OSError):  # forked processes may share the descriptor
        _fcntl.flock(descriptor, _fcntl.LOCK_UN)
    os.close(descriptor)


def _delete_if_abandoned(path: Path) -> None:
    if _fcntl is None:  # Windows cannot delete open files
        if _is_old(path):
            path.unlink()
        return
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        locked = _lock(descriptor)
        if locked or (
            locked is None and _is_old(path)
        ):  # locked while deleting, so that a process about to lock it sees that it is gone
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
    """Return the OS error behind a failed write, even if a library hides it; None for unrelated errors."""
    if isinstance(error, OSError) and error.errno is not None:
        return error if error.filename in (None, str(temporary), temporary) else None
    try:  # libraries may hide the reason; test whether the file can grow
        with temporary.open("ab") as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as reason:
        return reason
    return None
