"""Load third-party checkpoints into backbones, and convert state dicts between key layouts."""

from resbackbone.checkpoints.conversion import convert_state_dict, detect_layout
from resbackbone.checkpoints.hub import Weights, default_weights, find_weights, list_weights
from resbackbone.checkpoints.loading import load_checkpoint, load_pretrained
from resbackbone.checkpoints.report import LoadReport
from resbackbone.checkpoints.saving import save_weights
from resbackbone.checkpoints.tensors import read_checkpoint

__all__ = [
    "LoadReport",
    "Weights",
    "convert_state_dict",
    "default_weights",
    "detect_layout",
    "find_weights",
    "list_weights",
    "load_checkpoint",
    "load_pretrained",
    "read_checkpoint",
    "save_weights",
]
