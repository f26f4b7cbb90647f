"""Read the tensors of a checkpoint by name, and check that they are usable as weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resbackbone.checkpoints.hub.sources import locate
from resbackbone.checkpoints.layouts import Tensors
from resbackbone.checkpoints.readers import describe_placeholders, read_file
from resbackbone.checkpoints.readers.errors import ADVICE
from resbackbone.checkpoints.selection import is_optimizer
from resbackbone.data.preprocessing import Preprocessing
from resbackbone.utils.validation import excerpt

# What trainers save beside weights and optimizers, which is not read; the names of mmengine and Lightning.
_NO_WEIGHTS = {"message_hub", "param_schedulers", "lr_scheduler", "scaler"}
_MAX_NAME = 1000  # characters in the name of a tensor


class CheckpointTensors(NamedTuple):
    """The tensors of a checkpoint.

    Attributes:
        tensors: By name; the keys of nested mappings are joined by dots.
        preprocessing: What the catalog or our own training notes that the weights expect of an image; None if neither.
        not_loaded: Objects in it that are not loaded: class and place of each.
        from_mmengine: Whether mmengine saved it, so that ``ema_state_dict`` holds the raw weights.
        classes: The class names that mmengine's trainings note; None if there are none.
    """

    tensors: Tensors
    preprocessing: Preprocessing | None
    not_loaded: tuple[str, ...]
    from_mmengine: bool
    classes: tuple[str, ...] | None


def read_tensors(source: str | Path) -> CheckpointTensors:
    """Read the tensors of a checkpoint.

    Args:
        source: As for :func:`~resbackbone.checkpoints.load_checkpoint`, which says what is raised, too.
    """
    path, weights = locate(source)
    content = read_file(path, skipped=_is_skipped)
    try:
        tensors = dict(_flatten(content))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} {error}") from error
    not_loaded = describe_placeholders(content)
    if not_loaded and not tensors:
        raise ValueError(
            f"{str(path)!r} has no tensors by name, and of what it has was not loaded {not_loaded[0]}; {ADVICE}"
        )
    preprocessing = _noted_preprocessing(tensors) if weights is None else weights.preprocessing
    from_mmengine = "ema_state_dict" in content and "meta" in content
    return CheckpointTensors(tensors, preprocessing, not_loaded, from_mmengine, class_names(content))


def read_checkpoint(source: str | Path) -> dict[str, Any]:
    """Read the tensors and plain values of a checkpoint, nested as in its file, without the state of the optimizer.

    Args:
        source: As for :func:`~resbackbone.checkpoints.load_checkpoint`, which says what is raised, too.
    """
    return read_file(locate(source)[0], skipped=_is_skipped)


def class_names(checkpoint: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the class names that a checkpoint of mmengine notes; None if there are none."""
    names: Any = checkpoint
    for key in ("meta", "dataset_meta", "classes"):
        names = names.get(key) if isinstance(names, Mapping) else None
    well_formed = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return tuple(names) if well_formed else None


def check_weights(tensors: Mapping[str, Tensor]) -> None:
    """Check that all tensors are dense and real, and all their values finite.

    Raises:
        ValueError: If some are not; the first five are named.
    """
    wrong = [f"{excerpt(key, 200)} ({problem})" for key, tensor in tensors.items() if (problem := _problem(tensor))]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"weights must be finite real numbers, but not so {', '.join(wrong[:5])}{more}")


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


def _noted_preprocessing(tensors: Tensors) -> Preprocessing | None:
    """Return what a checkpoint of our own training notes that its weights expect of an image."""
    for name, channels in tensors.items():
        stem = name.removesuffix("channels")
        if name.endswith("data_preprocessor.channels") and {f"{stem}mean", f"{stem}std"} <= tensors.keys():
            mean, std = (tuple(tensors[f"{stem}{key}"].flatten().tolist()) for key in ("mean", "std"))
            if len(mean) not in (1, 3):
                return None  # not pictures; `adapt` returns None for these weights, too
            return Preprocessing(mean, std, "RGB" if channels.tolist() == sorted(channels.tolist()) else "BGR")
    return None


def _is_skipped(key: object) -> bool:
    return key in _NO_WEIGHTS or is_optimizer(key)


def _flatten(content: Mapping[Any, Any], keys: tuple[str, ...] = (), length: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its name: the keys that lead to it, joined by dots.

    Keys are joined only at a tensor and after their length was checked: a small file can repeat a long key endlessly.

    Raises:
        ValueError: If a name is longer than names of tensors are.
    """
    for position, (key, value) in enumerate(content.items()):
        if not isinstance(value, (Tensor, Mapping)):
            continue
        text = _key_text(key, position)
        total = length + len(text) + 1
        if isinstance(value, Mapping):
            yield from _flatten(value, (*keys, text), total)
        elif total > _MAX_NAME:
            start = excerpt(keys[0] if keys else text, 40)
            raise ValueError(
                f"has a tensor with a name of {total:,} characters, which begins with {start!r}; "
                f"names of at most {_MAX_NAME:,} are read"
            )
        else:
            yield ".".join((*keys, text)), value


def _key_text(key: object, position: int) -> str:
    """Return the text of a key; for a key that is neither text nor a number, its type and position."""
    if isinstance(key, str):
        return key
    return str(key) if isinstance(key, int) and abs(key) < 2**63 else f"{type(key).__name__} {position}"
