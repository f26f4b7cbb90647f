"""Whether a forward pass runs or is being recorded, which some layers must know."""

from __future__ import annotations

from collections.abc import Callable

import torch

is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
is_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active  # by torch.func.vmap, jvp and so on
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.7


def is_recording() -> bool:
    """Return whether the pass becomes a graph for sizes yet to come: by ``torch.export``, to ONNX or by tracing."""
    return _is_exporting() or is_tracing()
