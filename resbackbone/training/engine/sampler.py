"""Which items of a dataset an epoch shows, in which order, and with which random numbers: all from seed and epoch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sized
from typing import NamedTuple

import torch
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from resbackbone.registry import DATA_SAMPLERS
from resbackbone.utils.validation import check_int


class Draw(NamedTuple):
    """What a sampler asks of a dataset.

    Attributes:
        item: Its number.
        seed: Of the random numbers that its augmentation takes. So they depend on no worker and on no earlier item.
    """

    item: int
    seed: int


def derive_seed(*parts: int) -> int:
    """Make one seed of several numbers, such that neighbors have nothing in common.

    Returns:
        A number below 2**32, the most that NumPy takes.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


@DATA_SAMPLERS.register_module()
class EpochSampler(Sampler[Draw]):
    """Shuffles a dataset anew in every epoch, and can begin in the middle of one.

    The processes of a distributed run take turns, so that their batches together are the batch that one process would
    have. Where their number does not divide the dataset, its first items in that epoch come twice.

    Args:
        dataset: What is drawn from.
        seed: The same in all processes; None for that of the run, or else one that they agree on.
        repeats: How often an item comes in a row, each time augmented differently, while an epoch stays as long and
            shows so many items less. Source: Hoffer et al., Augment Your Batch, 2020; Berman et al., MultiGrain, 2019.
    """

    def __init__(self, dataset: Sized, *, seed: int | None = None, repeats: int = 1) -> None:
        check_int("repeats", repeats, low=1)
        self.rank: int
        self.world_size: int
        self.rank, self.world_size = get_dist_info()
        self.dataset = dataset
        self.given_seed = seed
        self.seed: int = sync_random_seed() if seed is None else seed
        self.repeats = repeats
        self.epoch = 0
        self._done = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next, counted from 0."""
        self.epoch = epoch

    def skip(self, draws: int) -> None:
        """Leave out that many of this process's draws at the beginning of the next epoch, and of no other."""
        self._done = draws

    def __len__(self) -> int:
        """The draws of this process in a whole epoch."""
        return math.ceil(len(self.dataset) / self.world_size)

    def __iter__(self) -> Iterator[Draw]:
        """Yield this process's draws."""
        done, self._done = self._done, 0
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        count: int = len(self.dataset)
        order = torch.randperm(count, generator=generator).repeat_interleave(self.repeats)[:count]
        seeds = torch.randint(2**32, (len(self) * self.world_size,), generator=generator)
        own = range(self.rank + done * self.world_size, len(seeds), self.world_size)
        return (Draw(int(order[place % count]), int(seeds[place])) for place in own)
