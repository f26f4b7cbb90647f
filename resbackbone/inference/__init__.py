"""Backbones that compute the same, faster."""

from resbackbone.inference.optimizing import optimize

__all__ = ["optimize"]
