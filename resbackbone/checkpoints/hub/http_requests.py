"""HTTP requests to well-formed addresses, with limits on size and stalling."""

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
WINDOW = 60.0  # seconds over which the rate is measured
MIN_RATE = 1024  # bytes per second on average, a fraction of the rate of the slowest modems
MAX_STALLS = 4  # windows in a row below that rate
MAX_HEADERS = 1 << 20  # bytes until the body of a response begins, with all redirections
_TRANSIENT = (408, 416, 425, 429, 500, 502, 503, 504)  # HTTP statuses for which another attempt may succeed
_SAFE = "%/:@!$&'()*+,;=~?[]"  # in a path or query, as it is


class TransferError(Exception):
    """The file cannot be downloaded from there."""


class InterruptedTransferError(Exception):
    """The transfer failed, and another attempt may succeed.

    Attributes:
        status: The HTTP status, if the server answered.
    """

    status: int | None = None


class Meter:
    """Byte counter over all attempts of a transfer, which raises if it is too large or too slow.

    Args:
        max_bytes: The largest size of the file. Twice as many bytes are accepted in all, as some may come again.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left = 2 * max_bytes + MAX_HEADERS
        self._of_headers: int | None = None
        self._begun, self._in_window, self._stalls = time.monotonic(), 0, 0

    def begin_headers(self) -> None:
        """Accept at most ``MAX_HEADERS`` bytes until the body begins."""
        self._of_headers = MAX_HEADERS

    def begin_body(self) -> None:
        """Accept bytes up to the total."""
        self._of_headers = None

    def count(self, number: int) -> None:
        """Count received bytes.

        Raises:
            TransferError: If there are too many in all, or too few in several windows in a row.
            InterruptedTransferError: If there are too few in this window.
        """
        self._in_window += number
        self._left -= number
        if self._of_headers is not None:
            self._of_headers -= number
        if self._left < 0 or (self._of_headers or 0) < 0:
            raise TransferError("the server sends too many bytes")
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
    """A socket that counts the bytes read from it, headers included."""

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
        """Encode the new address with :func:`ascii_address` before it is checked."""
        for name in ("location", "uri"):
            if name in headers:
                try:
                    # Python decodes headers as Latin-1, but servers send other characters in UTF-8.
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
    """Return an http or https address in ASCII: the host encoded by IDNA, the rest by percent signs.

    Args:
        what: Name of the address in the error.
        address: The address; returned as it is if it is ASCII.

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
    """Send a request, follow redirections, and return the response with the file.

    Raises:
        TransferError: If the server refuses, or its answer is certainly not the file.
        InterruptedTransferError: If another attempt may succeed.
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
        if error.code not in _TRANSIENT:
            raise TransferError(message) from error
        interrupted = InterruptedTransferError(message)
        interrupted.status = error.code
        raise interrupted from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, (socket.gaierror, ssl.SSLCertVerificationError)):
            raise TransferError(f"{reason}; is this machine online?") from error
        raise InterruptedTransferError(f"no connection: {reason}") from error
    except ValueError as error:  # a malformed address or header
        raise TransferError(f"the response is malformed: {error}") from error
    meter.begin_body()
    _check_kind(response.headers)
    return cast(HTTPResponse, response)


def _check_kind(headers: HTTPMessage) -> None:
    """Refuse what is certainly not the file: a login page, say, or compressed bytes that were not requested."""
    if headers.get_content_type() == "text/html":
        raise TransferError("the server answers with a web page, not with a file")
    for name, usual in (("Content-Encoding", ("identity", "")), ("Transfer-Encoding", ("chunked", "identity"))):
        for value in headers.get_all(name, []):
            if value.strip().lower() not in usual:
                raise TransferError(f"the server compresses the file ({value})")


def body_length(headers: HTTPMessage) -> int | None:
    """Return the length of the body of a response in bytes; None if the server does not send it.

    Raises:
        TransferError: If it is not a number, or there are several.
    """
    values = {value.strip() for value in headers.get_all("Content-Length", [])}
    if not values or "Transfer-Encoding" in headers:
        return None
    if len(values) > 1 or not re.fullmatch(r"[0-9]{1,18}", value := next(iter(values))):
        raise TransferError(f"the server sends an invalid Content-Length: {', '.join(sorted(values))[:100]!r}")
    return int(value)


def body_range(headers: HTTPMessage) -> tuple[int, int | None]:
    """Return the first byte of a partial response, and the length of the whole file, None if unknown.

    Raises:
        TransferError: If ``Content-Range`` is malformed.
    """
    text = headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", text.strip())
    if found is None:
        raise TransferError(f"the server sends an invalid Content-Range: {text[:100]!r}")
    return int(found[1]), None if found[2] == "*" else int(found[2])
