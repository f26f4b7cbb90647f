"""Training tools for any training loop: frozen stages and norms, parameter groups, synchronized batch norm, LAMB."""

from resbackbone.training.fold_frozen_norms import fold_frozen_norms
from resbackbone.training.freeze import freeze
from resbackbone.training.lamb import LAMB
from resbackbone.training.layer_depth import layer_depth
from resbackbone.training.param_groups import param_groups
from resbackbone.training.sync_batch_norm import sync_batch_norms

__all__ = ["LAMB", "fold_frozen_norms", "freeze", "layer_depth", "param_groups", "sync_batch_norms"]
