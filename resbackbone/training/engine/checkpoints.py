"""Checkpoint files of training runs: written atomically, with tensors and plain Python values only, read safely."""

from __future__ import annotations

import io
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils import apply_to
from torch import Tensor

from resbackbone.checkpoints.readers import describe_placeholders, read_file
from resbackbone.utils.atomic_write import atomic_write

_LAST = "last_checkpoint"  # file name as in mmengine
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set)
_MAX_PATH_BYTES = 1 << 16
DIVERGENCE_ADVICE = (
    "Try a lower learning rate, a longer warm-up, optim_wrapper.clip_grad=dict(max_norm=1.0), or bfloat16 instead of "
    "float16, and check the data for wrong labels and pictures"
)
_PLAIN_VALUES = (str, bytes, bool, int, float, complex, type(None), torch.Size, torch.dtype, torch.device)


class CheckpointSaveError(OSError):
    """A checkpoint could not be written; earlier checkpoints are unchanged."""


class NonFiniteWeightsError(ArithmeticError):
    """A weight is NaN or infinite, so no checkpoint was written; earlier checkpoints are unchanged."""


class CheckpointMismatchError(ValueError):
    """A checkpoint cannot be loaded: it is damaged, is not one of a training run, or does not fit the config."""


def save_checkpoint(content: Any, path: Path) -> None:
    """Write a checkpoint atomically.

    Args:
        content: The nested containers to save, with tensors and plain Python values.
        path: The file.

    Raises:
        CheckpointSaveError: If the disk is full or not writable, or a value in ``content`` would be rejected by
            :func:`read_checkpoint`.
        NonFiniteWeightsError: If a tensor of a ``state_dict`` in it is not finite.
    """
    _check(content, path)
    buffer = io.BytesIO()  # on a full disk, torch.save to a file raises errors of many types
    torch.save(content, buffer)
    _write(path, buffer.getbuffer())


def _check(content: Any, path: Path) -> None:
    """Raise unless every value can be read again when resuming."""
    for keys, value in _entries(content):
        name = ".".join(map(str, keys))
        if isinstance(value, Tensor):
            if keys[0] in ("state_dict", "ema_state_dict") and not value.isfinite().all():
                raise NonFiniteWeightsError(
                    f"{name} is not finite, so {path} was not saved and training was stopped; earlier checkpoints are "
                    f"unchanged. {DIVERGENCE_ADVICE}"
                )
            if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_conj():
                raise CheckpointSaveError(
                    f"cannot save {path}: {name} is not a plain dense tensor, so it cannot be resumed"
                )
        elif type(value) not in _PLAIN_VALUES:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise CheckpointSaveError(
                f"cannot save {path}: {name} is of type {kind}, but only tensors and plain Python values can be "
                "resumed; convert it, or exclude it by message_hub.update_info(..., resumed=False)"
            )


def _entries(content: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield every key and value in nested containers, with its path."""
    if type(content) not in _CONTAINERS:
        yield keys, content
        return
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*keys, key), key
        yield from _entries(value, (*keys, key))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of :class:`~resbackbone.training.engine.ResumableRunner`, without executing code from it.

    Args:
        path: The file.

    Returns:
        ``meta``, ``state_dict``, ``message_hub``, ``optimizer``, ``param_schedulers`` and entries of hooks; tensors are
        on the CPU.

    Raises:
        FileNotFoundError: If it does not exist.
        CheckpointMismatchError: If it is damaged, contains anything but tensors and plain values, or is not a
            checkpoint of a run. Time and memory are bounded as in :func:`~resbackbone.checkpoints.load_checkpoint`.
    """
    try:
        content = read_file(path)
    except ValueError as error:
        raise CheckpointMismatchError(str(error)) from error
    if left := describe_placeholders(content):
        raise CheckpointMismatchError(
            f"{str(path)!r} contains more than tensors and plain values, which is not loaded: {left[0]}"
        )
    if any(not isinstance(content.get(key), Mapping) for key in ("meta", "state_dict", "message_hub")):
        raise CheckpointMismatchError(
            f"{str(path)!r} is not a checkpoint of a training run, which has meta, state_dict and message_hub; load "
            "other weights by init_cfg=dict(type='Pretrained', checkpoint=...)"
        )
    try:
        return {**content, "message_hub": _to_history_buffers(content["message_hub"])}
    except Exception as error:  # a damaged message_hub raises errors of any type
        raise CheckpointMismatchError(
            f"{str(path)!r} has a damaged message_hub ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def find_last_checkpoint(folder: str | Path) -> Path | None:
    """Return the latest checkpoint in a work folder, also after the folder was moved; None if there is none.

    Raises:
        CheckpointMismatchError: If the file ``last_checkpoint`` is damaged.
    """
    note = Path(folder) / _LAST
    if not note.is_file():
        return None
    with note.open("rb") as file:
        path = Path(file.read(_MAX_PATH_BYTES).decode("utf-8", "replace").strip())
    try:
        moved = note.with_name(path.name)  # preferred, as another run may use the folder's old path
        return path if path.is_file() and not moved.is_file() else moved
    except (ValueError, OSError) as error:  # empty, too long, or with invalid characters
        raise CheckpointMismatchError(
            f"{str(note)!r} is damaged: write the path of the checkpoint to resume into it"
        ) from error


def to_plain_values(message_hub: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the state of mmengine's message hub to tensors and plain values, from ``HistoryBuffer`` and NumPy."""
    scalars = {
        name: {
            "values": torch.as_tensor(history.data[0]),
            "counts": torch.as_tensor(history.data[1]),
            "max_length": history.max_length,
        }
        for name, history in message_hub["log_scalars"].items()
    }
    info = apply_to(
        message_hub["runtime_info"], lambda value: isinstance(value, np.generic), lambda value: value.item()
    )
    return {**message_hub, "log_scalars": scalars, "runtime_info": info}


def _to_history_buffers(message_hub: Mapping[str, Any]) -> dict[str, Any]:
    scalars = {
        name: HistoryBuffer(log["values"].numpy(), log["counts"].numpy(), log["max_length"])
        for name, log in message_hub["log_scalars"].items()
    }
    return {**message_hub, "log_scalars": scalars}


def note_last_checkpoint(folder: Path, checkpoint: str) -> None:
    """Record the path of the latest checkpoint in a work folder, for :func:`find_last_checkpoint`."""
    _write(folder / _LAST, checkpoint.encode())


def _write(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically and durably."""
    try:
        with atomic_write(path, sync=True) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise CheckpointSaveError(
            f"cannot save {path}: {error.strerror or error}; earlier checkpoints are intact: free disk space and "
            "continue with --resume"
        ) from error
