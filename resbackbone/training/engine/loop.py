"""mmengine's training loop by epochs, which can be resumed exactly, also within an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.dist import broadcast, get_rank
from mmengine.runner import EpochBasedTrainLoop
from mmengine.runner.utils import set_random_seed
from torch import nn

from resbackbone.registry import LOOPS
from resbackbone.training.engine.checkpoints import CheckpointDoesNotFit
from resbackbone.training.engine.sampler import EpochSampler, derive_seed


class BatchTooSmall(ValueError):
    """A batch has a single value per channel, of which batch norm cannot tell the variance."""


def is_too_small(error: ValueError) -> bool:
    """Whether an error is batch norm's, of PyTorch or this library, about a single value per channel."""
    return "xpected more than 1 value per channel" in str(error)


@LOOPS.register_module()
class ResumableTrainLoop(EpochBasedTrainLoop):
    """Trains by epochs; resumed from any checkpoint it takes the same steps as a run that was not interrupted.

    What mmengine's loop lacks for that: it begins a resumed epoch from its first batch, draws on random states that no
    checkpoint has, and leaves out a validation that was due when the run ended. Here every iteration seeds PyTorch,
    NumPy and Python from seed, iteration and rank.

    Args:
        runner: The runner.
        dataloader: Its ``sampler`` must be an :class:`EpochSampler`.
        **kwargs: As for mmengine's ``EpochBasedTrainLoop``: ``max_epochs``, ``val_begin``, ``val_interval``, ...

    Raises:
        TypeError: If the sampler is another one.
    """

    def __init__(self, runner: Any, dataloader: Any, **kwargs: Any) -> None:
        super().__init__(runner, dataloader, **kwargs)
        self.sampler = self.dataloader.sampler
        if not isinstance(self.sampler, EpochSampler):
            raise TypeError(
                "ResumableTrainLoop needs train_dataloader=dict(sampler=dict(type='EpochSampler')), "
                f"got a sampler of type {type(self.sampler).__name__}"
            )
        # What its config says itself, as mmengine gives every other sampler the run's seed.
        sampler = dataloader["sampler"] if isinstance(dataloader, Mapping) else self.sampler
        self._sampler_seed = sampler.get("seed") if isinstance(sampler, Mapping) else self.sampler.given_seed

    def run(self) -> nn.Module:
        """Train, and validate after every ``val_interval`` epochs.

        Returns:
            The model.

        Raises:
            CheckpointDoesNotFit: If it was resumed from a run with epochs of another length.
        """
        self.runner.call_hook("before_train")
        # Only now, as a resumed run's seed is in its checkpoint.
        self.sampler.seed = self.runner.seed if self._sampler_seed is None else self._sampler_seed
        if self._iter > 0 and self._done_in_epoch() == 0:
            self._validate_if_due()  # for the case that the earlier run ended before or during it
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._validate_if_due()
        self.runner.call_hook("after_train")
        model: nn.Module = self.runner.model
        return model

    def run_epoch(self) -> None:
        """Train for what is left of the epoch."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        done = self._done_in_epoch()
        self.sampler.skip(done * self.dataloader.batch_size)
        for index, batch in enumerate(self.dataloader, start=done):
            self.run_iter(index, batch)
        for buffer in self.runner.model.buffers():
            broadcast(buffer)  # norms' statistics, of which each process has its own
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Take one step.

        Raises:
            BatchTooSmall: If batch norm has a single value per channel.
        """
        set_random_seed(derive_seed(self.runner.seed, self._iter, get_rank()))
        try:
            super().run_iter(idx, data_batch)
        except ValueError as error:
            if not isinstance(error, BatchTooSmall) and not is_too_small(error):
                raise
            size = self.dataloader.batch_size
            advice = "choose another batch_size, or larger pictures"
            if size > 1:
                advice = f"train_dataloader.drop_last=True leaves such a last batch out; or {advice}"
            raise BatchTooSmall(
                f"batch {idx + 1} of {len(self.dataloader)} in epoch {self._epoch + 1} has one picture (batch_size is "
                f"{size}, of {len(self.dataloader.sampler)}), and at maps of one pixel batch norm needs two: {advice}"
            ) from error

    def _done_in_epoch(self) -> int:
        """Batches of the epoch that an earlier run has seen."""
        done = self._iter - self._epoch * len(self.dataloader)
        if not 0 <= done <= len(self.dataloader):
            raise CheckpointDoesNotFit(
                f"the checkpoint is of epoch {self._epoch} and iteration {self._iter}, but an epoch has "
                f"{len(self.dataloader)} iterations now; resume with the batch size, the number of processes and the "
                "pictures that it was trained with, or begin anew with `load_from`"
            )
        return int(done)

    def _validate_if_due(self) -> None:
        self._decide_current_val_interval()
        due = self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
        done = self.runner.message_hub.get_info("validated") == self._epoch
        if self.runner.val_loop is not None and self._epoch >= self.val_begin and due and not done:
            # Before, as a checkpoint that is saved at the end of a validation has its results.
            self.runner.message_hub.update_info("validated", self._epoch)
            self.runner.val_loop.run()
