"""Reader of checkpoint files of any format as tensors and plain values, without running code in them."""

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
from resbackbone.checkpoints.readers.errors import ADVICE, UnreadableError
from resbackbone.checkpoints.readers.open_file import OpenFile
from resbackbone.checkpoints.readers.placeholders import Placeholder, View
from resbackbone.checkpoints.readers.plain_values import Skip, skip_nothing, to_tree
from resbackbone.checkpoints.readers.safe_unpickler import SafeUnpickler
from resbackbone.checkpoints.readers.safetensors_files import read_safetensors
from resbackbone.checkpoints.readers.shards import find_in_folder, read_shards
from resbackbone.utils.validation import excerpt

_KINDS = "PyTorch's .pth, pickles of numpy arrays, .npz, .safetensors, the index of shards, a folder of these"
_PICKLE = re.compile(rb"\x80|[(\]}]|c[\w.]+\n[\w.]+\n")  # of any protocol; the first ones are text
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f]")  # characters that text does not have
# Weights hardly shrink when they are compressed: a file that grows by more than this factor is a zip bomb.
_MAX_GROWTH = 20
_NO_MEMORY = re.compile("can't allocate memory|not enough memory")  # what PyTorch's allocator says
_SHOWN = 5
_PLACE = 60  # characters


def read_file(path: str | Path, *, skipped: Skip = skip_nothing) -> dict[str, Any]:
    """Read a checkpoint file.

    The format is detected from the content, not from the suffix: PyTorch's zip archives and its legacy format from
    before 1.6; pickles of numpy arrays (``.pkl`` of Detectron and detectron2, ``.pdparams`` of PaddlePaddle); ``.npz``;
    ``.safetensors``. Shards of any of these are read by the path of their index (``model.safetensors.index.json``,
    ``pytorch_model.bin.index.json``), and the files of transformers' ``save_pretrained`` by the path of their folder.
    No code in a file is run, and no more memory is allocated than its tensors need. Each part is read once, into memory
    of its own, so that later changes of the file have no effect.

    Args:
        path: The file or folder.
        skipped: Whether a key, at any depth, is skipped with its mapping or list, so that the tensors there are not
            read.

    Returns:
        The content by name: tensors, plain values, and mappings, lists, tuples or sets of these. Objects of other
        classes, and classes and functions, become `Placeholder`, which has their name. Tensors are on the CPU and may
        share storage.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint, is damaged, was written to while it was read, or has tensors inside
            objects of other classes, which the error names.
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
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: an offset outside of the file
            raise
        if isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)):
            raise ValueError(f"{str(path)!r} needs more memory than there is") from error
        reason = excerpt(str(error), 200)
        raise ValueError(
            f"{str(path)!r} is damaged, download or copy it again ({type(error).__name__}: {reason})"
        ) from error


def describe_placeholders(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Describe the objects that :func:`read_file` did not load: class and place of each, at most five classes."""
    places: dict[str, list[str]] = {}
    for name, place in _placeholders(content, ""):
        places.setdefault(name, []).append(place)
    notes = []
    for name, found in places.items():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        notes.append(f"{name} at {excerpt(found[0], _PLACE)!r}{more}")
    return (*notes[:_SHOWN], *([f"{len(notes) - _SHOWN} more classes"] if len(notes) > _SHOWN else []))


def _placeholders(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Placeholder):
        yield value.name, place
    elif isinstance(value, Mapping):
        for key, item in value.items():
            below = _below(place, key)
            if not isinstance(key, str):
                yield from _placeholders(key, below)
            yield from _placeholders(item, below)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _placeholders(item, place)


def _below(place: str, key: object) -> str:
    """Join a place and a key, shortened to what can be shown."""
    text = excerpt(key, _PLACE) if isinstance(key, str) else _short(key)
    return place if len(place) > _PLACE else f"{place}.{text}" if place else text


def _short(key: object) -> str:
    """Return a key that is not text as text; long ones as their type."""
    if isinstance(key, (Placeholder, float, complex)) or key is None or (isinstance(key, int) and abs(key) < 2**63):
        return excerpt(str(key), _PLACE)
    return type(key).__name__


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
    """Return the content if every tensor in it has a name; tensors with the name None become placeholders."""
    if isinstance(content, Placeholder):
        raise UnreadableError(
            f"names {content.name!r}, which is neither a tensor nor a numpy array nor a plain value; {ADVICE}"
        )
    if not isinstance(content, dict):
        raise UnreadableError(f"holds no mapping of names to tensors but a {type(content).__name__}")
    pending = [content]
    for mapping in pending:  # grows by the mappings inside
        for key, value in mapping.items():
            if key is None and isinstance(value, Tensor):
                mapping[key] = Placeholder("torch.Tensor")
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


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor | Placeholder:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnreadableError("has members that are compressed in another way than numpy's")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        name = excerpt(member.filename, 50)
        if dtype.kind in "SUmM":
            return Placeholder("numpy.ndarray")
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
