"""HTTP requests to well-formed addresses, with limits on size and on stalling."""

from __future__ import annotations

import io
import re
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPResponse, HTTPSConnection
from typing import IO, Any, cast
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

TIMEOUT = 30.0  # seconds without a byte
WINDOW = 60.0  # seconds after which it is looked at how many bytes came
MIN_RATE = 1024  # bytes a second that must come on average, which is a fraction of what the slowest modems bring
MAX_STALLS = 4  # such windows in a row
MAX_HEADERS = 1 << 20  # bytes until the body of a response begins, redirections and what they bring included
_PASSING = (408, 416, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may be others the next time
_SAFE = "%/:@!$&'()*+,;=~?[]"  # in a path or query, as it is


class TransferError(Exception):
    """The file cannot be had from there."""


class InterruptedTransferError(Exception):
    """The connection failed in a way that another attempt may not.

    Attributes:
        status: HTTP's, where the server answered.
    """

    status: int | None = None


class Meter:
    """Counts what comes over all attempts, and ends a transfer that brings too much or too little.

    Args:
        max_bytes: Of the file. Twice as many may come in all, as some bytes may come again.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left = 2 * max_bytes + MAX_HEADERS
        self._of_headers: int | None = None
        self._begun, self._in_window, self._stalls = time.monotonic(), 0, 0

    def begin_headers(self) -> None:
        """Let no more than ``MAX_HEADERS`` bytes come until the body begins."""
        self._of_headers = MAX_HEADERS

    def begin_body(self) -> None:
        """Let bytes come up to the total."""
        self._of_headers = None

    def count(self, number: int) -> None:
        """Take note of bytes that came, 0 where none did.

        Raises:
            TransferError: If there are too many, or too few came in several windows in a row.
            InterruptedTransferError: If too few came in this window.
        """
        self._in_window += number
        self._left -= number
        if self._of_headers is not None:
            self._of_headers -= number
        if self._left < 0 or (self._of_headers or 0) < 0:
            raise TransferError("the server sends bytes without end")
        elapsed = time.monotonic() - self._begun
        if elapsed < WINDOW:
            return
        too_few = self._in_window < MIN_RATE * elapsed
        self._begun, self._in_window, self._stalls = time.monotonic(), 0, self._stalls + 1 if too_few else 0
        if too_few:
            text = f"the server stalls: less than {MIN_RATE:,} bytes a second came in {elapsed:.3g} seconds"
            if self._stalls < MAX_STALLS:
                raise InterruptedTransferError(text)
            raise TransferError(f"{text}, {MAX_STALLS} times in a row")


class _MeteredFile(io.RawIOBase):
    def __init__(self, raw: Any, meter: Meter) -> None:
        self._raw, self._meter = raw, meter

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        number: int = self._raw.readinto(buffer)
        self._meter.count(number)
        return number

    def close(self) -> None:
        self._raw.close()
        super().close()


class _MeteredSocket:
    """A socket whose files tell a meter of what they read, headers too."""

    def __init__(self, sock: socket.socket, meter: Meter) -> None:
        self._sock, self._meter = sock, meter

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_MeteredFile(self._sock.makefile("rb", buffering=0), self._meter))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def _metered(kind: type[HTTPConnection], meter: Meter) -> Callable[..., HTTPConnection]:
    class Connection(kind):  # type: ignore[valid-type,misc]
        def connect(self) -> None:
            super().connect()
            self.sock: Any = _MeteredSocket(self.sock, meter)

    return Connection


class _HTTPHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(cast(Any, _metered(HTTPConnection, self._meter)), req)

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(cast(Any, _metered(HTTPSConnection, self._meter)), req)


class Redirections(urllib.request.HTTPRedirectHandler):
    """Follows redirections from http and https to http and https, but none out of https."""

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage
    ) -> Any:
        """Write the new address as :func:`ascii_address` does, before it is looked at."""
        for name in ("location", "uri"):
            if name in headers:
                try:
                    # Headers come as Latin-1, but who writes other letters means UTF-8.
                    location = headers[name].encode("latin-1").decode("utf-8", "replace")
                    location = urljoin(req.full_url, location)
                    if urlsplit(location).scheme in ("http", "https"):  # others are refused below
                        location = ascii_address("a redirection", location)
                except ValueError as error:
                    raise HTTPError(req.full_url, code, str(error), headers, fp) from error
                del headers[name]
                headers[name] = location
                self._check_scheme(req, location, code, headers, fp)
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Return the next request."""
        self._check_scheme(req, newurl, code, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    @staticmethod
    def _check_scheme(req: Any, address: str, code: int, headers: HTTPMessage, fp: IO[bytes]) -> None:
        if urlsplit(address).scheme not in ({"https"} if req.type == "https" else {"http", "https"}):
            raise HTTPError(address, code, f"leads to {address}, which is not followed", headers, fp)


def ascii_address(what: str, address: str) -> str:
    """Return an http or https address with what is not ASCII encoded: the host by IDNA, the rest by percent signs.

    Args:
        what: What it is, for the error.
        address: The address; of ASCII alone it stays as it is.

    Raises:
        ValueError: If it is malformed, or has a user name or a password.

    >>> ascii_address("it", "https://bücher.example/ä.pth?b=ö")
    'https://xn--bcher-kva.example/%C3%A4.pth?b=%C3%B6'
    """
    wanted = f"{what} must be an address that begins with http:// or https://"
    try:
        address.encode()
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
        encoded = host if ":" in host else host.encode("idna").decode("ascii")
    except ValueError as error:  # UnicodeError is one
        raise ValueError(f"{wanted}, got {address!r}, which is malformed: {error}") from error
    if "@" in parts.netloc:
        raise ValueError(f"{wanted} and has no user name or password in it, as that of {host!r} has")
    if parts.scheme not in ("http", "https") or not host or re.search(r"[\x00-\x20\x7f]", address):
        raise ValueError(f"{wanted}, got {address!r}")
    if address.isascii():
        return address
    netloc = (f"[{encoded}]" if ":" in encoded else encoded) + ("" if port is None else f":{port}")
    path, query = (quote(part, safe=_SAFE) for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, netloc, path, query, ""))


def open_response(url: str, headers: dict[str, str], meter: Meter) -> HTTPResponse:
    """Send a request and follow redirections, to a response whose body may be a file.

    Raises:
        TransferError: If the server refuses, or answers with what is certainly no file.
        InterruptedTransferError: If another attempt may have more success.
    """
    opener = urllib.request.OpenerDirector()  # not build_opener(), which also opens ftp:, file: and data:
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        _HTTPHandler(meter),
        urllib.request.HTTPDefaultErrorHandler(),
        Redirections(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    meter.begin_headers()
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        message = f"HTTP {error.code} {' '.join(str(error.reason).split())}"
        if error.code not in _PASSING:
            raise TransferError(message) from error
        interrupted = InterruptedTransferError(message)
        interrupted.status = error.code
        raise interrupted from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, (socket.gaierror, ssl.SSLCertVerificationError)):
            raise TransferError(f"{reason}; is this machine online?") from error
        raise InterruptedTransferError(f"no connection: {reason}") from error
    except ValueError as error:  # of an address, or of headers that no server should send
        raise TransferError(f"the answer makes no sense: {error}") from error
    meter.begin_body()
    _check_kind(response.headers)
    return cast(HTTPResponse, response)


def _check_kind(headers: HTTPMessage) -> None:
    """Refuse what is certainly not the file: a login page, say, or compressed bytes that nobody asked for."""
    if headers.get_content_type() == "text/html":
        raise TransferError("the server answers with a web page, not with a file")
    for name, usual in (("Content-Encoding", ("identity", "")), ("Transfer-Encoding", ("chunked", "identity"))):
        for value in headers.get_all(name, []):
            if value.strip().lower() not in usual:
                raise TransferError(f"the server compresses the file ({value})")


def body_length(headers: HTTPMessage) -> int | None:
    """Return the bytes of a response's body; None where the server does not say.

    Raises:
        TransferError: If it says no number, or several.
    """
    values = {value.strip() for value in headers.get_all("Content-Length", [])}
    if not values or "Transfer-Encoding" in headers:
        return None
    if len(values) > 1 or not re.fullmatch(r"[0-9]{1,18}", value := next(iter(values))):
        raise TransferError(f"the server gives a length that is none: {', '.join(sorted(values))[:100]!r}")
    return int(value)


def body_range(headers: HTTPMessage) -> tuple[int, int | None]:
    """Return the first byte of a part of a file, and the bytes of the whole, None where the server does not say.

    Raises:
        TransferError: If the server says something else.
    """
    text = headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", text.strip())
    if found is None:
        raise TransferError(f"the server gives a part of the file that is none: {text[:100]!r}")
    return int(found[1]), None if found[2] == "*" else int(found[2])
