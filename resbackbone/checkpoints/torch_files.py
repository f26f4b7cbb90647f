"""Reads PyTorch's own files, the zip of today and the format before 1.6; tensors are laid over the mapped file."""

from __future__ import annotations

import struct
import sys
import zipfile
from collections.abc import Mapping
from mmap import mmap
from typing import Any

import torch
from torch import Tensor

from resbackbone.checkpoints.pickle_names import Storage, UnreadableError, View
from resbackbone.checkpoints.pickles import Machine, plain

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
"""How a file from before PyTorch 1.6 begins: with a number, pickled."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: signature, lengths of its name and its extra field
_ALIGNMENT = 8  # bytes; of the largest number


class _Storages:
    """Lays tensors over the mapped file.

    Args:
        data: The file.
        places: The first byte of each storage and the byte after its last, by its key.
        swapped: Whether the bytes of a number come in the other order than this machine's.
    """

    def __init__(self, data: mmap, places: Mapping[str, tuple[int, int]], *, swapped: bool = False) -> None:
        self._data = data
        self._places = places
        self._swapped = swapped
        self._made: dict[str, Tensor] = {}

    def tensor_of(self, view: View) -> Tensor:
        """Return the tensor of a view; tensors of one storage share it."""
        storage = view.storage
        if storage.key not in self._made:
            self._made[storage.key] = self._bytes(storage)
        raw = self._made[storage.key]
        if (storage.start + storage.count) * storage.dtype.itemsize > len(raw):
            raise UnreadableError(f"declares more numbers in storage {storage.key[:50]!r} than are there")
        offset = view.offset + storage.start * storage.dtype.itemsize // view.dtype.itemsize
        empty = torch.empty(0, dtype=view.dtype, device="cpu")  # whatever the default device is
        return empty.set_(raw.untyped_storage(), offset, view.size, view.stride)

    def _bytes(self, storage: Storage) -> Tensor:
        if storage.key not in self._places:
            raise UnreadableError(f"lacks the storage {storage.key[:50]!r}; download or copy it again")
        start, end = self._places[storage.key]
        if end > len(self._data):
            raise UnreadableError("is cut off in the middle; download or copy it again")
        if start == end:  # `frombuffer` makes no empty tensor
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        raw = torch.frombuffer(self._data, dtype=torch.uint8, count=end - start, offset=start)
        if self._swapped:
            return raw.view(-1, storage.dtype.itemsize).flip(1).flatten()
        return raw.clone() if raw.data_ptr() % _ALIGNMENT else raw


def read_zip(data: mmap, archive: zipfile.ZipFile, root: str) -> Any:
    """Read what ``torch.save`` writes: a pickle, and a member with the bytes of each storage.

    Args:
        data: The file.
        archive: The same.
        root: The folder in it.

    Raises:
        UnreadableError: If it is not as PyTorch writes it, or names anything but tensors and plain values.
    """
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UnreadableError("has compressed members, which PyTorch does not write; nothing was unpacked")
    if sum(member.file_size for member in members) > len(data):
        raise UnreadableError("declares members of more bytes than the file has; download or copy it again")
    prefix = f"{root}data/"
    places = {m.filename.removeprefix(prefix): _place(data, m) for m in members if m.filename.startswith(prefix)}
    order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in archive.namelist() else "little"
    if order not in ("little", "big"):
        raise UnreadableError(f"was written in the byte order {order[:20]!r}; it can be 'little' or 'big'")
    content = Machine(archive.read(f"{root}data.pkl")).run()
    return plain(content, _Storages(data, places, swapped=order != sys.byteorder).tensor_of)


def _place(data: mmap, member: zipfile.ZipInfo) -> tuple[int, int]:
    signature, name, extra = _LOCAL_HEADER.unpack_from(data, member.header_offset)
    if signature != b"PK\3\4":
        raise UnreadableError(f"is damaged at {member.filename[:50]!r}; download or copy it again")
    start = member.header_offset + _LOCAL_HEADER.size + name + extra
    return start, start + member.file_size


def read_legacy(data: mmap) -> Any:
    """Read what PyTorch wrote before 1.6: four pickles, then one of the storages' keys, then count and numbers of each.

    Raises:
        UnreadableError: If it is not as PyTorch wrote it, or names anything but tensors and plain values.
    """
    machine = Machine(data)
    _magic, _version, _system, content, keys = (machine.run() for _ in range(5))
    places = {}
    start = machine.position
    for key in keys:
        if not isinstance(key, str):
            raise UnreadableError("lists storages without names")
        (count,) = struct.unpack_from("<q", data, start)
        start += 8
        end = start + count * machine.storages[key].itemsize
        if not start <= end <= len(data):
            raise UnreadableError("is cut off in the middle; download or copy it again")
        places[key] = (start, end)
        start = end
    return plain(content, _Storages(data, places).tensor_of)  # always little-endian
