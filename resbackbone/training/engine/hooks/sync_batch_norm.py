"""Hook for synchronized batch norm."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook

from resbackbone.registry import HOOKS
from resbackbone.training.sync_batch_norm import sync_batch_norms


@HOOKS.register_module()
class SyncBatchNormHook(Hook):
    """Calls :func:`resbackbone.training.sync_batch_norms` on the model, on any device.

    mmengine's own ``sync_bn="torch"`` works on accelerators only.
    """

    def before_train(self, runner: Any) -> None:
        """Synchronize the batch norms, or use plain ones in a single process."""
        sync_batch_norms(runner.model)
