"""Load third-party checkpoints into backbones, and convert state dicts between the key layouts of libraries."""

from resbackbone.checkpoints.conversion import convert_state_dict, detect_layout
from resbackbone.checkpoints.hub.catalog import Weights, default_weights, find_weights, list_weights
from resbackbone.checkpoints.loading import load_checkpoint
from resbackbone.checkpoints.report import LoadReport

__all__ = [
    "LoadReport",
    "Weights",
    "convert_state_dict",
    "default_weights",
    "detect_layout",
    "find_weights",
    "list_weights",
    "load_checkpoint",
]
