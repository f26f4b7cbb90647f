"""Training backbones."""

from resbackbone.training.freezing import freeze
from resbackbone.training.frozen_norms import fold_frozen_norms
from resbackbone.training.param_groups import param_groups
from resbackbone.training.sync_norms import sync_batch_norms

__all__ = ["fold_frozen_norms", "freeze", "param_groups", "sync_batch_norms"]
