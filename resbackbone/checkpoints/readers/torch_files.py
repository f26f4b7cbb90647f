"""Readers of PyTorch's file formats: zip archives, and the legacy format from before 1.6."""

from __future__ import annotations

import io
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from resbackbone.checkpoints.readers.errors import UnreadableError
from resbackbone.checkpoints.readers.open_file import OpenFile
from resbackbone.checkpoints.readers.placeholders import Storage, View
from resbackbone.checkpoints.readers.plain_values import Skip, skip_nothing, to_tree
from resbackbone.checkpoints.readers.safe_unpickler import SafeUnpickler
from resbackbone.utils.validation import excerpt

LEGACY_MAGIC = re.compile(rb"\x80[\2-\5](\x95.{8})?\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\.", re.DOTALL)
"""The first bytes of a legacy file: a pickled number."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: signature, lengths of its name and its extra field


class _Storages:
    """The storages of a file, each of which is read once a tensor needs it.

    Args:
        read: Returns the bytes of a storage, by its key.
        byteswap: Whether the byte order of the file is not that of this machine.
    """

    def __init__(self, read: Callable[[str], Tensor], *, byteswap: bool = False) -> None:
        self._read = read
        self._byteswap = byteswap
        self._cache: dict[str, Tensor] = {}

    def tensor_of(self, view: View) -> Tensor:
        """Return the tensor of a view; tensors of one storage share it."""
        storage = view.storage
        if storage.key not in self._cache:
            self._cache[storage.key] = self._bytes(storage)
        raw = self._cache[storage.key]
        if (storage.start + storage.count) * storage.dtype.itemsize > len(raw):
            raise UnreadableError(f"declares more numbers in storage {excerpt(storage.key)!r} than are there")
        offset = view.offset + storage.start * storage.dtype.itemsize // view.dtype.itemsize
        empty = torch.empty(0, dtype=view.dtype, device="cpu")
        return empty.set_(raw.untyped_storage(), offset, view.size, view.stride)

    def _bytes(self, storage: Storage) -> Tensor:
        try:
            raw = self._read(storage.key)
        except KeyError:
            raise UnreadableError(f"lacks the storage {excerpt(storage.key)!r}; download or copy it again") from None
        if not self._byteswap:
            return raw
        real = storage.dtype.itemsize // (2 if storage.dtype.is_complex else 1)
        return raw.view(-1, real).flip(1).flatten()


def read_zip(opened: OpenFile, archive: zipfile.ZipFile, root: str, skipped: Skip = skip_nothing) -> Any:
    """Read a file of ``torch.save``: a pickle, and one member with the bytes of each storage.

    Args:
        opened: The file.
        archive: The same as a zip archive.
        root: The folder in the archive.
        skipped: See :func:`~resbackbone.checkpoints.readers.plain_values.to_tree`.

    Raises:
        UnreadableError: If PyTorch would not write it so, or it has tensors that are not read.
    """
    members = {member.filename: member for member in archive.infolist()}
    if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
        raise UnreadableError("has compressed members, which PyTorch does not write; nothing was unpacked")
    if sum(member.file_size for member in members.values()) > opened.size:
        raise UnreadableError("declares members of more bytes than the file has; download or copy it again")

    def member(name: str) -> tuple[int, int]:
        return _place(opened, members[f"{root}{name}"])

    order = opened.read(*member("byteorder")).decode() if f"{root}byteorder" in members else "little"
    if order not in ("little", "big"):
        raise UnreadableError(f"was written in the byte order {excerpt(order)!r}; it can be 'little' or 'big'")
    pickled = opened.read(*member("data.pkl"))
    content = SafeUnpickler(io.BytesIO(pickled), len(pickled)).load()
    storages = _Storages(lambda key: opened.read_tensor(*member(f"data/{key}")), byteswap=order != sys.byteorder)
    return to_tree(content, storages.tensor_of, skipped)


def _place(opened: OpenFile, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Return the offset and the number of the bytes of a member."""
    signature, name, extra = _LOCAL_HEADER.unpack(opened.read(member.header_offset, _LOCAL_HEADER.size))
    if signature != b"PK\3\4":
        raise UnreadableError(f"is damaged at {excerpt(member.filename)!r}; download or copy it again")
    return member.header_offset + _LOCAL_HEADER.size + name + extra, member.file_size


def read_legacy(opened: OpenFile, skipped: Skip = skip_nothing) -> Any:
    """Read a file of ``torch.save`` before 1.6: four pickles, one of the storages' keys, then count and bytes of each.

    Args:
        opened: The file.
        skipped: See :func:`~resbackbone.checkpoints.readers.plain_values.to_tree`.

    Raises:
        UnreadableError: If PyTorch would not write it so, or it has tensors that are not read.
    """
    opened.file.seek(0)
    unpickler = SafeUnpickler(opened.file, opened.size)
    _magic, _version, _system, content, keys = (unpickler.load() for _ in range(5))
    places = _legacy_places(opened, keys, unpickler.storages)
    return to_tree(content, _Storages(lambda key: opened.read_tensor(*places[key])).tensor_of, skipped)  # little-endian


def _legacy_places(opened: OpenFile, keys: Any, types: Mapping[str, torch.dtype]) -> dict[str, tuple[int, int]]:
    places = {}
    start = opened.file.tell()
    for key in keys if isinstance(keys, list) else [None]:
        if not isinstance(key, str):
            raise UnreadableError("lists storages without names")
        (count,) = struct.unpack("<q", opened.read(start, 8))
        size = count * types[key].itemsize
        places[key] = (start + 8, size)
        start += 8 + size
        if size < 0 or start > opened.size:
            raise UnreadableError("is cut off in the middle; download or copy it again")
    return places
