"""Training backbones."""

from resbackbone.training.fold_frozen_norms import fold_frozen_norms
from resbackbone.training.freeze import freeze
from resbackbone.training.param_groups import param_groups
from resbackbone.training.sync_batch_norm import sync_batch_norms

__all__ = ["fold_frozen_norms", "freeze", "param_groups", "sync_batch_norms"]
