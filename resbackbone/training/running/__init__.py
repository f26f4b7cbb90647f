"""Crash-safe training in mmengine's runner; mmengine's registries import this when they need it."""

from resbackbone.training.running.checkpointing import (
    CheckpointDoesNotFit,
    CheckpointNotSaved,
    NonFiniteWeights,
    ResumableCheckpointHook,
    read_checkpoint,
)
from resbackbone.training.running.curves import CurvesHook, read_curves
from resbackbone.training.running.finite_loss import FiniteLossHook, NonFiniteLoss
from resbackbone.training.running.fsdp import FSDP2
from resbackbone.training.running.lamb import LAMB
from resbackbone.training.running.launching import build_runner, leave_processes, load_recipe
from resbackbone.training.running.layer_decay import LayerDecayConstructor
from resbackbone.training.running.loop import BatchTooSmall, ResumableTrainLoop
from resbackbone.training.running.runner import ResumableRunner
from resbackbone.training.running.sampling import Draw, EpochSampler
from resbackbone.training.running.sync_norms import SyncBatchNormHook
from resbackbone.training.running.unfreezing import UnfreezeHook

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
