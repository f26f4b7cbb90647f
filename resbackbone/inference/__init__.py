"""Inference: optimize, quantize and export nets."""

from resbackbone.inference.export import ExportResult, export
from resbackbone.inference.optimize import optimize
from resbackbone.inference.quantization import quantize

__all__ = ["ExportResult", "export", "optimize", "quantize"]
