"""Crash-safe training in mmengine's runner; mmengine's registries import this when they need it."""

from resbackbone.training.engine.checkpoints import (
    CheckpointDoesNotFit,
    CheckpointNotSaved,
    NonFiniteWeights,
    ResumableCheckpointHook,
    read_checkpoint,
)
from resbackbone.training.engine.curves import CurvesHook, read_curves
from resbackbone.training.engine.finite_loss import FiniteLossHook, NonFiniteLoss
from resbackbone.training.engine.fsdp import FSDP2
from resbackbone.training.engine.lamb import LAMB
from resbackbone.training.engine.launch import build_runner, leave_processes, load_recipe
from resbackbone.training.engine.layer_decay import LayerDecayConstructor
from resbackbone.training.engine.loop import BatchTooSmall, ResumableTrainLoop
from resbackbone.training.engine.runner import ResumableRunner
from resbackbone.training.engine.sampler import Draw, EpochSampler
from resbackbone.training.engine.sync_batch_norm_hook import SyncBatchNormHook
from resbackbone.training.engine.unfreeze import UnfreezeHook

__all__ = [
    "FSDP2",
    "LAMB",
    "BatchTooSmall",
    "CheckpointDoesNotFit",
    "CheckpointNotSaved",
    "CurvesHook",
    "Draw",
    "EpochSampler",
    "FiniteLossHook",
    "LayerDecayConstructor",
    "NonFiniteLoss",
    "NonFiniteWeights",
    "ResumableCheckpointHook",
    "ResumableRunner",
    "ResumableTrainLoop",
    "SyncBatchNormHook",
    "UnfreezeHook",
    "build_runner",
    "leave_processes",
    "load_recipe",
    "read_checkpoint",
    "read_curves",
]
