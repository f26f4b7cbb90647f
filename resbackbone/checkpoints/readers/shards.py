"""Reader of checkpoints of several files: shards with an index, and folders written by transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from resbackbone.checkpoints.readers.errors import UnreadableError
from resbackbone.checkpoints.readers.open_file import OpenFile
from resbackbone.utils.validation import excerpt

_MAX_INDEX = 1 << 26  # bytes
_WEIGHTS = (  # in the order in which transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def find_in_folder(folder: Path) -> Path:
    """Find the weights, or the index of their shards, in a folder written by transformers' ``save_pretrained``.

    Raises:
        ValueError: If there is none.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{str(folder)!r} is a directory without {', '.join(_WEIGHTS)}; give the path of a file in it")


def read_shards(index: OpenFile, folder: Path, read: Callable[[Path], Any]) -> dict[str, Tensor]:
    """Read the tensors of all shards that an index lists.

    Args:
        index: JSON with a ``weight_map`` from the name of each tensor to the file name of its shard.
        folder: The folder of the shards.
        read: Reads a shard.

    Raises:
        UnreadableError: If it is not an index, or a shard is missing, damaged or has other tensors.
    """
    if index.size > _MAX_INDEX:
        raise UnreadableError("is JSON of a size that no index of shards has")
    content = json.loads(index.read(0, index.size))
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict):
        raise UnreadableError(
            "is JSON without a `weight_map`; give the path of a checkpoint or of the index of its shards"
        )
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        path = _path_of(name, folder)
        try:
            shard = read(path)
        except UnreadableError as error:
            raise UnreadableError(f"lists the shard {name!r}, which {error}") from error
        if not isinstance(shard, dict) or not all(isinstance(value, Tensor) for value in shard.values()):
            raise UnreadableError(f"lists the shard {name!r}, which holds more than tensors by name")
        if tensors.keys() & shard.keys():
            raise UnreadableError(f"lists the shard {name!r}, which holds a tensor of another shard again")
        tensors |= shard
    if weight_map.keys() - tensors.keys():
        missing = excerpt(min(weight_map.keys() - tensors.keys()))
        raise UnreadableError(f"lists {missing!r}, which its shard does not hold")
    return tensors


def _path_of(name: object, folder: Path) -> Path:
    """Return the path of a shard, which must be beside the index, or in the cache of huggingface_hub."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.(safetensors|bin|pth|pt)", name):
        raise UnreadableError(
            f"lists the shard {excerpt(repr(name))}; a shard is a .safetensors or .bin file beside it"
        )
    path, real = folder / name, folder.resolve()
    if not path.is_file():
        raise UnreadableError(f"lists the shard {name!r}, which is not beside it; download that too")
    if path.resolve().parent not in (real, real.parent.parent / "blobs"):
        raise UnreadableError(f"lists the shard {name!r}, which is a link to another folder; copy the file there")
    return path
