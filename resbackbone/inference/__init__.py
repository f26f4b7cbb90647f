"""Backbones that compute the same, faster or elsewhere."""

from resbackbone.inference.export import Exported, export
from resbackbone.inference.optimize import optimize
from resbackbone.inference.quantization import quantize

__all__ = ["Exported", "export", "optimize", "quantize"]
