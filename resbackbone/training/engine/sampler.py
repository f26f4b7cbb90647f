"""Epoch sampler with an order and augmentation seeds that depend on seed and epoch only, so that it is resumable."""

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


class SeededIndex(NamedTuple):
    """An index into a dataset with the seed of its augmentation.

    Attributes:
        item: Index of the item.
        seed: Seed of the random numbers of its augmentation, independent of workers and earlier items.
    """

    item: int
    seed: int


def derive_seed(*parts: int) -> int:
    """Hash several integers into one seed, so that neighboring values give unrelated seeds.

    Returns:
        An integer below 2**32, the limit of NumPy.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


@DATA_SAMPLERS.register_module()
class EpochSampler(Sampler[SeededIndex]):
    """Shuffles a dataset in every epoch; can start in the middle of an epoch, and repeat augmentation.

    Indices are dealt to the ranks in turn, so that the batches of all ranks together are the batch of a single process.
    If the dataset size is not divisible by the number of ranks, the first items of the epoch are repeated at its end.

    Args:
        dataset: The dataset.
        seed: The same on all ranks; None for that of the run, or a random one shared by all ranks.
        num_repeats: Number of consecutive repeats of each item, each with its own augmentation. The epoch length stays
            the same, so an epoch contains fewer distinct items. Source: Hoffer et al., Augment Your Batch, 2020; Berman
            et al., MultiGrain, 2019.
    """

    def __init__(self, dataset: Sized, *, seed: int | None = None, num_repeats: int = 1) -> None:
        check_int("num_repeats", num_repeats, low=1)
        self.rank: int
        self.world_size: int
        self.rank, self.world_size = get_dist_info()
        self.dataset = dataset
        self.given_seed = seed
        self.seed: int = sync_random_seed() if seed is None else seed
        self.num_repeats = num_repeats
        self.epoch = 0
        self._num_skipped = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch, counted from 0."""
        self.epoch = epoch

    def skip(self, num_samples: int) -> None:
        """Skip this rank's first samples of the next epoch only."""
        self._num_skipped = num_samples

    def __len__(self) -> int:
        """Return the number of this rank's samples in a full epoch."""
        return math.ceil(len(self.dataset) / self.world_size)

    def __iter__(self) -> Iterator[SeededIndex]:
        """Yield this rank's indices with their seeds."""
        skipped, self._num_skipped = self._num_skipped, 0
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        count: int = len(self.dataset)
        order = torch.randperm(count, generator=generator).repeat_interleave(self.num_repeats)[:count]
        seeds = torch.randint(2**32, (len(self) * self.world_size,), generator=generator)
        own = range(self.rank + skipped * self.world_size, len(seeds), self.world_size)
        return (SeededIndex(int(order[position % count]), int(seeds[position])) for position in own)
