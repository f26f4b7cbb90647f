"""Write weights to files in the formats of the libraries."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from resbackbone.utils.atomic_write import atomic_write
from resbackbone.utils.validation import nearest

_PICKLE_PROTOCOL = 2  # Detectron, detectron2 and PaddlePaddle read it


def save_weights(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors to a file, atomically.

    Args:
        tensors: By name.
        path: The suffix selects the format: ``.pth`` or ``.pt`` (PyTorch), ``.safetensors``, ``.npz``, or a pickle of
            numpy arrays as ``.pkl`` (under the key "model", as detectron2 reads it) or ``.pdparams`` (PaddlePaddle).

    Raises:
        ValueError: If the suffix is unknown.
        OSError: If the file cannot be written, say because the disk is full; what was there before is unchanged then.
            FileNotFoundError if its folder does not exist.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ValueError(f"cannot write {path.suffix!r} files{nearest(path.suffix, _WRITERS)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(path.parent)!r} to write {path.name} into")
    owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        _WRITERS[path.suffix](owned, temporary)


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _save_torch(tensors: dict[str, Tensor], path: Path) -> None:
    archive = io.BytesIO()  # on a full disk, PyTorch's own writer may abort the process
    torch.save(tensors, archive)
    path.write_bytes(archive.getbuffer())


def _save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    path.write_bytes(to_safetensors(tensors))  # save_file() writes to a temporary file of its own, without a lock


def _save_npz(tensors: dict[str, Tensor], path: Path) -> None:
    np.savez(path, **_arrays(tensors))


def _save_detectron(tensors: dict[str, Tensor], path: Path) -> None:
    # `matching_heuristics` makes detectron2 match the keys with any prefix that its model has.
    content = {"model": _arrays(tensors), "__author__": "resbackbone", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, _PICKLE_PROTOCOL))


def _save_paddle(tensors: dict[str, Tensor], path: Path) -> None:
    path.write_bytes(pickle.dumps(_arrays(tensors), _PICKLE_PROTOCOL))


_WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    ".pth": _save_torch,
    ".pt": _save_torch,
    ".safetensors": _save_safetensors,
    ".npz": _save_npz,
    ".pkl": _save_detectron,
    ".pdparams": _save_paddle,
}
