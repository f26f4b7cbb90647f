"""One pass over images of one size, recorded on a CUDA device and launched at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class CudaGraph:
    """A pass that was recorded.

    Args:
        run: What is recorded; of a tensor on a CUDA device.
        x: A tensor of the size.
    """

    def __init__(self, run: Callable[[Tensor], Any], x: Tensor) -> None:
        # All launches in one row, whatever thread or stream asks.
        self._stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._x = x.clone()
        self._graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            for _ in range(3):  # libraries choose their algorithms and get their workspaces
                run(self._x)
        self._stream.synchronize()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._outs = run(self._x)

    def __call__(self, x: Tensor) -> Any:
        """Compute on another tensor of the size; what it returns is the caller's."""
        caller = torch.cuda.current_stream(x.device)
        with self._lock, torch.cuda.stream(self._stream):
            self._stream.wait_stream(caller)
            self._x.copy_(x)
            self._graph.replay()
            outs = tree_map(torch.clone, self._outs)
        caller.wait_stream(self._stream)
        x.record_stream(self._stream)
        tree_map(lambda out: out.record_stream(caller), outs)
        return outs
