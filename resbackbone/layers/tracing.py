"""Detect tracing, exporting and function transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import nn

is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
is_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active  # by torch.func.vmap, jvp and so on
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.7


def is_recording() -> bool:
    """Return whether the forward pass is recorded as a graph, by export, for ONNX or by ``torch.jit.trace``."""
    return is_exporting() or is_tracing()


def refuse_scripting(module: nn.Module) -> NoReturn:
    """Raise TypeError, since ``torch.jit.script`` cannot compile these modules."""
    raise TypeError(
        f"torch.jit.script cannot compile {type(module).__name__}: use torch.jit.trace(net.eval(), images), which also "
        "accepts batches and images of other sizes, or write a file with resbackbone.inference.export"
    )
