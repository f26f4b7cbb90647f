"""One file over HTTP, piece by piece: an unfinished file is gone on with where it ends, if it is still the same one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, cast
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

ATTEMPTS = 4  # in a row that bring no byte
BACKOFF = 0.5  # seconds before the second attempt, doubled before each further one
TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20
_PASSING = (408, 416, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may be others the next time


class TransferError(Exception):
    """The file cannot be had from there."""


class _Interrupted(Exception):
    """The connection failed in a way that another attempt may not."""


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
class Part:
    """An unfinished file, with a note beside it of what the server said of the whole."""

    path: Path

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return self.path.stat().st_size if self.path.exists() else 0

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


def complete(part: Part, url: str, *, name: str) -> None:
    """Bring what an unfinished file lacks, with new attempts where the connection breaks.

    Args:
        part: The file; it need not exist.
        url: An http or https address. Redirections are followed, but none out of https.
        name: What the progress bar is about.

    Raises:
        TransferError: If the server refuses, or the connection keeps breaking.
        OSError: If the file cannot be written.
    """
    failures, most = 0, part.size
    while True:
        try:
            _go_on(part, url, name)
        except _Interrupted as error:
            failures = failures + 1 if part.size <= most else 1
            most = max(most, part.size)
            if failures == ATTEMPTS:
                raise TransferError(f"{error}, {ATTEMPTS} times in a row") from error
            time.sleep(BACKOFF * 2 ** (failures - 1))
        else:
            return


def _go_on(part: Part, url: str, name: str) -> None:
    """Ask for what an unfinished file lacks, or for the whole, and append it."""
    promised, start = part.promised(), part.size
    if promised is not None and 0 < start == promised.length:
        return
    headers = {"User-Agent": "resbackbone"}
    if start and promised is not None and promised.validator is not None:
        headers |= {"Range": f"bytes={start}-", "If-Range": promised.validator}
    else:
        start = 0
    with _open(url, headers, part) as response:
        promise = _Promise(url, _validator(response.headers), _length(response))
        if response.status == 200:
            start = 0
            part.begin(promise)
        elif not start or response.status != 206 or promise != promised or _first_byte(response) != start:
            part.delete()
            raise _Interrupted(f"the server answers with HTTP {response.status} and another part than was asked for")
        _check_space(part.path.parent, promise.length, start)
        with part.path.open("ab") as file, _watch(name, start, promise.length) as advance:
            while chunk := _read(response):
                file.write(chunk)
                advance(len(chunk))
    if promise.length not in (None, part.size):
        raise _Interrupted(f"the connection ended after {part.size:,} of {promise.length:,} bytes")


def _open(url: str, headers: dict[str, str], part: Part) -> HTTPResponse:
    """Send a request and follow redirections, to a response whose body may be weights."""
    opener = urllib.request.OpenerDirector()  # not build_opener(), which also opens ftp:, file: and data:
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirections(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416:  # the file there ends before the part here
            part.delete()
        message = f"HTTP {error.code} {' '.join(str(error.reason).split())}"
        raise (_Interrupted if error.code in _PASSING else TransferError)(message) from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, (socket.gaierror, ssl.SSLCertVerificationError)):
            raise TransferError(f"{reason}; is this machine online?") from error
        raise _Interrupted(f"no connection: {reason}") from error
    _check_kind(response.headers)
    return cast(HTTPResponse, response)


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows redirections from http and https to http and https, but none out of https."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in ({"https"} if req.type == "https" else {"http", "https"}):
            raise HTTPError(newurl, code, f"leads to {newurl}, which is not followed", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_kind(headers: HTTPMessage) -> None:
    """Refuse what is certainly not the file: a login page, say, or compressed bytes that nobody asked for."""
    if headers.get_content_type() == "text/html":
        raise TransferError("the server answers with a web page, not with a file")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise TransferError(f"the server compresses the file ({headers['Content-Encoding']})")


def _validator(headers: HTTPMessage) -> str | None:
    etag = headers.get("ETag", "W/")
    return headers.get("Last-Modified") if etag.startswith("W/") else etag  # If-Range takes no weak ETag


def _length(response: HTTPResponse) -> int | None:
    if response.status == 206:
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _first_byte(response: HTTPResponse) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _check_space(folder: Path, length: int | None, start: int) -> None:
    free = shutil.disk_usage(folder).free
    if length is not None and length - start > free:
        raise OSError(errno.ENOSPC, f"it needs {length - start:,} bytes, {free:,} are free; TORCH_HOME moves the cache")


def _read(response: HTTPResponse) -> bytes:
    """Return the bytes that are there: those that a full chunk waits for are lost when the connection breaks."""
    try:
        return response.read1(_CHUNK)
    except (OSError, HTTPException) as error:
        raise _Interrupted(f"the connection broke: {error!r}") from error


@contextlib.contextmanager
def _watch(name: str, start: int, length: int | None) -> Iterator[Callable[[int], None]]:
    """Draw a bar where somebody watches; the block tells of the bytes that came."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    texts = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *texts, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(name, total=length, completed=start)
        yield lambda count: progress.advance(task, count)
