"""Data-parallel extraction: each process extracts its shard of the pictures, as torchrun starts them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

Key = TypeVar("Key")
Value = TypeVar("Value")

_NUM_GROUPS = itertools.count()  # process groups that this process has created
TIMEOUT = timedelta(days=30)  # to wait for ranks with slower shards


@dataclass
class DistributedContext:
    """Rank and world size of this process, and its connection to the other ranks.

    As a context manager it disconnects at the end of the block, once every rank has come that far.

    Attributes:
        rank: Index of this process, from 0.
        world_size: Number of processes.
        is_connected: Whether the ranks communicate. If not, each reports its own shard and waits for no other.
    """

    rank: int = 0
    world_size: int = 1
    is_connected: bool = False
    _group: Any = None
    _owns_default_group: bool = False

    @classmethod
    def from_environment(cls) -> DistributedContext:
        """Create it from ``torch.distributed`` if that is initialized, else from RANK, WORLD_SIZE and MASTER_ADDR.

        Returns:
            A single rank where there is neither.

        Raises:
            ValueError: If the variables are incomplete or not consistent.
        """
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size(), is_connected=True)
        texts = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
        if not texts:
            return cls()
        if len(texts) < 2 or not all(text.isdecimal() for text in texts.values()):
            raise ValueError(f"the environment needs both RANK and WORLD_SIZE, as numbers, or neither; got {texts}")
        rank, world_size = int(texts["RANK"]), int(texts["WORLD_SIZE"])
        if rank >= world_size:
            raise ValueError(f"RANK must be below WORLD_SIZE (={world_size}), got {rank}")
        return cls(rank, world_size, is_connected=world_size > 1 and "MASTER_ADDR" in os.environ)

    def shard(self, items: Mapping[Key, Value]) -> dict[Key, Value]:
        """Return the shard of this rank: every ``world_size``-th item."""
        keys = list(items)[self.rank :: self.world_size]
        return {key: items[key] for key in keys}

    def connect(self) -> None:
        """Create the process group, as soon as every rank calls this.

        Raises:
            ConnectionError: If a rank does not.
        """
        if not self.is_connected:
            return
        from torch.distributed.rendezvous import rendezvous  # not in builds of PyTorch without distributed

        with _connection_errors():
            self._owns_default_group = not distributed.is_initialized()
            if self._owns_default_group:
                # Under torchrun one store serves all groups of a process: keys of an earlier one would be stale.
                store = next(rendezvous("env://", self.rank, self.world_size))[0]
                store = distributed.PrefixStore(f"extraction_{next(_NUM_GROUPS)}", store)  # type: ignore[attr-defined]
                distributed.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world_size)
            self._group = distributed.new_group(backend="gloo", timeout=TIMEOUT)

    def sum(self, *numbers: int) -> list[int]:
        """Add up the numbers of all ranks; waits for the slowest.

        Raises:
            ConnectionError: If a rank has died.
        """
        sums = torch.tensor(numbers)
        if self._group is not None:
            with _connection_errors():
                distributed.all_reduce(sums, group=self._group)
        return [int(number) for number in sums]

    def disconnect(self) -> None:
        """Destroy the process group, as soon as every rank calls this.

        torchrun kills all ranks when one exits with an error: a rank that fails must wait until the others are done.

        Raises:
            ConnectionError: If a rank has died.
        """
        if self._group is not None:
            with _connection_errors():
                distributed.barrier(group=self._group)
            distributed.destroy_process_group(None if self._owns_default_group else self._group)
            self._group = None

    def __enter__(self) -> DistributedContext:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.disconnect()


@contextmanager
def _connection_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"no connection to the other ranks: {error}") from error


def local_device(device: str) -> str:
    """Return the GPU of this process for "cuda", where torchrun has started one process per GPU; else the device."""
    local_rank, num_gpus = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if device != "cuda" or local_rank is None or num_gpus == 0:
        return device
    return f"cuda:{int(local_rank) % num_gpus}"
