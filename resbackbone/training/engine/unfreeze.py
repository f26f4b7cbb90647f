"""Letting go of a backbone's stages as training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from torch import nn

from resbackbone.registry import HOOKS
from resbackbone.training.freeze import backbones_of, freeze
from resbackbone.utils.validation import check_ints, check_sequence


@HOOKS.register_module()
class UnfreezeHook(Hook):
    """Sets ``frozen_stages`` of the model's backbones by a schedule; until it begins, they are as they were built.

    A resumed run does as one that was not interrupted. The optimizer must have from the beginning whatever is to train,
    as those of mmengine's constructor and of ours do.

    Args:
        schedule: Pairs of a time and the ``frozen_stages`` from then on, such as ``[(2, 1), (5, -1)]``: two epochs as
            built, three with the stem and one stage frozen, then with nothing frozen.
        by_epoch: Whether the times are epochs, or iterations.

    Raises:
        TypeError, ValueError: If it is no such schedule.

    Source: gradual unfreezing of Howard and Ruder, arXiv:1801.06146, section 3.3.
    """

    priority = "HIGH"

    def __init__(self, schedule: Sequence[tuple[int, int]], by_epoch: bool = True) -> None:
        pairs = check_sequence("schedule", schedule)
        self.schedule = [check_ints(f"schedule[{index}]", pair, low=-1, length=2) for index, pair in enumerate(pairs)]
        times = [time for time, _ in self.schedule]
        if not times or times != sorted(set(times)) or times[0] < 0:
            raise ValueError(
                f"`schedule` must have pairs of a time, from 0 and rising, and `frozen_stages`, got {schedule!r}"
            )
        self.by_epoch = by_epoch
        self.frozen_stages: int | None = None

    def before_train(self, runner: Any) -> None:
        """See whether the schedule fits model and optimizer, and come to where it is now.

        Raises:
            ValueError: If there is no backbone, or it has not as many stages, or the optimizer lacks a parameter.
        """
        self._check(runner)
        self._follow(runner)

    def before_train_epoch(self, runner: Any) -> None:
        """Follow the schedule."""
        self._follow(runner)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Follow the schedule."""
        self._follow(runner)

    def _follow(self, runner: Any) -> None:
        now = runner.epoch if self.by_epoch else runner.iter
        due = [frozen_stages for time, frozen_stages in self.schedule if time <= now]
        if due and due[-1] != self.frozen_stages:
            self.frozen_stages = due[-1]
            freeze(runner.model, self.frozen_stages)
            runner.logger.info(f"{'epoch' if self.by_epoch else 'iteration'} {now}: frozen_stages={self.frozen_stages}")

    def _check(self, runner: Any) -> None:
        optimized = {id(parameter) for group in _groups(runner.optim_wrapper) for parameter in group["params"]}
        for backbone in backbones_of(runner.model):
            built_with = backbone.frozen_stages
            for _, frozen_stages in self.schedule:
                backbone.freeze(frozen_stages)
                _check_optimized(backbone, optimized)
            backbone.freeze(built_with)


def _groups(optim_wrapper: Any) -> list[dict[str, Any]]:
    groups = optim_wrapper.param_groups  # a dict of such, by name, if there are several optimizers
    return groups if isinstance(groups, list) else [group for each in groups.values() for group in each]


def _check_optimized(backbone: nn.Module, optimized: set[int]) -> None:
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad and id(parameter) not in optimized:
            raise ValueError(
                f"`schedule` of UnfreezeHook lets {name!r} train, which the optimizer does not have; build it over all "
                "parameters, as constructor='resbackbone.LayerDecayConstructor' does"
            )
