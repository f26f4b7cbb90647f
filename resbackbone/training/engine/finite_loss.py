"""Stopping a training that has come to nothing."""

from __future__ import annotations

import math
from typing import Any

from mmengine.hooks import Hook

from resbackbone.registry import HOOKS
from resbackbone.training.engine.checkpoints import ADVICE
from resbackbone.training.engine.distributed import fail_together


class NonFiniteLoss(ArithmeticError):
    """The loss is NaN or infinite."""


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Ends a training whose loss is NaN or infinite, in all processes if it is so in one.

    It looks at every iteration, which costs nothing beside mmengine, which logs every loss. Weights that are lost
    before the loss shows it are kept out of checkpoints by what saves those.
    """

    priority = "VERY_HIGH"

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Look at the losses.

        Raises:
            NonFiniteLoss: If one of them is not finite.
        """
        with fail_together(NonFiniteLoss):
            for name, value in (outputs or {}).items():
                if "loss" in name and not math.isfinite(value := value.item()):
                    last = runner.message_hub.get_info("last_ckpt")
                    raise NonFiniteLoss(
                        f"the {name} is {value} at iteration {runner.iter + 1} (epoch {runner.epoch + 1}, batch "
                        f"{batch_idx + 1}), so training has ended; "
                        + (f"the checkpoint before is {last}. " if last else "no checkpoint was saved before. ")
                        + ADVICE
                    )
