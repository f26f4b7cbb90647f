"""Crash-safe training in mmengine's runner; mmengine's registries import this when they need it."""

from resbackbone.training.engine.checkpoints import (
    CheckpointMismatchError,
    CheckpointSaveError,
    NonFiniteWeightsError,
    read_checkpoint,
)
from resbackbone.training.engine.fsdp import FSDP2
from resbackbone.training.engine.hooks import (
    CurvesHook,
    FiniteLossHook,
    NonFiniteLossError,
    ResumableCheckpointHook,
    SyncBatchNormHook,
    UnfreezeHook,
)
from resbackbone.training.engine.launch import build_runner, leave_process_group, load_training_config
from resbackbone.training.engine.layer_decay import LayerDecayOptimWrapperConstructor
from resbackbone.training.engine.loop import BatchTooSmallError, ResumableTrainLoop
from resbackbone.training.engine.runner import ResumableRunner
from resbackbone.training.engine.sampler import EpochSampler, SeededIndex

__all__ = [
    "FSDP2",
    "BatchTooSmallError",
    "CheckpointMismatchError",
    "CheckpointSaveError",
    "CurvesHook",
    "EpochSampler",
    "FiniteLossHook",
    "LayerDecayOptimWrapperConstructor",
    "NonFiniteLossError",
    "NonFiniteWeightsError",
    "ResumableCheckpointHook",
    "ResumableRunner",
    "ResumableTrainLoop",
    "SeededIndex",
    "SyncBatchNormHook",
    "UnfreezeHook",
    "build_runner",
    "leave_process_group",
    "load_training_config",
    "read_checkpoint",
]
