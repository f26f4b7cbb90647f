"""Write checkpoints atomically, of plain values and tensors only, and find them again after a crash."""

from __future__ import annotations

import io
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.utils import apply_to
from torch import Tensor

from resbackbone.checkpoints.readers import describe_placeholders, read_file
from resbackbone.registry import HOOKS
from resbackbone.training.engine.distributed import fail_together
from resbackbone.utils.atomic_write import atomic_write

_LAST = "last_checkpoint"  # the file's name is mmengine's
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set)
_LONGEST_PATH = 1 << 16  # bytes
ADVICE = (
    "Try a lower learning rate, a longer warm-up, optim_wrapper.clip_grad=dict(max_norm=1.0), bfloat16 in place of "
    "float16, or look for labels and pictures that are wrong"
)
_VALUES = (str, bytes, bool, int, float, complex, type(None), torch.Size, torch.dtype, torch.device)


class CheckpointNotSaved(OSError):
    """A checkpoint could not be written; those that were there before are as they were."""


class NonFiniteWeights(ArithmeticError):
    """A weight is NaN or infinite, which no checkpoint may have; those that were there before are as they were."""


class CheckpointDoesNotFit(ValueError):
    """A checkpoint cannot be resumed: it is damaged, of something else, or the config has changed."""


def save_checkpoint(content: Any, path: Path) -> None:
    """Write a checkpoint atomically.

    Args:
        content: What ``torch.save`` takes.
        path: The file.

    Raises:
        CheckpointNotSaved: If the disk is full or cannot be written to, or there is a value in it that
            :func:`read_checkpoint` would refuse.
        NonFiniteWeights: If a tensor of a ``state_dict`` in it is not finite.
    """
    _check(content, path)
    buffer = io.BytesIO()  # written to a file that breaks off, torch.save would raise whatever it stumbles over
    torch.save(content, buffer)
    _replace(path, buffer.getbuffer())


def _check(content: Any, path: Path) -> None:
    """Raise unless everything in it can be read again and resumed."""
    for keys, value in _entries(content):
        name = ".".join(map(str, keys))
        if isinstance(value, Tensor):
            if keys[0] in ("state_dict", "ema_state_dict") and not value.isfinite().all():
                raise NonFiniteWeights(
                    f"{name} is not finite, so {path} was not saved and training has ended; checkpoints that were "
                    f"saved before are as they were. {ADVICE}"
                )
            if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_conj():
                raise CheckpointNotSaved(f"cannot save {path}: {name} is no plain tensor, which alone can be resumed")
        elif type(value) not in _VALUES:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise CheckpointNotSaved(
                f"cannot save {path}: {name} is of type {kind}, and only tensors and Python's plain values can be "
                "resumed; make it one, or keep it out (message_hub.update_info(..., resumed=False))"
            )


def _entries(content: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Everything in nested containers, and where it is."""
    if type(content) not in _CONTAINERS:
        yield keys, content
        return
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*keys, key), key
        yield from _entries(value, (*keys, key))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that :class:`~resbackbone.training.engine.ResumableRunner` wrote; nothing in it runs.

    Args:
        path: The file.

    Returns:
        ``meta``, ``state_dict``, ``message_hub``, ``optimizer``, ``param_schedulers`` and what hooks added; tensors on
        the CPU.

    Raises:
        FileNotFoundError: If there is none.
        CheckpointDoesNotFit: If it is damaged, holds anything but tensors and plain values, or is no checkpoint of a
            run. What is damaged costs no more than by :func:`~resbackbone.checkpoints.load_checkpoint`.
    """
    try:
        content = read_file(path)
    except ValueError as error:
        raise CheckpointDoesNotFit(str(error)) from error
    if left := describe_placeholders(content):
        raise CheckpointDoesNotFit(
            f"{str(path)!r} holds more than tensors and plain values, which nothing here runs: {left[0]}"
        )
    if any(not isinstance(content.get(key), Mapping) for key in ("meta", "state_dict", "message_hub")):
        raise CheckpointDoesNotFit(
            f"{str(path)!r} is no checkpoint of a run, which has meta, state_dict and message_hub; weights of other "
            "origin go into init_cfg=dict(type='Pretrained', checkpoint=...)"
        )
    try:
        return {**content, "message_hub": _with_histories(content["message_hub"])}
    except Exception as error:  # what is not as it was saved may be anything
        raise CheckpointDoesNotFit(
            f"{str(path)!r} has a message_hub that no run has saved ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def find_last_checkpoint(folder: str | Path) -> Path | None:
    """Return the checkpoint that was saved last in a work folder, also after the folder was moved; None without one.

    Raises:
        CheckpointDoesNotFit: If the note of it is damaged.
    """
    note = Path(folder) / _LAST
    if not note.is_file():
        return None
    with note.open("rb") as file:
        path = Path(file.read(_LONGEST_PATH).decode("utf-8", "replace").strip())
    try:
        moved = note.with_name(path.name)  # which comes first, as another run may be in this one's old place
        return path if path.is_file() and not moved.is_file() else moved
    except (ValueError, OSError) as error:  # empty, too long, or with characters that no path has
        raise CheckpointDoesNotFit(
            f"{str(note)!r} is damaged: write the path of the checkpoint to resume into it"
        ) from error


def plain_state(message_hub: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the state of mmengine's message hub into what safe loading knows: no ``HistoryBuffer``, no NumPy."""
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


def _with_histories(message_hub: Mapping[str, Any]) -> dict[str, Any]:
    scalars = {
        name: HistoryBuffer(log["values"].numpy(), log["counts"].numpy(), log["max_length"])
        for name, log in message_hub["log_scalars"].items()
    }
    return {**message_hub, "log_scalars": scalars}


@HOOKS.register_module()
class ResumableCheckpointHook(CheckpointHook):
    """Saves checkpoints in turn: the new one, then the note of which is the last, then old ones are deleted.

    mmengine's hook deletes first, and writes the note such that a crash can leave it empty. The rest is as there:
    ``interval`` epochs, or iterations with ``by_epoch=False``; ``max_keep_ckpts``, ``save_best``, ...

    Raises:
        TypeError: If ``save_best`` is a list; one metric decides.
    """

    best_ckpt_path: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.save_best is not None and len(self.save_best) > 1:
            raise TypeError(f"`save_best` must be the name of one metric, got {self.save_best}")

    def before_train(self, runner: Any) -> None:
        """Take over from the checkpoint which ones are kept, and which is the best, also after the folder was moved."""
        super().before_train(runner)
        for name in ("last_ckpt", "best_ckpt"):
            if (path := runner.message_hub.get_info(name)) is not None:
                runner.message_hub.update_info(name, str(Path(self.out_dir) / Path(path).name))
        if self.save_best:
            self.best_ckpt_path = runner.message_hub.get_info("best_ckpt")

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        folder, name = Path(self.out_dir), self.filename_tmpl.format(step)
        expired = []
        if self.max_keep_ckpts > 0:
            kept = [*(earlier for earlier in self.keep_ckpt_ids if earlier != step), step]
            expired = kept[: -self.max_keep_ckpts]
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(kept)  # a deque, which drops the expired ones
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        self.last_ckpt = str(folder / name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            str(folder),
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
        )
        with fail_together(OSError):
            if is_main_process():
                _replace(Path(runner.work_dir) / _LAST, self.last_ckpt.encode())
                for earlier in expired:
                    (folder / self.filename_tmpl.format(earlier)).unlink(missing_ok=True)

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, Any]) -> None:
        if not self.save_best:
            return
        previous = self.best_ckpt_path
        self.best_ckpt_path = None  # or mmengine would delete it before it saves the next
        super()._save_best_checkpoint(runner, metrics)
        if self.best_ckpt_path is None:
            self.best_ckpt_path = previous
        elif previous not in (None, self.best_ckpt_path) and is_main_process():
            Path(previous).unlink(missing_ok=True)


def _replace(path: Path, content: bytes | memoryview) -> None:
    """Put a file in another's place in one step, once its bytes are on the disk."""
    try:
        with atomic_write(path, sync=True) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise CheckpointNotSaved(
            f"cannot save {path}: {error.strerror}; checkpoints that were saved before are whole: make room and go on "
            "with --resume"
        ) from error
