"""Synchronized batch norms in mmengine's runner."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook

from resbackbone.registry import HOOKS
from resbackbone.training.sync_batch_norm import sync_batch_norms


@HOOKS.register_module()
class SyncBatchNormHook(Hook):
    """Calls :func:`resbackbone.training.sync_batch_norms` on the model, on whatever device it trains.

    mmengine's own ``sync_bn="torch"`` does so on accelerators alone.
    """

    def before_train(self, runner: Any) -> None:
        """Synchronize the batch norms, or make them plain where there is one process."""
        sync_batch_norms(runner.model)
