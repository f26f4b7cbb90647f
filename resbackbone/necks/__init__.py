"""Necks: modules between a backbone and the heads."""

from resbackbone.necks.fpn import FPN

__all__ = ["FPN"]
