"""Reader of .safetensors files: the length of a JSON header, the header, and the bytes of all tensors, without gaps.

The safetensors library maps the file into memory or reads its bytes twice, so only its writer is used here.

Source: https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import torch
from torch import Tensor

from resbackbone.checkpoints.readers.errors import UnreadableError
from resbackbone.checkpoints.readers.open_file import OpenFile
from resbackbone.utils.validation import excerpt

_MAX_HEADER = 100_000_000  # bytes, as in the library
_MAX_DIMENSIONS = 64  # as in PyTorch
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_safetensors(opened: OpenFile) -> dict[str, Tensor]:
    """Read all tensors, in the order of the file.

    Raises:
        UnreadableError: If the header does not describe the file, or has types that PyTorch does not have.
    """
    (length,) = struct.unpack("<Q", opened.read(0, 8))
    if length > min(_MAX_HEADER, opened.size - 8):
        raise _damaged("the header is longer than the file")
    try:
        header = json.loads(opened.read(8, length))
        entries = [(name, *_entry(entry)) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(f"{type(error).__name__} in the header: {excerpt(str(error))}") from error
    entries.sort(key=lambda entry: (entry[3], entry[4]))
    end = 0
    for name, dtype, shape, start, stop in entries:
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise _damaged(f"{excerpt(name)!r} does not lie behind the tensor before it, or is of another size")
        end = stop
    if 8 + length + end != opened.size:
        raise _damaged("the header does not describe as many bytes as there are")
    first = 8 + length
    return {
        name: opened.read_tensor(first + start, stop - start).view(dtype).view(shape)
        for name, dtype, shape, start, stop in entries
    }


def _entry(entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"unknown type {excerpt(str(entry['dtype']))!r}")
    start, stop = entry["data_offsets"]
    if len(entry["shape"]) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(entry['shape']):,} dimensions")
    numbers = (*entry["shape"], start, stop)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("a shape or place that is impossible")
    return _TYPES[entry["dtype"]], tuple(entry["shape"]), start, stop


def _damaged(what: str) -> UnreadableError:
    return UnreadableError(f"is a damaged .safetensors file; download or copy it again ({what})")
