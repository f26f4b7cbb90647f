"""Epoch-based training loop for mmengine that resumes exactly, also within an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.dist import broadcast, get_rank
from mmengine.runner import EpochBasedTrainLoop
from mmengine.runner.utils import set_random_seed
from torch import nn

from resbackbone.registry import LOOPS
from resbackbone.training.engine.checkpoints import CheckpointMismatchError
from resbackbone.training.engine.sampler import EpochSampler, derive_seed


class BatchTooSmallError(ValueError):
    """A batch has a single value per channel, too few for batch norm."""


def is_too_small(error: ValueError) -> bool:
    """Return whether an error is that of batch norm about a single value per channel; PyTorch has no class for it."""
    # PyTorch's message begins with a capital, that of AllReduceBatchNorm does not.
    return "xpected more than 1 value per channel" in str(error)


@LOOPS.register_module()
class ResumableTrainLoop(EpochBasedTrainLoop):
    """Trains by epochs; resumed from any checkpoint, it takes the same steps as an uninterrupted run.

    mmengine's loop restarts a resumed epoch at its first batch, uses random states that are not in the checkpoint, and
    skips a validation that was due when the run ended. This loop seeds PyTorch, NumPy and Python in every iteration,
    from the run's seed, the iteration and the rank.

    Args:
        runner: The runner.
        dataloader: Config or object; its ``sampler`` must be an :class:`EpochSampler`.
        **kwargs: Options of mmengine's ``EpochBasedTrainLoop``: ``max_epochs``, ``val_begin``, ``val_interval``, ...

    Raises:
        TypeError: If the sampler is of another class.
    """

    def __init__(self, runner: Any, dataloader: Any, **kwargs: Any) -> None:
        super().__init__(runner, dataloader, **kwargs)
        self.sampler = self.dataloader.sampler
        if not isinstance(self.sampler, EpochSampler):
            raise TypeError(
                "ResumableTrainLoop needs train_dataloader=dict(sampler=dict(type='EpochSampler')), "
                f"got a sampler of type {type(self.sampler).__name__}"
            )
        # The seed of the config itself: mmengine passes the run's seed to samplers without one.
        sampler = dataloader["sampler"] if isinstance(dataloader, Mapping) else self.sampler
        self._sampler_seed = sampler.get("seed") if isinstance(sampler, Mapping) else self.sampler.given_seed

    def run(self) -> nn.Module:
        """Train, and validate after every ``val_interval`` epochs.

        Returns:
            The model.

        Raises:
            CheckpointMismatchError: If the resumed run had another number of iterations per epoch.
        """
        self.runner.call_hook("before_train")
        # Not earlier: the seed of a resumed run is in its checkpoint.
        self.sampler.seed = self.runner.seed if self._sampler_seed is None else self._sampler_seed
        if self._iter > 0 and self._iters_done_in_epoch() == 0:
            self._validate_if_due()  # in case the earlier run ended before or during it
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._validate_if_due()
        self.runner.call_hook("after_train")
        model: nn.Module = self.runner.model
        return model

    def run_epoch(self) -> None:
        """Train for the rest of the epoch."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        done = self._iters_done_in_epoch()
        self.sampler.skip(done * self.dataloader.batch_size)
        for index, batch in enumerate(self.dataloader, start=done):
            self.run_iter(index, batch)
        for buffer in self.runner.model.buffers():
            broadcast(buffer)  # batch norm statistics, which differ between ranks
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Run one training step.

        Raises:
            BatchTooSmallError: If batch norm has a single value per channel.
        """
        set_random_seed(derive_seed(self.runner.seed, self._iter, get_rank()))
        try:
            super().run_iter(idx, data_batch)
        except ValueError as error:
            if not isinstance(error, BatchTooSmallError) and not is_too_small(error):
                raise
            size = self.dataloader.batch_size
            advice = "choose another batch_size, or larger pictures"
            if size > 1:
                advice = f"train_dataloader.drop_last=True drops such a last batch; or {advice}"
            raise BatchTooSmallError(
                f"batch {idx + 1} of {len(self.dataloader)} in epoch {self._epoch + 1} has one picture (batch_size is "
                f"{size}, of {len(self.dataloader.sampler)}), but batch norm needs two for feature maps of one pixel: "
                f"{advice}"
            ) from error

    def _iters_done_in_epoch(self) -> int:
        """Return the number of iterations of this epoch in earlier runs."""
        done = self._iter - self._epoch * len(self.dataloader)
        if not 0 <= done <= len(self.dataloader):
            raise CheckpointMismatchError(
                f"the checkpoint is of epoch {self._epoch} and iteration {self._iter}, but an epoch now has "
                f"{len(self.dataloader)} iterations; resume with the same batch size, number of processes and "
                "pictures, or start a new run with `load_from`"
            )
        return int(done)

    def _validate_if_due(self) -> None:
        self._decide_current_val_interval()
        due = self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
        done = self.runner.message_hub.get_info("validated") == self._epoch
        if self.runner.val_loop is not None and self._epoch >= self.val_begin and due and not done:
            # Set first, so that a checkpoint saved at the end of this validation contains it.
            self.runner.message_hub.update_info("validated", self._epoch)
            self.runner.val_loop.run()
