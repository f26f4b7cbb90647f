"""Hooks of mmengine's runner for any task; those for classification are in the room of that task."""

from resbackbone.training.engine.hooks.checkpoint import ResumableCheckpointHook
from resbackbone.training.engine.hooks.curves import CurvesHook
from resbackbone.training.engine.hooks.finite_loss import FiniteLossHook, NonFiniteLossError
from resbackbone.training.engine.hooks.sync_batch_norm import SyncBatchNormHook
from resbackbone.training.engine.hooks.unfreeze import UnfreezeHook

__all__ = [
    "CurvesHook",
    "FiniteLossHook",
    "NonFiniteLossError",
    "ResumableCheckpointHook",
    "SyncBatchNormHook",
    "UnfreezeHook",
]
