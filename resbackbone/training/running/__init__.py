"""What turns mmengine's training into one that survives crashes; its registries import this when they need it."""

from resbackbone.training.running.checkpointing import CheckpointNotSaved, ResumableCheckpointHook, read_checkpoint
from resbackbone.training.running.curves import CurvesHook, read_curves
from resbackbone.training.running.finite_loss import FiniteLossHook, NonFiniteLoss
from resbackbone.training.running.lamb import LAMB
from resbackbone.training.running.launching import build_runner, leave_processes, load_recipe
from resbackbone.training.running.loop import ResumableTrainLoop
from resbackbone.training.running.runner import ResumableRunner
from resbackbone.training.running.sampling import Draw, EpochSampler

__all__ = [
    "LAMB",
    "CheckpointNotSaved",
    "CurvesHook",
    "Draw",
    "EpochSampler",
    "FiniteLossHook",
    "NonFiniteLoss",
    "ResumableCheckpointHook",
    "ResumableRunner",
    "ResumableTrainLoop",
    "build_runner",
    "leave_processes",
    "load_recipe",
    "read_checkpoint",
    "read_curves",
]
