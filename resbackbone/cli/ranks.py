"""One of several processes that share the work, as torchrun starts them, or whoever sets the same variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

Key = TypeVar("Key")
Value = TypeVar("Value")

PATIENCE = timedelta(days=30)  # with ranks that have more to do


@dataclass
class Ranks:
    """Which of how many this process is.

    Attributes:
        rank: From 0.
        world_size: How many there are.
        connected: Whether they can speak to each other. If not, none waits for the others.
    """

    rank: int = 0
    world_size: int = 1
    connected: bool = False
    _patient: Any = None  # the group of all, that waits

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read ``RANK``, ``WORLD_SIZE`` and ``MASTER_ADDR``; without them, the only one.

        Raises:
            ValueError: If the numbers make no sense.
        """
        texts = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
        if not texts:
            return cls()
        if len(texts) < 2 or not all(text.isdecimal() for text in texts.values()):
            raise ValueError(f"the environment needs both RANK and WORLD_SIZE, as numbers, or neither; got {texts}")
        rank, world_size = int(texts["RANK"]), int(texts["WORLD_SIZE"])
        if rank >= world_size:
            raise ValueError(f"RANK must be below WORLD_SIZE (={world_size}), got {rank}")
        return cls(rank, world_size, connected=world_size > 1 and "MASTER_ADDR" in os.environ)

    def share(self, items: Mapping[Key, Value]) -> dict[Key, Value]:
        """Return this rank's part: every ``world_size``-th entry, so that no two ranks have one in common."""
        keys = list(items)[self.rank :: self.world_size]
        return {key: items[key] for key in keys}

    def join(self) -> None:
        """Meet the other ranks.

        Raises:
            RuntimeError: If one of them does not come.
        """
        if self.connected:
            distributed.init_process_group("gloo", rank=self.rank, world_size=self.world_size)
            self._patient = distributed.new_group(timeout=PATIENCE)

    def sum(self, *numbers: int) -> list[int]:
        """Wait for the other ranks and add up the numbers of all.

        torchrun ends every process as soon as one has failed, so that one that has to report a failure must wait.

        Raises:
            RuntimeError: If one of them has died.
        """
        if not self.connected:
            return list(numbers)
        sums = torch.tensor(numbers)
        distributed.all_reduce(sums, group=self._patient)
        return [int(number) for number in sums]

    def leave(self) -> None:
        """Wait until every rank has said what it has to say."""
        if self.connected:
            distributed.barrier()
            distributed.destroy_process_group()


def own_device(device: str) -> str:
    """Return the GPU of this process for "cuda", where torchrun has started one process for each; else the device."""
    local_rank, count = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if device != "cuda" or local_rank is None or count == 0:
        return device
    return f"cuda:{int(local_rank) % count}"
