"""Backbones that compute the same, faster or elsewhere."""

from resbackbone.inference.exporting import Exported, export
from resbackbone.inference.optimizing import optimize
from resbackbone.inference.quantization import quantize

__all__ = ["Exported", "export", "optimize", "quantize"]
