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

ATTEMPTS = 4  # in a row that bring no byte
BACKOFF = 0.5  # seconds before the second attempt, doubled before each further one
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Promise:
    """What a server says of a file.

    Attributes:
        url: Where it was asked for.
        validator: What tells one version of the file from the next, as If-Range takes it.
        length: Bytes in all.
    """

    url: str
    validator: str | None
    length: int | None


@dataclass(frozen=True)
class PartialDownload:
    """An unfinished file, with a note beside it of what the server said of the whole."""

    path: Path

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def can_be_continued(self) -> bool:
        """Whether a later call can go on from here, rather than begin anew."""
        promised = self.promised()
        return self.size > 0 and promised is not None and promised.validator is not None

    @property
    def _note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def promised(self) -> _Promise | None:
        """What the server said, if that is known."""
        try:
            return _Promise(**json.loads(self._note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def begin(self, promise: _Promise) -> None:
        """Begin anew. The file goes before the note comes: a kill in between leaves no bytes that it does not mean."""
        self.delete()
        self._note.write_text(json.dumps(asdict(promise)), encoding="utf-8")

    def delete(self) -> None:
        """Remove both."""
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def become(self, target: Path) -> None:
        """Take the final name, once every byte is on the disk."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        self.path.replace(target)
        self._note.unlink(missing_ok=True)


def complete(part: PartialDownload, url: str, *, name: str, max_bytes: int) -> None:
    """Bring what an unfinished file lacks, with new attempts where the connection breaks.

    Args:
        part: The file; it need not exist. Where it can never be completed it is deleted.
        url: An http or https address. Redirections are followed, but none out of https.
        name: What the progress bar is about.
        max_bytes: Bytes that the file may have.

    Raises:
        TransferError: If the server refuses, the connection keeps breaking or stalling, or the file is empty or larger.
        OSError: If the file cannot be written.
    """
    try:
        _attempt_often(part, url, name, max_bytes)
    except TransferError:
        if not part.can_be_continued:
            part.delete()
        raise


def _attempt_often(part: PartialDownload, url: str, name: str, max_bytes: int) -> None:
    failures, most, meter = 0, part.size, Meter(max_bytes)
    while True:
        try:
            _go_on(part, url, name, max_bytes, meter)
        except InterruptedTransferError as error:
            failures = failures + 1 if part.size <= most else 1
            most = max(most, part.size)
            if failures == ATTEMPTS:
                raise TransferError(f"{error}, {ATTEMPTS} times in a row") from error
            time.sleep(BACKOFF * 2 ** (failures - 1))
        else:
            return


def _go_on(part: PartialDownload, url: str, name: str, max_bytes: int, meter: Meter) -> None:
    """Ask for what an unfinished file lacks, or for the whole, and append it."""
    promised, start = part.promised(), part.size
    if promised is not None and 0 < start == promised.length:
        return
    headers = {"User-Agent": "resbackbone"}
    if start and promised is not None and promised.validator is not None:
        headers |= {"Range": f"bytes={start}-", "If-Range": promised.validator}
    else:
        start = 0
    with _open(url, headers, part, meter) as response:
        first, length = body_range(response.headers) if response.status == 206 else (0, body_length(response.headers))
        promise = _Promise(url, _validator(response.headers), length)
        if length is not None and not 0 < length <= max_bytes:
            part.delete()
            _check_size(length, max_bytes)
        if response.status == 200:
            start = 0
            part.begin(promise)
        elif not start or response.status != 206 or promise != promised or first != start:
            part.delete()
            raise InterruptedTransferError(
                f"the server answers with HTTP {response.status} and another part than was asked for"
            )
        _check_space(part.path.parent, promise.length, start)
        with part.path.open("ab") as file, _watch(name, start, promise.length) as advance:
            while file.tell() <= max_bytes and (chunk := _read(response)):
                file.write(chunk)
                advance(len(chunk))
    size = part.size
    if size > (length or max_bytes) or (size == 0 and length is None):
        part.delete()
        _check_size(size, max_bytes)
        raise TransferError(f"the server sends more than the {length:,} bytes that it promised")
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
    return headers.get("Last-Modified") if etag.startswith("W/") else etag  # If-Range takes no weak ETag


def _check_space(folder: Path, length: int | None, start: int) -> None:
    free = shutil.disk_usage(folder).free
    if length is not None and length - start > free:
        raise OSError(errno.ENOSPC, f"it needs {length - start:,} bytes, {free:,} are free; TORCH_HOME moves the cache")


def _read(response: HTTPResponse) -> bytes:
    """Return the bytes that are there: those that a full chunk waits for are lost when the connection breaks."""
    try:
        return response.read1(_CHUNK)
    except (OSError, HTTPException) as error:
        raise InterruptedTransferError(f"the connection broke: {error!r}") from error


@contextlib.contextmanager
def _watch(name: str, start: int, length: int | None) -> Iterator[Callable[[int], None]]:
    """Draw a progress bar on a terminal; the block tells of the bytes that came."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    texts = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *texts, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(name, total=length, completed=start)
        yield lambda count: progress.advance(task, count)
