"""Weights from files into backbones."""

from resbackbone.checkpoints.loading import LoadReport, load_checkpoint

__all__ = ["LoadReport", "load_checkpoint"]
