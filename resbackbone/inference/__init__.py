"""Backbones that compute the same, faster."""

from resbackbone.inference.optimizing import optimize
from resbackbone.inference.quantization import quantize

__all__ = ["optimize", "quantize"]
