"""Resumable download of one file over HTTP; it resumes only if the file on the server is still the same."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path

from resbackbone.checkpoints.hub.http_requests import (
    InterruptedTransferError,
    Meter,
    TransferError,
    body_length,
    body_range,
    open_response,
)

ATTEMPTS = 4  # in a row without a new byte
BACKOFF = 0.5  # seconds before the second attempt, doubled before each further one
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _FileVersion:
    """One version of a file on a server.

    Attributes:
        url: The requested address.
        validator: ETag or date of the version, for If-Range; None if the server sends neither.
        length: Bytes in all; None if unknown.
    """

    url: str
    validator: str | None
    length: int | None


@dataclass(frozen=True)
class PartialDownload:
    """Partly downloaded file, with a note beside it of the version on the server."""

    path: Path

    @property
    def size(self) -> int:
        """The number of bytes so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def is_resumable(self) -> bool:
        """Whether a later call can resume it."""
        version = self.version()
        return self.size > 0 and version is not None and version.validator is not None

    @property
    def _note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def version(self) -> _FileVersion | None:
        """Return the version of which it is a part; None if unknown."""
        try:
            return _FileVersion(**json.loads(self._note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def begin(self, version: _FileVersion) -> None:
        """Delete all bytes, then write the note: a kill in between leaves no bytes of another version."""
        self.delete()
        self._note.write_text(json.dumps(asdict(version)), encoding="utf-8")

    def delete(self) -> None:
        """Delete file and note."""
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def move_to(self, target: Path) -> None:
        """Move the file to its final name, once every byte is on the disk."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        self.path.replace(target)
        self._note.unlink(missing_ok=True)


def complete(part: PartialDownload, url: str, *, name: str, max_bytes: int) -> None:
    """Complete a partial download, with new attempts if the connection breaks.

    Args:
        part: The download; its file need not exist. It is deleted if it can never be completed.
        url: An http or https address. Redirections are followed, but none out of https.
        name: The label of the progress bar.
        max_bytes: The largest size to accept.

    Raises:
        TransferError: If the server refuses, the connection keeps breaking or stalling, or the file is empty or larger.
        OSError: If the file cannot be written.
    """
    try:
        _retry(part, url, name, max_bytes)
    except TransferError:
        if not part.is_resumable:
            part.delete()
        raise


def _retry(part: PartialDownload, url: str, name: str, max_bytes: int) -> None:
    failures, most, meter = 0, part.size, Meter(max_bytes)
    while True:
        try:
            _resume(part, url, name, max_bytes, meter)
        except InterruptedTransferError as error:
            failures = failures + 1 if part.size <= most else 1
            most = max(most, part.size)
            if failures == ATTEMPTS:
                raise TransferError(f"{error}, {ATTEMPTS} times in a row") from error
            time.sleep(BACKOFF * 2 ** (failures - 1))
        else:
            return


def _resume(part: PartialDownload, url: str, name: str, max_bytes: int, meter: Meter) -> None:
    """Request the missing bytes, or the whole file, and append them."""
    stored, start = part.version(), part.size
    if stored is not None and 0 < start == stored.length:
        return
    headers = {"User-Agent": "resbackbone"}
    if start and stored is not None and stored.validator is not None:
        headers |= {"Range": f"bytes={start}-", "If-Range": stored.validator}
    else:
        start = 0
    with _open(url, headers, part, meter) as response:
        first, length = body_range(response.headers) if response.status == 206 else (0, body_length(response.headers))
        version = _FileVersion(url, _validator(response.headers), length)
        if length is not None and not 0 < length <= max_bytes:
            part.delete()
            _check_size(length, max_bytes)
        if response.status == 200:
            start = 0
            part.begin(version)
        elif not start or response.status != 206 or version != stored or first != start:
            part.delete()
            raise InterruptedTransferError(
                f"the server answers with HTTP {response.status} and another range than requested"
            )
        _check_space(part.path.parent, length, start)
        with part.path.open("ab") as file, _progress_bar(name, start, length) as advance:
            while file.tell() <= max_bytes and (chunk := _read(response)):
                file.write(chunk)
                advance(len(chunk))
    size = part.size
    if size > (length or max_bytes) or (size == 0 and length is None):
        part.delete()
        _check_size(size, max_bytes)
        raise TransferError(f"the server sends more than the {length:,} bytes of its Content-Length")
    if length not in (None, size):
        raise InterruptedTransferError(f"the connection ended after {size:,} of {length:,} bytes")


def _open(url: str, headers: dict[str, str], part: PartialDownload, meter: Meter) -> HTTPResponse:
    try:
        meter.count(0)
        return open_response(url, headers, meter)
    except InterruptedTransferError as error:
        if error.status == 416:  # the file there ends before the part here
            part.delete()
        raise


def _check_size(size: int, max_bytes: int) -> None:
    if size == 0:
        raise TransferError("the file there is empty")
    if size > max_bytes:
        raise TransferError(
            f"the file there has {size:,} bytes or more, where {max_bytes:,} are allowed (fetch(url, max_bytes=...))"
        )


def _validator(headers: HTTPMessage) -> str | None:
    etag = headers.get("ETag", "W/")
    return headers.get("Last-Modified") if etag.startswith("W/") else etag  # If-Range accepts no weak ETag


def _check_space(folder: Path, length: int | None, start: int) -> None:
    free = shutil.disk_usage(folder).free
    if length is not None and length - start > free:
        raise OSError(errno.ENOSPC, f"it needs {length - start:,} bytes, {free:,} are free; TORCH_HOME moves the cache")


def _read(response: HTTPResponse) -> bytes:
    """Return the bytes that have arrived; waiting for a full chunk would lose them if the connection breaks."""
    try:
        return response.read1(_CHUNK)
    except (OSError, HTTPException) as error:
        raise InterruptedTransferError(f"the connection broke: {error!r}") from error


@contextlib.contextmanager
def _progress_bar(name: str, start: int, length: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, which the yielded function advances by a number of bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    texts = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *texts, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(name, total=length, completed=start)
        yield lambda count: progress.advance(task, count)
