"""Read third-party checkpoints of any file format as tensors and plain values, without running code in them."""

from __future__ import annotations

import errno
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resbackbone.checkpoints.readers import torch_files
from resbackbone.checkpoints.readers.open_file import OpenFile
from resbackbone.checkpoints.readers.placeholders import ADVICE, Inert, UnreadableError, View, excerpt
from resbackbone.checkpoints.readers.plain_values import Skip, skip_nothing, to_tree
from resbackbone.checkpoints.readers.safe_unpickler import SafeUnpickler
from resbackbone.checkpoints.readers.safetensors_files import read_safetensors
from resbackbone.checkpoints.readers.shards import find_in_folder, read_shards

_KINDS = "PyTorch's .pth, pickles of numpy arrays, .npz, .safetensors, the index of shards, a folder of these"
_PICKLE = re.compile(rb"\x80|[(\]}]|c[\w.]+\n[\w.]+\n")  # of any protocol; the first ones are text
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f]")  # what text has none of
# Weights hardly shrink when they are compressed: a file that grows by more than this is a bomb.
_MAX_GROWTH = 20
_NO_MEMORY = re.compile("can't allocate memory|not enough memory")  # what PyTorch's allocator says
_SHOWN = 5
_PLACE = 60  # characters


def read_file(path: str | Path, *, skipped: Skip = skip_nothing) -> dict[str, Any]:
    """Return what the file of a checkpoint holds.

    Its kind is told by its content, not by its suffix: PyTorch's zip files and its format before 1.6; pickles of numpy
    arrays (``.pkl`` of Detectron and detectron2, ``.pdparams`` of PaddlePaddle); ``.npz``; ``.safetensors``. Shards of
    any of these are read by the path of their index (``model.safetensors.index.json``,
    ``pytorch_model.bin.index.json``), and what transformers' ``save_pretrained`` has written by the path of its folder.
    Nothing in a file is run, and no more memory is taken than its numbers need. Each of its parts is read once, into
    memory that is the tensors' own: what is done to the file later changes nothing.

    Args:
        path: The file or folder.
        skipped: Whether mappings and lists below a key, at any depth, are left out, and their tensors not read.

    Returns:
        The names in it, each with a tensor, a plain value, or a mapping, list, tuple or set of these. Objects of other
        classes, and classes and functions, come as `Inert`, which has their name. Tensors are on the CPU and may
        share storage; writing to them does not change the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, damaged, was written to while it was read, or has tensors inside objects
            of other classes, whose name the error tells.
    """
    path = Path(path)
    if path.is_dir():
        path = find_in_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}; give the path of a file: {_KINDS}")
    try:
        return _named(_read(path, skipped))
    except UnreadableError as error:
        raise ValueError(f"{str(path)!r} {error}") from error
    except MemoryError as error:
        raise ValueError(f"{str(path)!r} needs more memory than there is") from error
    except Exception as error:  # damage makes zip, struct, json, numpy and the unpickler raise errors of many kinds
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which places outside of the file lead to
            raise
        if isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)):
            raise ValueError(f"{str(path)!r} needs more memory than there is") from error
        reason = excerpt(str(error), 200)
        raise ValueError(
            f"{str(path)!r} is damaged, download or copy it again ({type(error).__name__}: {reason})"
        ) from error


def not_loaded(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Say which objects in what :func:`read_file` has returned are stand-ins: their classes, and where they are."""
    places: dict[str, list[str]] = {}
    for name, place in _inert(content, ""):
        places.setdefault(name, []).append(place)
    notes = []
    for name, found in places.items():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        notes.append(f"{name} at {excerpt(found[0], _PLACE)!r}{more}")
    return (*notes[:_SHOWN], *([f"{len(notes) - _SHOWN} more classes"] if len(notes) > _SHOWN else []))


def _inert(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Inert):
        yield value.name, place
    elif isinstance(value, Mapping):
        for key, item in value.items():
            below = _below(place, key)
            if not isinstance(key, str):
                yield from _inert(key, below)
            yield from _inert(item, below)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _inert(item, place)


def _below(place: str, key: object) -> str:
    """Join a place and a key, of which no more is kept than can be shown."""
    text = excerpt(key, _PLACE) if isinstance(key, str) else _short(key)
    return place if len(place) > _PLACE else f"{place}.{text}" if place else text


def _short(key: object) -> str:
    """Show a key that is no text; long ones by their type alone."""
    if isinstance(key, (Inert, float, complex)) or key is None or (isinstance(key, int) and abs(key) < 2**63):
        return excerpt(str(key), _PLACE)
    return type(key).__name__


def check_weights(tensors: Mapping[str, Tensor]) -> None:
    """Raise unless all tensors are dense and real, and all their values finite.

    Raises:
        ValueError: If some are not, naming the first five.
    """
    unsound = [f"{excerpt(key, 200)} ({problem})" for key, tensor in tensors.items() if (problem := _problem(tensor))]
    if unsound:
        more = f" and {len(unsound) - 5} more" if len(unsound) > 5 else ""
        raise ValueError(f"weights must be finite real numbers, but not so {', '.join(unsound[:5])}{more}")


def _problem(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return "not dense"
    if tensor.is_complex():
        return "complex"
    if not tensor.is_floating_point():
        return ""
    if tensor.itemsize == 1:  # the 8-bit types have no arithmetic
        tensor = tensor.float()
    # A sum shows every NaN and infinity, in a fraction of the time; it may also overflow, hence the second look.
    if tensor.sum().isfinite() or tensor.isfinite().all():
        return ""
    return "NaN" if tensor.isnan().any() else "infinite"


def _read(path: Path, skipped: Skip, *, index: bool = True) -> Any:
    if not path.is_file():
        raise UnreadableError(f"is no regular file; give the path of one: {_KINDS}")
    with OpenFile(path) as opened:
        return _read_opened(opened, path, skipped, index=index)


def _read_opened(opened: OpenFile, path: Path, skipped: Skip, *, index: bool) -> Any:
    head = opened.read(0, min(512, opened.size))
    if not head:
        raise UnreadableError("is empty; download or copy it again")
    is_text = not _CONTROL.search(head)
    if head.startswith(b"PK"):
        return _read_zip(opened, skipped)
    if torch_files.LEGACY_MAGIC.match(head):
        return torch_files.read_legacy(opened, skipped)
    if head[8:9] == b"{" and not is_text:
        return read_safetensors(opened)
    if _PICKLE.match(head):
        opened.file.seek(0)
        return to_tree(SafeUnpickler(opened.file, opened.size).load(), _refuse_view, skipped)
    if is_text:
        return _read_text(opened, path, index=index)
    if head[257:262] == b"ustar":
        raise UnreadableError("is a tar file, as PyTorch wrote before 2017; load it there and save it again")
    raise UnreadableError(f"begins with {head[:8]!r}, which no kind of checkpoint does that is read: {_KINDS}")


def _named(content: object) -> dict[str, Any]:
    """Return the content if every tensor in it has a name; what has None for a name is noted as not loaded."""
    if isinstance(content, Inert):
        raise UnreadableError(
            f"names {content.name!r}, which is neither a tensor nor a numpy array nor a plain value; {ADVICE}"
        )
    if not isinstance(content, dict):
        raise UnreadableError(f"holds no mapping of names to tensors but a {type(content).__name__}")
    pending = [content]
    for mapping in pending:  # grows by the mappings inside
        for key, value in mapping.items():
            if key is None and isinstance(value, Tensor):
                mapping[key] = Inert("torch.Tensor")
            elif not isinstance(key, str) and isinstance(value, Tensor):
                raise UnreadableError(f"has the key {_short(key)} where a name should be")
            if isinstance(value, dict):
                pending.append(value)
    return content


def _refuse_view(view: View) -> Tensor:
    raise UnreadableError("refers to tensors outside of itself; save them with torch.save")


def _read_zip(opened: OpenFile, skipped: Skip) -> Any:
    try:
        archive = zipfile.ZipFile(opened.file)
    except zipfile.BadZipFile as error:
        raise UnreadableError(
            f"is a zip file that is cut off or damaged; download or copy it again ({error})"
        ) from error
    members = archive.infolist()
    names = archive.namelist()
    if len({name.lower() for name in names}) < len(names):
        raise UnreadableError("is a zip file with two members of one name")
    if any(name.endswith("/constants.pkl") for name in names):
        raise UnreadableError("is a TorchScript archive, which holds code; save its state_dict() instead")
    roots = [match[1] for name in names if (match := re.fullmatch(r"([^/]+/)data\.pkl", name))]
    if len(roots) == 1:
        return torch_files.read_zip(opened, archive, roots[0], skipped)
    if names and all(name.endswith(".npy") for name in names):
        grown = sum(member.file_size for member in members)
        if grown > _MAX_GROWTH * opened.size:
            raise UnreadableError(f"would grow from {opened.size:,} to {grown:,} bytes; nothing was unpacked")
        return {member.filename.removesuffix(".npy"): _read_npy(archive, member) for member in members}
    raise UnreadableError(
        f"is a zip file of neither PyTorch nor numpy, of {excerpt(', '.join(names[:5]), 200) or 'no members'}"
    )


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor | Inert:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnreadableError("has members that are compressed in another way than numpy's")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        name = excerpt(member.filename, 50)
        if dtype.kind in "SUmM":
            return Inert("numpy.ndarray")
        if dtype.hasobject or dtype.kind not in "biufc":
            raise UnreadableError(f"holds {name!r} of type {dtype}; only arrays of numbers are read")
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise UnreadableError(f"declares {name!r} of shape {shape}, which is not its size")
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False)
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))


def _read_text(opened: OpenFile, path: Path, *, index: bool) -> dict[str, Tensor]:
    start = opened.read(0, min(512, opened.size))
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise UnreadableError(
            "is the pointer that Git LFS leaves in a file's place; run `git lfs pull`, or download it"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UnreadableError("is a web page, perhaps the error page of a failed download; download it again")
    if not text.startswith(b"{"):
        raise UnreadableError(f"is text and no checkpoint; it begins with {start[:40]!r}")
    if not index:
        raise UnreadableError("is JSON and no checkpoint")
    return read_shards(opened, path.parent, lambda shard: _read(shard, skip_nothing, index=False))
