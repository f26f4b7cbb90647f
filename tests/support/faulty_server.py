"""Local web server with faults for tests of downloads."""

import contextlib
import hashlib
import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CONTENT = bytes(range(256)) * 4096  # 1 MiB
OTHER = CONTENT[::-1]
HALF = len(CONTENT) // 2


def named(content: bytes, stem: str = "weights") -> str:
    """Return a file name with the hash of its content, as publishers write it."""
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def drip(head: bytes, seconds: float) -> Iterator[bytes]:
    """Yield an endless response, one byte at a time."""
    yield head
    for _ in itertools.count():
        time.sleep(seconds)
        yield b"1"


def pour(head: bytes, piece: bytes) -> Iterator[bytes]:
    """Yield an endless response as fast as possible."""
    yield head
    yield from itertools.repeat(piece)


class Web(ThreadingHTTPServer):
    """Server of one file under every path; each of ``faults`` is applied to one request, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges = CONTENT, True
        self.etag: str | None = '"v1"'
        self.modified: str | None = None
        self.if_range = True
        self.faults: list[dict[str, Any]] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.waited = False  # whether such a request timed out
        self.release = threading.Event()  # what a request with "wait" waits for
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Ignore clients that disconnect."""

    @property
    def starts(self) -> list[int]:
        """The first byte that each request asked for."""
        return [int(h["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in h else 0 for _, h in self.requests]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def log_message(self, *_: object) -> None:
        """Log nothing; tests read ``requests``."""

    def do_GET(self) -> None:
        web = self.server
        web.requests.append((self.path, dict(self.headers)))
        fault = web.faults.pop(0) if web.faults else {}
        if "answer" in fault:
            self.close_connection = True
            with contextlib.suppress(OSError):  # the client disconnects
                for piece in fault["answer"]:
                    if web.release.is_set():
                        break
                    self.wfile.write(piece)
            return
        if "set" in fault:
            vars(web).update(fault["set"])
        if "status" in fault:
            self.send_response(fault["status"])
            for key, value in {"Content-Length": "0", **fault.get("headers", {})}.items():
                self.send_header(key, value)
            self.end_headers()
            return
        self.send_file(fault)

    def send_file(self, fault: Mapping[str, Any]) -> None:
        web, start = self.server, 0
        current = not web.if_range or self.headers.get("If-Range") in (None, web.etag, web.modified)
        if web.ranges and "Range" in self.headers and current:
            start = self.server.starts[-1]
            if start >= len(web.content):
                self.send_error(416)
                return
            self.send_response(206)
            shifted = start + fault.get("shift", 0)
            self.send_header("Content-Range", f"bytes {shifted}-{len(web.content) - 1}/{len(web.content)}")
        elif fault.get("unasked"):
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 0-{len(web.content) - 1}/{len(web.content)}")
        else:
            self.send_response(200)
        body = web.content[start:]
        headers = {
            "ETag": web.etag,
            "Last-Modified": web.modified,
            "Content-Length": len(body) + fault.get("lie", 0),
            "Content-Type": "application/octet-stream",
        }
        for key, value in (headers | fault.get("headers", {})).items():
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body[: fault.get("cut")])
        self.wfile.flush()
        if fault.get("wait"):
            web.waited = not web.release.wait(600)
        self.close_connection = True  # cut bytes are never sent


@contextmanager
def serve() -> Iterator[Web]:
    """Run a server, without faults until a test adds some."""
    server = Web()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
