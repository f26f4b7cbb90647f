"""Hook that stops training when the loss is NaN or infinite."""

from __future__ import annotations

import math
from typing import Any

from mmengine.hooks import Hook

from resbackbone.registry import HOOKS
from resbackbone.training.engine.checkpoints import DIVERGENCE_ADVICE
from resbackbone.training.engine.distributed import raise_on_all_ranks


class NonFiniteLossError(ArithmeticError):
    """The loss is NaN or infinite."""


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops training on all ranks when the loss of one is NaN or infinite.

    It checks every iteration. This adds no synchronization, as mmengine logs every loss anyway. Weights that became
    non-finite before the loss did are rejected when the next checkpoint is saved.
    """

    priority = "VERY_HIGH"

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Check the losses.

        Raises:
            NonFiniteLossError: If one of them is not finite.
        """
        with raise_on_all_ranks(NonFiniteLossError):
            for name, value in (outputs or {}).items():
                if "loss" in name and not math.isfinite(value := value.item()):
                    last = runner.message_hub.get_info("last_ckpt")
                    raise NonFiniteLossError(
                        f"the {name} is {value} at iteration {runner.iter + 1} (epoch {runner.epoch + 1}, batch "
                        f"{batch_idx + 1}), so training was stopped; "
                        + (f"the last checkpoint is {last}. " if last else "no checkpoint was saved before. ")
                        + DIVERGENCE_ADVICE
                    )
