"""Training backbones."""

from resbackbone.training.param_groups import param_groups

__all__ = ["param_groups"]
