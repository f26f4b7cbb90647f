"""Downloads from a local server with the faults that networks have."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import pytest
import torch
from faulty_server import CONTENT, HALF, OTHER, Web, drip, named, pour, serve
from full_disk import file_size_limit
from rich.console import Console

from resbackbone.checkpoints.hub import http_requests, partial_download
from resbackbone.checkpoints.hub.catalog import list_weights
from resbackbone.checkpoints.hub.download import DownloadError, cache_path, fetch, mirrored
from resbackbone.checkpoints.hub.sources import locate


@pytest.fixture
def web():
    with serve() as server:
        yield server


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    """Short breaks between attempts, no proxy, no terminal, no mirror."""
    monkeypatch.setattr(partial_download, "BACKOFF", 0.001)
    monkeypatch.setattr(Console, "is_terminal", False)
    monkeypatch.delenv("RESBACKBONE_MIRROR", raising=False)
    monkeypatch.setenv("no_proxy", "*")


def files(folder: Path) -> list[str]:
    """Return the names of the files in a cache, except locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def start(code: str, *arguments: object) -> subprocess.Popen:
    """Start Python on the code, with the arguments in ``sys.argv`` and `fetch` imported."""
    code = "import sys, time\nfrom pathlib import Path\nfrom resbackbone.checkpoints.hub.download import fetch\n" + code
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Files and their paths


def test_a_file_is_downloaded_once(web, tmp_path):
    url = f"{web.url}/models/{named(CONTENT)}"
    path = fetch(url, folder=tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / named(CONTENT)
    assert path.read_bytes() == CONTENT
    assert files(path.parent) == [named(CONTENT)]
    assert fetch(url, folder=path.parent) == path
    assert len(web.requests) == 1
    headers = web.requests[0][1]
    assert (headers["User-Agent"], headers["Accept-Encoding"]) == ("resbackbone", "identity")


def test_the_cache_is_torchs(web, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = fetch(f"{web.url}/{named(CONTENT)}")
    assert path == tmp_path / "hub" / "checkpoints" / named(CONTENT)


def test_files_of_torch_hub_are_used(web, tmp_path):
    url = f"{web.url}/{named(CONTENT)}"
    torch.hub.download_url_to_file(url, str(tmp_path / named(CONTENT)), progress=False)
    assert fetch(url, folder=tmp_path).read_bytes() == CONTENT
    assert len(web.requests) == 1


def test_a_damaged_file_is_downloaded_again(web, tmp_path):
    path = tmp_path / named(CONTENT)
    path.write_bytes(CONTENT[:-1])
    with pytest.warns(UserWarning, match="is damaged and downloaded anew"):
        fetch(f"{web.url}/{path.name}", folder=tmp_path)
    assert path.read_bytes() == CONTENT


def test_equal_names_without_a_hash_do_not_collide(web, tmp_path):
    first = fetch(f"{web.url}/a/model.safetensors", folder=tmp_path)
    web.content = OTHER
    second = fetch(f"{web.url}/b/model.safetensors", folder=tmp_path)
    assert (first.read_bytes(), second.read_bytes()) == (CONTENT, OTHER)
    assert fetch(f"{web.url}/a/model.safetensors", folder=tmp_path) == first
    assert len(web.requests) == 2


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://h/resnet50-11ad3fa6.pth", "resnet50-11ad3fa6.pth"),
        ("https://h/a/rcnn_20200130-047c8118.pth?download=1", "rcnn_20200130-047c8118.pth"),
        ("https://h/resnet34-43635321.pth", "resnet34-43635321.pth"),  # a hash may have no letter in it
        ("https://h/swin-20210308.pth", None),  # a date
        ("https://h/model-00001.safetensors", None),
        ("https://h/r50-11AD3FA6.pth", None),
        ("https://h/..%2f..%2fetc%2fr50-11ad3fa6.pth", "r50-11ad3fa6.pth"),
        ("https://h/..%5c..%5cr50-11ad3fa6.pth", "r50-11ad3fa6.pth"),
        ("https://h/r50%00%3a-11ad3fa6.pth", "r50__-11ad3fa6.pth"),
    ],
)
def test_names_in_the_cache(url, name, tmp_path):
    path = cache_path(url, folder=tmp_path)
    assert path.parent == tmp_path
    if name is not None:
        assert path.name == name
    else:
        assert path.name == f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{url.rpartition('/')[2]}"


@pytest.mark.parametrize("url", ["ftp://h/a.pth", "file:///etc/passwd", "a.pth", "https:///a.pth", "https://h/a b.pth"])
def test_only_the_web(url, tmp_path):
    with pytest.raises(ValueError, match="must be an address that begins with http:// or https://"):
        fetch(url, folder=tmp_path)


@pytest.mark.parametrize("url", ["https://h", "https://h/", "https://h/models/", "https://h/%2e%2e"])
def test_a_url_names_a_file(url, tmp_path):
    with pytest.raises(ValueError, match="must end in the name of a file"):
        fetch(url, folder=tmp_path)


# Connections that break


def test_a_cut_connection_is_gone_on_with(web, tmp_path):
    web.faults = [{"cut": 1000}, {"cut": 5000}, {"cut": 1}]
    path = fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path)
    assert path.read_bytes() == CONTENT
    assert web.starts == [0, 1000, 6000, 6001]
    assert [headers.get("If-Range") for _, headers in web.requests] == [None, '"v1"', '"v1"', '"v1"']
    assert files(tmp_path) == [named(CONTENT)]


def test_many_cuts_are_no_failure_while_bytes_come(web, tmp_path):
    web.faults = [{"cut": 1000} for _ in range(3 * partial_download.ATTEMPTS)]
    assert fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path).read_bytes() == CONTENT


def test_a_stalled_connection_is_left(web, tmp_path, monkeypatch):
    """The server would wait until the test ends; only the first attempt has a short timeout."""
    usual = http_requests.TIMEOUT
    monkeypatch.setattr(http_requests, "TIMEOUT", 2)
    monkeypatch.setattr("time.sleep", lambda _: monkeypatch.setattr(http_requests, "TIMEOUT", usual))
    web.faults = [{"cut": 1000, "wait": True}]
    assert fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path).read_bytes() == CONTENT
    assert not web.waited  # the client left first
    assert web.starts == [0, 1000]


def test_a_date_replaces_a_weak_etag(web, tmp_path):
    web.etag, web.modified = 'W/"v1"', "Wed, 21 Oct 2015 07:28:00 GMT"
    web.faults = [{"cut": 1000}]
    assert fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path).read_bytes() == CONTENT
    assert web.starts == [0, 1000]
    assert web.requests[1][1]["If-Range"] == web.modified


@pytest.mark.parametrize("setting", [{"ranges": False}, {"etag": None}], ids=["no ranges", "no validator"])
def test_servers_from_which_nothing_is_gone_on_with(web, tmp_path, setting):
    vars(web).update(setting)
    web.faults = [{"cut": 1000}]
    assert fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path).read_bytes() == CONTENT
    assert len(web.requests) == 2


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("content", [OTHER, OTHER[:HALF], OTHER * 2], ids=["as long", "shorter", "longer"])
def test_a_file_that_changed_is_begun_anew(web, tmp_path, if_range, content):
    """Without a hash, only the server's headers keep the halves of two files apart."""
    web.if_range = if_range
    web.faults = [{"cut": HALF + 1}, {"set": {"content": content, "etag": '"v2"'}}]
    assert fetch(f"{web.url}/weights.pth", folder=tmp_path).read_bytes() == content


def test_another_range_than_requested_is_refused(web, tmp_path):
    web.faults = [{"cut": 1000}, {"shift": 1}]
    assert fetch(f"{web.url}/weights.pth", folder=tmp_path).read_bytes() == CONTENT
    assert web.starts == [0, 1000, 0]


def test_an_unrequested_range_is_refused(web, tmp_path):
    web.etag, web.faults = None, [{"cut": 1000}, *[{"unasked": True}] * 10]
    with pytest.raises(DownloadError, match="answers with HTTP 206 and another range than requested"):
        fetch(f"{web.url}/weights.pth", folder=tmp_path)
    assert len(web.requests) == partial_download.ATTEMPTS


def test_two_servers_are_not_mixed(web, tmp_path, monkeypatch):
    """Files of different addresses may have the same ETag."""
    url = "https://h/weights.pth"
    monkeypatch.setenv("RESBACKBONE_MIRROR", f"https://h={web.url}/one")
    web.faults = [{"cut": HALF}, *[{"status": 500}] * partial_download.ATTEMPTS]
    with pytest.raises(DownloadError):
        fetch(url, folder=tmp_path)
    monkeypatch.setenv("RESBACKBONE_MIRROR", f"https://h={web.url}/another")
    web.content = OTHER
    assert fetch(url, folder=tmp_path).read_bytes() == OTHER


def test_busy_servers_are_retried(web, tmp_path):
    web.faults = [{"status": 503}, {"status": 500}, {"status": 429}]
    assert fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 500}, "HTTP 500 Internal Server Error, 4 times in a row"),
        ({"cut": 0}, "the connection ended after 0 of 1,048,576 bytes, 4 times in a row"),
    ],
)
def test_attempts_are_limited(web, tmp_path, fault, message):
    web.faults = [fault] * 100
    with pytest.raises(DownloadError, match=message):
        fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path)
    assert len(web.requests) == partial_download.ATTEMPTS
    assert named(CONTENT) not in files(tmp_path)


@pytest.mark.parametrize("lie", [1, 1000])
def test_a_file_that_is_shorter_than_promised_is_refused(web, tmp_path, lie):
    web.faults = [{"lie": lie}] * 100
    with pytest.raises(DownloadError, match="4 times in a row"):
        fetch(f"{web.url}/weights.pth", folder=tmp_path)
    assert not cache_path(f"{web.url}/weights.pth", folder=tmp_path).exists()


def test_a_file_that_is_cut_off_at_the_source_is_refused(web, tmp_path):
    """Its length is right, so that only the hash differs."""
    web.content = CONTENT[:-1]
    with pytest.raises(DownloadError, match=f"not {hashlib.sha256(CONTENT).hexdigest()[:8]}"):
        fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path)
    assert files(tmp_path) == []


def test_a_length_that_is_too_short_is_found_by_the_hash(web, tmp_path):
    web.faults = [{"lie": -1}]
    with pytest.raises(DownloadError, match="the file there has SHA-256"):
        fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path)
    assert files(tmp_path) == []


# Hashes


def test_another_file_than_expected_is_refused(web, tmp_path):
    web.content = OTHER
    url = f"{web.url}/{named(CONTENT)}"
    with pytest.raises(DownloadError) as caught:
        fetch(url, folder=tmp_path)
    said = str(caught.value)
    assert hashlib.sha256(OTHER).hexdigest() in said
    assert f"not {hashlib.sha256(CONTENT).hexdigest()[:8]}..., as its name says" in said
    assert "fetch(url, sha256_prefix='')" in said
    assert files(tmp_path) == []
    assert fetch(url, sha256_prefix="", folder=tmp_path).read_bytes() == OTHER


def test_a_hash_can_be_given(web, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert fetch(f"{web.url}/weights.pth", sha256_prefix=digest.upper(), folder=tmp_path).read_bytes() == CONTENT
    with pytest.raises(DownloadError, match=r"not 00000000\.\.\.;"):
        fetch(f"{web.url}/others.pth", sha256_prefix="00000000", folder=tmp_path)
    with pytest.raises(ValueError, match="must be up to 64 hexadecimal digits, got 'md5:1234'"):
        fetch(f"{web.url}/weights.pth", sha256_prefix="md5:1234", folder=tmp_path)


def test_a_spoilt_beginning_is_thrown_away(web, tmp_path):
    """A bit has flipped in the partial file of an earlier call."""
    url, part = f"{web.url}/{named(CONTENT)}", tmp_path / f"{named(CONTENT)}.part"
    web.faults = [{"cut": HALF}, *[{"status": 500}] * partial_download.ATTEMPTS]
    with pytest.raises(DownloadError):
        fetch(url, folder=tmp_path)
    assert part.stat().st_size == HALF
    part.write_bytes(OTHER[:HALF])
    assert fetch(url, folder=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"url": 1}'])
def test_a_beginning_of_unknown_origin_is_thrown_away(web, tmp_path, note):
    url = f"{web.url}/weights.pth"
    part = cache_path(url, folder=tmp_path)
    part.with_name(f"{part.name}.part").write_bytes(OTHER[:HALF])
    part.with_name(f"{part.name}.part.json").write_text(note)
    assert fetch(url, folder=tmp_path).read_bytes() == CONTENT
    assert files(tmp_path) == [part.name]


# Messages


def test_errors_say_where_to_put_the_file(web, tmp_path):
    web.faults = [{"status": 404}]
    url = f"{web.url}/models/{named(CONTENT)}"
    with pytest.raises(DownloadError) as caught:
        fetch(url, folder=tmp_path)
    said = str(caught.value)
    assert said.startswith(f"cannot download {url}: HTTP 404 Not Found; ")
    assert f"put the file at {str(tmp_path / named(CONTENT))!r} by hand" in said
    assert f"RESBACKBONE_MIRROR, such as '{web.url}=https://my.mirror'" in said
    assert len(web.requests) == 1
    (tmp_path / named(CONTENT)).write_bytes(CONTENT)  # as told
    assert fetch(url, folder=tmp_path).read_bytes() == CONTENT


def test_offline(tmp_path):
    """The domain .invalid never exists."""
    began = time.monotonic()
    with pytest.raises(DownloadError, match=r"is this machine online\?; put the file at .* by hand"):
        fetch("https://download.pytorch.invalid/resnet18-f37072fd.pth", folder=tmp_path)
    assert time.monotonic() - began < 10


def test_connection_refused(tmp_path):
    web = Web()
    web.server_close()
    with pytest.raises(DownloadError, match=r"no connection: .*refused.*, 4 times in a row"):
        fetch(f"{web.url}/a.pth", folder=tmp_path)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Content-Type": "text/html; charset=utf-8"}, "answers with a web page"),
        ({"Content-Encoding": "gzip"}, r"compresses the file \(gzip\)"),
    ],
)
def test_web_pages_and_compressed_files_are_refused(web, tmp_path, headers, message):
    web.faults = [{"headers": headers}]
    with pytest.raises(DownloadError, match=message):
        fetch(f"{web.url}/weights.pth", folder=tmp_path)
    assert files(tmp_path) == []


# Hostile servers

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def refused(web, folder, message, name="weights.pth", **options):
    """Assert that a download fails with a message and stores nothing."""
    with pytest.raises(DownloadError, match=message):
        fetch(f"{web.url}/{name}", folder=folder, **options)
    assert files(folder) == []


@pytest.mark.parametrize("validator", ['"v1"', None])
@pytest.mark.parametrize("length", [0, None])
def test_an_empty_file_is_refused(web, tmp_path, length, validator):
    web.content, web.etag = b"", validator
    web.faults = [{"headers": {"Content-Length": length}}] * 9
    refused(web, tmp_path, "the file there is empty")
    assert len(web.requests) == 1


def test_an_empty_file_in_the_cache_is_downloaded_again(web, tmp_path):
    path = cache_path(f"{web.url}/weights.pth", folder=tmp_path)
    path.touch()
    with pytest.warns(UserWarning, match="is damaged and downloaded anew"):
        assert fetch(f"{web.url}/weights.pth", folder=tmp_path).read_bytes() == CONTENT


LENGTHS = ["-1", "-5", "²", "٣", "+5", "1_000", "5, 6", "0x10", "5.0", "1e6", "five", "", "9" * 19, "9" * 5000]


@pytest.mark.parametrize("length", LENGTHS, ids=lambda length: ascii(length)[:20])
@pytest.mark.parametrize("name", ["weights.pth", named(CONTENT)], ids=["no hash", "hash"])
def test_a_length_that_is_none_is_refused(web, tmp_path, name, length):
    head = OK + b"Content-Length: " + length.encode("utf-8" if length == "٣" else "latin-1") + b"\r\n\r\n"
    web.faults = [{"answer": [head, CONTENT]}] * 9
    refused(web, tmp_path, "the server sends an invalid Content-Length: '", name)
    assert len(web.requests) == 1


def test_two_lengths_are_refused_and_one_twice_is_not(web, tmp_path):
    web.faults = [{"answer": [OK, b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"]}]
    refused(web, tmp_path, "the server sends an invalid Content-Length: '5, 6'")
    web.faults = [{"answer": [OK, b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nabcde"]}]
    assert fetch(f"{web.url}/weights.pth", folder=tmp_path).read_bytes() == b"abcde"


@pytest.mark.parametrize(
    "text", ["bytes 1000-1048575/²", "bytes 1000-1048575/-5", "bytes +1000-9/10", "bytes 1_000-9/10", "items 1-2/3", ""]
)
def test_a_range_that_is_none_is_refused(web, tmp_path, text):
    part = {"status": 206, "headers": {"Content-Range": text}}
    web.faults = [{"cut": 1000}, part]
    with pytest.raises(DownloadError, match="the server sends an invalid Content-Range: '"):
        fetch(f"{web.url}/weights.pth", folder=tmp_path)
    assert len(web.requests) == 2
    assert fetch(f"{web.url}/weights.pth", folder=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("length", [len(CONTENT), None, 10**17])
def test_a_file_that_is_too_large_is_refused(web, tmp_path, length):
    web.faults = [{"headers": {"Content-Length": length}}]
    refused(web, tmp_path, r"bytes or more, where 100,000 are allowed \(fetch\(url, max_bytes", max_bytes=100_000)
    assert len(web.requests) == 1
    assert fetch(f"{web.url}/weights.pth", folder=tmp_path, max_bytes=len(CONTENT)).read_bytes() == CONTENT


@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_that_is_none(tmp_path, value):
    with pytest.raises(ValueError, match="`max_bytes` must be at least 1"):
        fetch("https://h/a.pth", folder=tmp_path, max_bytes=value)


def test_the_catalog_knows_how_large_a_file_may_be(web, tmp_path, monkeypatch):
    weights = next(one for one in list_weights("torchvision/resnet18*") if one.size_mib)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("RESBACKBONE_MIRROR", f"https://download.pytorch.org={web.url}")
    web.faults = [{"headers": {"Content-Length": int(weights.size_mib * 2**20 * 2)}}]
    with pytest.raises(DownloadError, match=r"bytes or more, where .* are allowed"):
        locate(weights.name)


ENDLESS = {
    "body": pour(OK + b'ETag: "v1"\r\n\r\n', b"1" * 65536),
    "chunks": pour(CHUNKED, b"1000\r\n" + b"1" * 4096 + b"\r\n"),
    "negative chunk": pour(CHUNKED, b"-5\r\n"),
    "trailers": pour(CHUNKED + b"0\r\n", b"a: b\r\n"),
    "body of a redirection": pour(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\n\r\n", b"1" * 65536),
    "interim answers": pour(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("answer", ENDLESS)
def test_endless_responses(web, tmp_path, answer):
    web.faults = [{"answer": ENDLESS[answer]} for _ in range(9)]
    refused(web, tmp_path, "too many bytes|bytes or more, where|times in a row", max_bytes=1 << 20)


DRIPS = {
    "body": OK + b"Content-Length: 1000000\r\n\r\n",
    "body without length": OK + b"\r\n",
    "chunk": CHUNKED + b"100000\r\n",
    "header": OK + b"Server: ",
    "status": b"",
}


@pytest.mark.parametrize("head", DRIPS)
def test_a_byte_now_and_then_is_a_stall(web, tmp_path, monkeypatch, head):
    monkeypatch.setattr(http_requests, "WINDOW", 0.2)
    web.faults = [{"answer": drip(DRIPS[head], 0.01)} for _ in range(9)]
    refused(web, tmp_path, "the server stalls: less than 1,024 bytes a second came in .* seconds, 4 times in a row")
    assert len(web.requests) == http_requests.MAX_STALLS


def test_a_byte_for_each_connection_is_a_stall(web, tmp_path, monkeypatch):
    monkeypatch.setattr(http_requests, "WINDOW", 0.2)
    monkeypatch.setattr(http_requests, "MIN_RATE", 10**9)
    web.faults = [{"cut": 1} for _ in range(100_000)]
    with pytest.raises(DownloadError, match="the server stalls"):
        fetch(f"{web.url}/weights.pth", folder=tmp_path)


def test_a_slow_connection_is_no_stall(web, tmp_path, monkeypatch):
    monkeypatch.setattr(http_requests, "WINDOW", 0.1)
    monkeypatch.setattr(http_requests, "MIN_RATE", 100)
    pieces = [b"1" * 4096 for _ in range(8)]
    web.faults = [{"answer": (time.sleep(0.05) or piece for piece in [OK + b"Content-Length: 32768\r\n\r\n", *pieces])}]
    assert fetch(f"{web.url}/weights.pth", folder=tmp_path).stat().st_size == 32768


@pytest.mark.parametrize("end", [b"", b"1000\r\n", b"1000\r\nab", b"zz\r\n", b"\r\n"])
def test_chunks_that_are_cut_short_are_refused(web, tmp_path, end):
    web.faults = [{"answer": [CHUNKED, b"5\r\nabcde\r\n", end]} for _ in range(9)]
    refused(web, tmp_path, "the connection broke: .*IncompleteRead.*, 4 times in a row")


def test_chunks_without_a_length_are_put_together(web, tmp_path):
    web.faults = [{"answer": [CHUNKED, b"5\r\nabcde\r\n", b"3;x=y\r\nfgh\r\n0\r\n\r\n"]}]
    assert fetch(f"{web.url}/weights.pth", folder=tmp_path).read_bytes() == b"abcdefgh"


@pytest.mark.parametrize(
    "header", [b"Content-Encoding: gzip", b"Content-Encoding: br", b"Transfer-Encoding: gzip, chunked"]
)
def test_compressed_bytes_are_refused(web, tmp_path, header):
    web.faults = [{"answer": [OK + header + b"\r\n\r\n", CONTENT]}]
    refused(web, tmp_path, r"the server compresses the file \(")


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("gewichte_ä.pth", "/gewichte_%C3%A4.pth"),
        ("gewichte_%C3%A4.pth", "/gewichte_%C3%A4.pth"),
        ("权重/a.pth?b=ö", "/%E6%9D%83%E9%87%8D/a.pth?b=%C3%B6"),
        ("a\u2028\x85.pth", "/a%E2%80%A8%C2%85.pth"),
    ],
)
def test_addresses_that_are_not_ascii_are_encoded(web, tmp_path, path, asked):
    assert fetch(f"{web.url}/{path}", folder=tmp_path).read_bytes() == CONTENT
    assert [path for path, _ in web.requests] == [asked]
    assert fetch(f"{web.url}{asked}", folder=tmp_path).read_bytes() == CONTENT
    assert len(web.requests) == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://user:secret@h/a.pth", "has no user name or password in it, as that of 'h' has"),
        ("http://user@h/a.pth", "has no user name or password"),
        ("http://[::1/a.pth", "is malformed"),
        ("http://h:99999/a.pth", "is malformed"),
        ("http://h:port/a.pth", "is malformed"),
        ("http://a..b/a.pth", "is malformed"),
        (f"http://{'a' * 64}.org/a.pth", "is malformed"),
        (f"http://{'ä' * 64}.org/a.pth", "is malformed"),
        ("http://h/\udcff.pth", "is malformed"),
        ("http://:80/a.pth", "begins with http"),
        ("http://h/a\n.pth", "begins with http"),
        ("http://h/a\x00.pth", "begins with http"),
        ("http://h/a\x7f.pth", "begins with http"),
    ],
)
def test_malformed_addresses_are_refused_in_words(web, tmp_path, monkeypatch, url, words):
    with pytest.raises(ValueError, match=words) as caught:
        fetch(url, folder=tmp_path)
    assert "secret" not in str(caught.value)
    assert files(tmp_path) == []
    location = url.encode("utf-8", "surrogateescape").replace(b"\n", b"\n ")
    web.faults = [{"answer": [b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n"]}] * 9
    refused(web, tmp_path, "cannot download")


def test_international_hosts_are_requested_by_their_ascii_name():
    url = "https://BÜCHER.example:8080/ä b.pth".replace(" ", "")
    assert http_requests.ascii_address("it", url) == "https://xn--bcher-kva.example:8080/%C3%A4b.pth"
    for same in ("https://[::1]:80/a.pth", "https://h/a%20b.pth?x=1#y", "http://a_b.org/~a"):
        assert http_requests.ascii_address("it", same) == same


def test_redirections_to_other_letters_are_followed(web, tmp_path):
    web.faults = [{"answer": [b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: /\xc3\xa4.pth\r\n\r\n"]}]
    assert fetch(f"{web.url}/weights.pth", folder=tmp_path).read_bytes() == CONTENT
    assert [path for path, _ in web.requests] == ["/weights.pth", "/%C3%A4.pth"]


@pytest.mark.parametrize("letter", ["a", "ä", "权"])
def test_long_names_are_cut(web, tmp_path, letter):
    path = fetch(f"{web.url}/{letter * 300}-11ad3fa6.pth", sha256_prefix="", folder=tmp_path)
    assert path.read_bytes() == CONTENT
    assert path.name.endswith("-11ad3fa6.pth")


# Redirections and mirrors


def test_redirections_are_followed_with_the_range(web, tmp_path):
    away = {"status": 302, "headers": {"Location": f"{web.url}/elsewhere"}}
    web.faults = [away, {"cut": 1000}, away]
    path = fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path)
    assert path.read_bytes() == CONTENT
    assert [asked for asked, _ in web.requests] == [f"/{path.name}", "/elsewhere"] * 2
    assert web.starts == [0, 0, 1000, 1000]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("{}/again", "redirect error that would lead to an infinite loop"),
        ("file:///etc/passwd", "leads to file:///etc/passwd, which is not followed"),
        ("ftp://h/a.pth", "leads to ftp://h/a.pth, which is not followed"),
    ],
)
def test_invalid_redirections(web, tmp_path, location, message):
    web.faults = [{"status": 302, "headers": {"Location": location.format(web.url)}}] * 100
    with pytest.raises(DownloadError, match=message):
        fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path)
    assert files(tmp_path) == []


def test_no_redirection_leads_out_of_https():
    request = urllib.request.Request("https://h/a.pth")
    redirections = http_requests.Redirections()
    with pytest.raises(urllib.request.HTTPError, match=r"leads to http://h/a.pth, which is not followed"):
        redirections.redirect_request(request, None, 302, "", request.headers, "http://h/a.pth")
    assert redirections.redirect_request(request, None, 302, "", request.headers, "https://g/a.pth").host == "g"


def test_a_mirror_is_used_instead(web, tmp_path, monkeypatch):
    monkeypatch.setenv("RESBACKBONE_MIRROR", f"https://download.pytorch.org={web.url}/pytorch/")
    url = f"https://download.pytorch.org/models/{named(CONTENT)}"
    assert fetch(url, folder=tmp_path) == tmp_path / named(CONTENT)
    assert web.requests[0][0] == f"/pytorch/models/{named(CONTENT)}"
    web.faults = [{"status": 404}]
    with pytest.raises(DownloadError, match=f"{named(OTHER)} by way of {web.url}/pytorch/models/{named(OTHER)}: HTTP"):
        fetch(f"https://download.pytorch.org/models/{named(OTHER)}", folder=tmp_path)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://a.org/x/y.pth", "https://long/y.pth"),
        ("https://a.org/xx/y.pth", "http://short/m/xx/y.pth"),
        ("https://a.org.evil/x/y.pth", "https://a.org.evil/x/y.pth"),
        ("https://b.org/y.pth", "https://b.org/y.pth"),
    ],
)
def test_the_longest_prefix_counts(monkeypatch, url, expected):
    monkeypatch.setenv("RESBACKBONE_MIRROR", "https://a.org=http://short/m, https://a.org/x=https://long,")
    assert mirrored(url) == expected


@pytest.mark.parametrize("value", ["https://a.org", "a.org=https://b.org", "https://a.org=/mnt/mirror"])
def test_a_malformed_mirror_is_an_error(monkeypatch, value):
    monkeypatch.setenv("RESBACKBONE_MIRROR", value)
    with pytest.raises(ValueError, match=r"RESBACKBONE_MIRROR must hold PREFIX=REPLACEMENT,\.\.\.; .* got '"):
        mirrored("https://c.org/x.pth")


# Concurrent and killed processes


def test_two_processes_download_once(web, tmp_path):
    web.faults = [{"cut": HALF, "wait": True}]
    code = "print('ready', flush=True); print(fetch(sys.argv[1], folder=Path(sys.argv[2])))"
    arguments = (f"{web.url}/{named(CONTENT)}", tmp_path)
    with start(code, *arguments) as one, start(code, *arguments) as another:
        for process in (one, another):
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)  # both are at it: one holds the lock and waits for bytes, the other for the lock
        web.release.set()
        for process in (one, another):
            out, err = process.communicate(timeout=30)
            assert process.returncode == 0, err
            assert Path(out.strip()).read_bytes() == CONTENT
    assert web.starts == [0, HALF]  # one download, whose connection was cut once
    assert files(tmp_path) == [named(CONTENT)]


def test_a_kill_leaves_nothing_that_looks_whole(web, tmp_path):
    url = f"{web.url}/{named(CONTENT)}"
    web.faults = [{"cut": HALF, "wait": True}]
    part = tmp_path / f"{named(CONTENT)}.part"
    with start("fetch(sys.argv[1], folder=Path(sys.argv[2]))", url, tmp_path) as process:
        while not part.exists() or not part.stat().st_size:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert files(tmp_path) == [part.name, f"{part.name}.json"]
    begun = part.stat().st_size
    assert fetch(url, folder=tmp_path).read_bytes() == CONTENT
    assert web.starts == [0, begun]
    assert files(tmp_path) == [named(CONTENT)]


def test_a_kill_before_the_file_got_its_name(web, tmp_path):
    """Every byte is there, and is not requested again."""
    url = f"{web.url}/{named(CONTENT)}"
    code = "from resbackbone.checkpoints.hub.partial_download import PartialDownload as Part; import os, signal\n"
    code += "Part.move_to = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    with start(code + "fetch(sys.argv[1], folder=Path(sys.argv[2]))", url, tmp_path) as process:
        assert process.wait(30) == -signal.SIGKILL
    assert named(CONTENT) not in files(tmp_path)
    assert fetch(url, folder=tmp_path).read_bytes() == CONTENT
    assert len(web.requests) == 1


def test_the_bytes_are_on_the_disk_before_the_file_has_its_name(web, tmp_path, monkeypatch):
    """Otherwise a power cut could leave an incomplete file under the final name."""
    done = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("sync") or sync(file))
    monkeypatch.setattr(Path, "replace", lambda *paths: done.append("replace") or replace(*paths))
    fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path)
    assert done == ["sync", "replace"]


# Full disks


def test_a_disk_that_fills_up(web, tmp_path):
    url = f"{web.url}/{named(CONTENT)}"
    with file_size_limit(HALF), pytest.raises(OSError, match=f"cannot store {url} at '.*{named(CONTENT)}'") as caught:
        fetch(url, folder=tmp_path)
    assert caught.value.errno == errno.EFBIG
    assert not isinstance(caught.value, DownloadError)
    assert named(CONTENT) not in files(tmp_path)
    assert fetch(url, folder=tmp_path).read_bytes() == CONTENT


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 512 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("length", [{}, {"Content-Length": None}], ids=["known before", "found out"])
def test_a_full_disk(web, small_disk, length):
    url = f"{web.url}/{named(CONTENT)}"
    web.faults = [{"headers": length}]
    with pytest.raises(OSError, match=f"cannot store {url} at '.*{named(CONTENT)}'") as caught:
        fetch(url, folder=small_disk)
    assert caught.value.errno == errno.ENOSPC
    if not length:
        assert "it needs 1,048,576 bytes" in str(caught.value)
    assert named(CONTENT) not in files(small_disk)


def test_a_cache_that_cannot_be_written(web, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(OSError, match=r"cannot store .* (File exists|Not a directory)"):
        fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path / "cache")
    assert web.requests == []


def test_a_read_only_cache_is_read(web, tmp_path):
    path = fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path)
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()
    assert fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path) == path
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # nothing was written, no lock either


def test_a_progress_bar_on_a_terminal(web, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Console, "is_terminal", True)
    fetch(f"{web.url}/{named(CONTENT)}", folder=tmp_path)
    watched = capsys.readouterr()
    assert named(CONTENT) in watched.err
    assert watched.out == ""
    monkeypatch.setattr(Console, "is_terminal", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fetch(f"{web.url}/quiet.pth", folder=tmp_path)
    assert capsys.readouterr().err == ""
