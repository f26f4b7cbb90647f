"""Downloads of checkpoints into torch's cache: atomic, resumable, checked against the hash in the file name.

The cache is ``checkpoints/`` in ``torch.hub.get_dir()``, which ``TORCH_HOME`` moves. A file with the first digits of
its SHA-256 in its name, such as ``resnet50-11ad3fa6.pth``, has that name in the cache, as with torch.hub, torchvision,
timm and mmengine: files that they downloaded are used if the hash is right. The name of any other file begins with the
eight first digits of the hash of its URL, because many files are called ``model.safetensors``.

The environment variable ``RESBACKBONE_MIRROR`` redirects downloads to mirrors. It holds pairs ``PREFIX=REPLACEMENT``,
separated by commas; of several prefixes that fit a URL the longest is used::

    RESBACKBONE_MIRROR="https://download.openmmlab.com=https://my.mirror/mm,https://huggingface.co=https://hf.mirror"

An interrupted download leaves ``NAME.part`` and a note beside it, from which the next call resumes, in any process.
``NAME.lock`` excludes other processes, and is not deleted.
"""

from __future__ import annotations

import hashlib
import os
import re
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from filelock import FileLock

from resbackbone.checkpoints.hub.http_requests import TransferError, ascii_address
from resbackbone.checkpoints.hub.partial_download import PartialDownload, complete
from resbackbone.utils.validation import check_int, warn_user

MIRROR_VARIABLE = "RESBACKBONE_MIRROR"
MAX_BYTES = 16 * 2**30  # of a file of unknown size; the largest published weights have less than 4 GiB

_MAX_NAME = 200  # bytes; ".part.json" is appended, and file systems permit 255


class DownloadError(OSError):
    """A file could not be downloaded; the message says where to put it by hand."""


def fetch(
    url: str, *, sha256_prefix: str | None = None, folder: Path | None = None, max_bytes: int = MAX_BYTES
) -> Path:
    """Return the local copy of a file on the web, and download it if necessary.

    Args:
        url: An http or https address, as published; mirrors are applied here. Characters that are not ASCII are
            encoded.
        sha256_prefix: The first hexadecimal digits of the file's SHA-256. None uses those in the file name, between a
            hyphen and a dot, if there are 8 or more and they are not a date; ``""`` checks nothing.
        folder: The folder of the file; torch's cache unless given.
        max_bytes: The largest size to accept.

    Returns:
        The file: complete, and with the right hash if one is known.

    Raises:
        ValueError: If the URL, the prefix or ``RESBACKBONE_MIRROR`` is malformed.
        DownloadError: If the file cannot be downloaded, is empty or too large, or has the wrong hash, or if the server
            stalls. Only a part from which a later call can resume is stored then.
        OSError: If it cannot be written, say because the disk is full.
    """
    check_int("max_bytes", max_bytes, low=1)
    target = cache_path(url, folder=folder)
    source = mirrored(url)
    expected = _hash_in(target.name) if sha256_prefix is None else _check_hash(sha256_prefix)
    if _is_right(target, expected):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _is_right(target, expected):  # another process may have downloaded it meanwhile
                if target.exists():
                    warn_user(f"{str(target)!r} is damaged and downloaded anew")
                _download(source, target, expected, guessed=sha256_prefix is None, max_bytes=max_bytes)
    except TransferError as error:
        by_way_of = "" if source == url else f" by way of {source}"
        raise DownloadError(
            f"cannot download {url}{by_way_of}: {error}; put the file at {str(target)!r} by hand, or name a mirror "
            f"in the environment variable {MIRROR_VARIABLE}, such as '{_origin(url)}=https://my.mirror'"
        ) from error
    except OSError as error:
        raise OSError(error.errno, f"cannot store {url} at {str(target)!r}: {error.strerror or error}") from error
    return target


def cache_path(url: str, *, folder: Path | None = None) -> Path:
    """Return the path at which :func:`fetch` stores a file, whether it exists or not.

    Raises:
        ValueError: If the URL is malformed or does not end in a file name.

    >>> cache_path("https://download.pytorch.org/models/resnet50-11ad3fa6.pth", folder=Path("cache")).name
    'resnet50-11ad3fa6.pth'
    >>> cache_path("https://huggingface.co/timm/resnet18/resolve/main/model.safetensors", folder=Path("cache")).name
    'ed32dd7b_model.safetensors'
    """
    url = ascii_address("a download's URL", url)
    name = re.split(r"[/\\]", unquote(urlsplit(url).path))[-1]
    if not name.strip(". "):
        raise ValueError(f"a download's URL must end in the name of a file, got {url!r}")
    name = os.fsencode(re.sub(r"[^\w.+=@ -]", "_", name))[-_MAX_NAME:].decode("utf-8", "ignore")
    if not _hash_in(name):
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}"
    return (folder or Path(torch.hub.get_dir(), "checkpoints")) / name


def mirrored(url: str) -> str:
    """Replace a prefix of a URL as ``RESBACKBONE_MIRROR`` says; without a match, return the URL.

    Raises:
        ValueError: If the variable does not hold pairs of addresses.
    """
    found: dict[str, str] = {}
    url = ascii_address("a download's URL", url)
    for pair in filter(None, os.environ.get(MIRROR_VARIABLE, "").split(",")):
        prefix, _, replacement = pair.strip().partition("=")
        prefix, replacement = (
            ascii_address(f"{MIRROR_VARIABLE} must hold PREFIX=REPLACEMENT,...; each of them", address)
            for address in (prefix, replacement)
        )
        rest = url.removeprefix(prefix)
        if rest != url and (prefix.endswith("/") or rest[:1] in ("", "/")):
            found[prefix] = replacement.rstrip("/") + "/" + rest.lstrip("/")
    return found[max(found, key=len)] if found else url


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _check_hash(prefix: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{0,64}", prefix):
        raise ValueError(f"`sha256_prefix` must be up to 64 hexadecimal digits, got {prefix!r}")
    return prefix.lower()


def _hash_in(name: str) -> str:
    """Return the digits of the hash in a file name; empty if there are none, or if they are a date."""
    found = re.search(r"-([0-9a-f]{8,64})(?=\.)", name)
    return found[1] if found and not _is_date(found[1]) else ""


def _is_date(digits: str) -> bool:
    try:
        return 1990 <= datetime.strptime(digits, "%Y%m%d").year < 2100
    except ValueError:
        return False


def _is_right(path: Path, expected: str) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    return not expected or _sha256(path).startswith(expected)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _download(source: str, target: Path, expected: str, *, guessed: bool, max_bytes: int) -> None:
    """Download a file to its final name, or raise."""
    part = PartialDownload(target.with_name(f"{target.name}.part"))
    found_some = part.size > 0
    complete(part, source, name=target.name, max_bytes=max_bytes)
    found = _sha256(part.path) if expected else ""
    if found.startswith(expected):
        part.move_to(target)
        return
    part.delete()
    if found_some:  # the part of an earlier call may have been wrong
        _download(source, target, expected, guessed=guessed, max_bytes=max_bytes)
        return
    hint = ", as its name says (if that is no hash: fetch(url, sha256_prefix=''))" if guessed else ""
    raise TransferError(f"the file there has SHA-256 {found}, not {expected}...{hint}")
