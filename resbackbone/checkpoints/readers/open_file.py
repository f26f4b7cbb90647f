"""An open checkpoint file that is read once, into memory, and checked for changes meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from resbackbone.checkpoints.readers.errors import CUT_OFF, UnreadableError

_CLOCK = 20_000_000  # nanoseconds; file systems keep times no finer than a tick of the system's clock


class OpenFile:
    """An open file from which bytes and tensors are read.

    Nothing is mapped into memory: if a mapped file were truncated or written to, tensors that were checked before would
    change, or the process be killed.

    Args:
        path: The file.

    Attributes:
        file: The binary file object.
        size: Its number of bytes.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self._state = self._look()
        self.size, written = self._state
        if 0 <= time.time_ns() - written < _CLOCK:  # or the next write would have the same time
            time.sleep(_CLOCK / 1e9)

    def __enter__(self) -> OpenFile:
        """Return the file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it, and raise if it was written to while it was read."""
        changed = self._look() != self._state
        self.file.close()
        if changed and (kind is None or issubclass(kind, Exception)):
            raise UnreadableError("was written to while it was read; wait until it is whole, and read it again")

    def _look(self) -> tuple[int, int]:
        state = os.fstat(self.file.fileno())
        return state.st_size, state.st_mtime_ns

    def read(self, start: int, count: int) -> bytes:
        """Read bytes.

        Raises:
            UnreadableError: If the file has fewer.
        """
        self._check(start, count)
        self.file.seek(start)
        data = self.file.read(count)
        if len(data) != count:
            raise UnreadableError(CUT_OFF)
        return data

    def read_tensor(self, start: int, count: int) -> Tensor:
        """Read bytes as a tensor ``(count,)`` of type uint8 on the CPU.

        Raises:
            UnreadableError: If the file has fewer.
        """
        self._check(start, count)
        tensor = torch.empty(count, dtype=torch.uint8, device="cpu")  # whatever the default device is
        self.file.seek(start)
        if self.file.readinto(tensor.numpy().data) != count:
            raise UnreadableError(CUT_OFF)
        return tensor

    def _check(self, start: int, count: int) -> None:
        if not 0 <= start <= start + count <= self.size:
            raise UnreadableError(CUT_OFF)
