"""Hook that freezes and unfreezes backbone stages by a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from torch import nn

from resbackbone.registry import HOOKS
from resbackbone.training.freeze import find_backbones, freeze
from resbackbone.utils.validation import check_ints, check_sequence


@HOOKS.register_module()
class UnfreezeHook(Hook):
    """Sets ``frozen_stages`` of the model's backbones by a schedule; before its first entry they stay as built.

    A resumed run follows the same schedule. The optimizer must hold all parameters from the start, frozen ones too, as
    mmengine's default constructor and :class:`LayerDecayOptimWrapperConstructor
    <resbackbone.training.engine.LayerDecayOptimWrapperConstructor>` build it.

    Args:
        schedule: Pairs of a start and the ``frozen_stages`` from then on. ``[(2, 1), (5, -1)]`` trains two epochs as
            built, three with the stem and one stage frozen, and then with nothing frozen.
        by_epoch: Whether starts are counted in epochs, or in iterations.

    Raises:
        TypeError, ValueError: If the schedule is invalid.

    Source: gradual unfreezing of Howard and Ruder, arXiv:1801.06146, section 3.3.
    """

    priority = "HIGH"

    def __init__(self, schedule: Sequence[tuple[int, int]], by_epoch: bool = True) -> None:
        pairs = check_sequence("schedule", schedule)
        self.schedule = [check_ints(f"schedule[{index}]", pair, low=-1, length=2) for index, pair in enumerate(pairs)]
        starts = [start for start, _ in self.schedule]
        if not starts or starts != sorted(set(starts)) or starts[0] < 0:
            raise ValueError(
                "`schedule` must be pairs of a start and `frozen_stages`, with starts that increase from 0 or more, "
                f"got {schedule!r}"
            )
        self.by_epoch = by_epoch
        self.frozen_stages: int | None = None

    def before_train(self, runner: Any) -> None:
        """Check that the schedule fits the model and the optimizer, and apply it.

        Raises:
            ValueError: If there is no backbone, it has fewer stages, or the optimizer lacks a parameter.
        """
        self._check(runner)
        self._apply(runner)

    def before_train_epoch(self, runner: Any) -> None:
        """Apply the schedule."""
        self._apply(runner)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Apply the schedule."""
        self._apply(runner)

    def _apply(self, runner: Any) -> None:
        now = runner.epoch if self.by_epoch else runner.iter
        started = [frozen_stages for start, frozen_stages in self.schedule if start <= now]
        if started and started[-1] != self.frozen_stages:
            self.frozen_stages = started[-1]
            freeze(runner.model, self.frozen_stages)
            runner.logger.info(f"{'epoch' if self.by_epoch else 'iteration'} {now}: frozen_stages={self.frozen_stages}")

    def _check(self, runner: Any) -> None:
        optimized = {id(parameter) for group in _groups(runner.optim_wrapper) for parameter in group["params"]}
        for backbone in find_backbones(runner.model):
            as_built = backbone.frozen_stages
            for _, frozen_stages in self.schedule:
                backbone.freeze(frozen_stages)
                _check_optimized(backbone, optimized)
            backbone.freeze(as_built)


def _groups(optim_wrapper: Any) -> list[dict[str, Any]]:
    groups = optim_wrapper.param_groups  # with several optimizers, a dict of lists by name
    return groups if isinstance(groups, list) else [group for each in groups.values() for group in each]


def _check_optimized(backbone: nn.Module, optimized: set[int]) -> None:
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad and id(parameter) not in optimized:
            raise ValueError(
                f"`schedule` of UnfreezeHook trains {name!r}, which is not in the optimizer; build the optimizer over "
                "all parameters, as constructor='resbackbone.LayerDecayOptimWrapperConstructor' does"
            )
