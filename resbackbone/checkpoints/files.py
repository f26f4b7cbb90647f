"""Reads the file of a checkpoint, of any kind and from anybody: tensors and plain values, and nothing in it runs."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from resbackbone.checkpoints import torch_files
from resbackbone.checkpoints.pickle_names import UnreadableError, View
from resbackbone.checkpoints.pickles import Machine, plain

_KINDS = "PyTorch's .pth, pickles of numpy arrays, .npz, .safetensors and the index of its shards"
_PICKLE = re.compile(rb"\x80|[(\]}]|c[\w.]+\n[\w.]+\n")  # of any protocol; the first ones are text
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f]")  # what text has none of
_MAX_INDEX = 1 << 26  # bytes
# Weights hardly shrink when they are compressed: a file that grows by more than this is a bomb.
_MAX_GROWTH = 20


def read_file(path: str | Path) -> dict[str, Any]:
    """Return what the file of a checkpoint holds.

    Its kind is told by its content, not by its suffix: PyTorch's zip files (memory-mapped) and its format before 1.6;
    pickles of numpy arrays (``.pkl`` of Detectron and detectron2, ``.pdparams`` of PaddlePaddle); ``.npz``;
    ``.safetensors`` (memory-mapped), also in shards, by the path of their ``model.safetensors.index.json``. Nothing in
    it is run, and no more memory is taken than its numbers need.

    Args:
        path: The file.

    Returns:
        The names in it, each with a tensor, a plain value, or a mapping, list or tuple of these. Sets come as lists,
        devices as text, and the logs in mmengine's checkpoints as None. Tensors are on the CPU and may share storage;
        writing to them does not change the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a directory, no checkpoint, damaged, or holds anything but tensors and plain values,
            whose name the error tells.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a directory; give the path of a file in it")
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}; give the path of a file: {_KINDS}")
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is no regular file; give the path of one: {_KINDS}")
    with path.open("rb") as file:
        try:
            return _named(_read(path, file))
        except UnreadableError as error:
            raise ValueError(f"{str(path)!r} {error}") from error
        except Exception as error:  # damage makes zip, struct, json, numpy and our machine raise errors of many kinds
            raise ValueError(
                f"{str(path)!r} is damaged, download or copy it again ({type(error).__name__}: {str(error)[:200]})"
            ) from error


def check_weights(tensors: Mapping[str, Tensor]) -> None:
    """Raise unless all tensors are dense and real, and all their values finite.

    Raises:
        ValueError: If some are not, naming the first five.
    """
    unsound = [f"{key} ({problem})" for key, tensor in tensors.items() if (problem := _problem(tensor))]
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


def _read(path: Path, file: IO[bytes]) -> Any:
    head = file.read(512)
    if not head:
        raise UnreadableError("is empty; download or copy it again")
    data = mmap(file.fileno(), 0, access=ACCESS_COPY)
    is_text = not _CONTROL.search(head)
    if head.startswith(b"PK"):
        return _read_zip(data, file)
    if head.startswith(torch_files.LEGACY_MAGIC):
        return torch_files.read_legacy(data)
    if head[8:9] == b"{" and not is_text:
        return _read_safetensors(path)
    if _PICKLE.match(head):
        return plain(Machine(data).run(), _refuse_view)
    if is_text:
        return _read_text(path, data)
    if head[257:262] == b"ustar":
        raise UnreadableError("is a tar file, as PyTorch wrote before 2017; load it there and save it again")
    raise UnreadableError(f"begins with {head[:8]!r}, which no kind of checkpoint does that is read: {_KINDS}")


def _named(content: object) -> dict[str, Any]:
    """Return the content if every tensor in it has a name; states of optimizers may have numbers."""
    if not isinstance(content, dict):
        raise UnreadableError(f"holds no mapping of names to tensors but a {type(content).__name__}")
    pending = [content]
    for mapping in pending:  # grows by the mappings inside
        for key, value in mapping.items():
            if not isinstance(key, str) and (mapping is content or isinstance(value, Tensor)):
                raise UnreadableError(f"has the key {key!r} where a name should be")
            if isinstance(value, dict):
                pending.append(value)
    return content


def _refuse_view(view: View) -> Tensor:
    raise UnreadableError("refers to tensors outside of itself; save them with torch.save")


def _read_zip(data: mmap, file: IO[bytes]) -> Any:
    try:
        archive = zipfile.ZipFile(file)
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
        return torch_files.read_zip(data, archive, roots[0])
    if names and all(name.endswith(".npy") for name in names):
        grown = sum(member.file_size for member in members)
        if grown > _MAX_GROWTH * len(data):
            raise UnreadableError(f"would grow from {len(data):,} to {grown:,} bytes; nothing was unpacked")
        return {member.filename.removesuffix(".npy"): _read_npy(archive, member) for member in members}
    raise UnreadableError(
        f"is a zip file of neither PyTorch nor numpy, of {', '.join(names[:5])[:200] or 'no members'}"
    )


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject or dtype.kind not in "biuf":
            raise UnreadableError(f"holds {member.filename[:50]!r} of type {dtype}; only arrays of numbers are read")
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise UnreadableError(f"declares {member.filename[:50]!r} of shape {shape}, which is not its size")
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False)
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UnreadableError(f"is a damaged .safetensors file; download or copy it again ({error})") from error


def _read_text(path: Path, data: mmap) -> dict[str, Tensor]:
    start = bytes(data[:512]).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise UnreadableError(
            "is the pointer that Git LFS leaves in a file's place; run `git lfs pull`, or download it"
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UnreadableError("is a web page, perhaps the error page of a failed download; download it again")
    if not start.startswith(b"{"):
        raise UnreadableError(f"is text and no checkpoint; it begins with {bytes(data[:40])!r}")
    if len(data) > _MAX_INDEX:
        raise UnreadableError("is JSON of a size that no index of shards has")
    index = json.loads(bytes(data))
    if not isinstance(index.get("weight_map"), dict):
        raise UnreadableError(
            "is JSON without a `weight_map`; give the path of a checkpoint or of the index of its shards"
        )
    return _read_shards(path, index["weight_map"])


def _read_shards(path: Path, weight_map: dict[str, object]) -> dict[str, Tensor]:
    content: dict[str, Tensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UnreadableError(f"lists the shard {name!r}; a shard is a .safetensors file beside it")
        if not (path.parent / name).is_file():
            raise UnreadableError(f"lists the shard {name!r}, which is not beside it; download that too")
        try:
            shard = _read_safetensors(path.parent / name)
        except UnreadableError as error:
            raise UnreadableError(f"lists the shard {name!r}, which {error}") from error
        if content.keys() & shard.keys():
            raise UnreadableError(f"lists the shard {name!r}, which holds a tensor of another shard again")
        content |= shard
    if weight_map.keys() - content.keys():
        raise UnreadableError(f"lists {min(weight_map.keys() - content.keys())!r}, which its shard does not hold")
    return content
