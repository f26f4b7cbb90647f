"""Small checkpoint files in every published format, for tests of the readers."""

import io
import json
import pickle
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv1.weight": torch.randn(4, 3, 2, 2, generator=generator),
        "bn1.running_var": torch.rand(4, generator=generator, dtype=torch.float64),
        "bn1.num_batches_tracked": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "half": torch.randn(3, generator=generator).half(),
        "none": torch.zeros(0, 3),
    }


def as_numpy(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {key: value.numpy() for key, value in tensors.items()}


class Python2Pickler(pickle._Pickler):
    """Pickler of Python 2, with one kind of string for text and bytes."""

    write: Any  # of the base class, which the stubs leave out
    memoize: Any
    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        short = len(raw) < 256
        self.write(
            pickle.SHORT_BINSTRING + bytes([len(raw)]) if short else pickle.BINSTRING + struct.pack("<I", len(raw))
        )
        self.write(raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(content: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


def write_sharded(path: Path, tensors: Mapping[str, Tensor]) -> None:
    names = list(tensors)
    shards = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, path.parent / shard)
    path.write_text(json.dumps({"metadata": {}, "weight_map": {key: s for s, keys in shards.items() for key in keys}}))


def write_npz(save: Callable[..., None], path: Path, tensors: Mapping[str, Tensor]) -> None:
    with path.open("wb") as file:  # given a path, numpy would append its suffix
        save(file, **as_numpy(tensors))


def write_pickle(tensors: Mapping[str, Tensor], path: Path, *, protocol: int) -> None:
    path.write_bytes(pickle.dumps(as_numpy(tensors), protocol))


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "torch": lambda tensors, path: torch.save(tensors, path),
    "torch protocol 4": lambda tensors, path: torch.save(tensors, path, pickle_protocol=4),
    "torch legacy": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "safetensors": save_file,
    "sharded safetensors": lambda tensors, path: write_sharded(path, tensors),
    "npz": lambda tensors, path: write_npz(np.savez, path, tensors),
    "compressed npz": lambda tensors, path: write_npz(np.savez_compressed, path, tensors),
    "Python 2 pickle": lambda tensors, path: path.write_bytes(python2_pickle(as_numpy(tensors))),
    **{
        f"pickle protocol {protocol}": partial(write_pickle, protocol=protocol)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}
