"""CUDA graphs: forward passes on images of one shape, captured once and replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from resbackbone.utils.validation import warn_user

ForwardPass = Callable[[Tensor], Any]
_CAPTURING = threading.Lock()  # CUDA captures one graph at a time in a process


class CudaGraphPool:
    """Captures the CUDA graphs of one net, on one stream and with one memory pool for intermediate tensors.

    A copy, in this process or another, captures its own graphs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_capturable = True
        self._stream: Any = None  # created on the device of the first images
        self._memory: Any = None

    def __reduce__(self) -> tuple[type[CudaGraphPool], tuple[()]]:
        return CudaGraphPool, ()

    def capture(self, run: ForwardPass, x: Tensor) -> ForwardPass:
        """Return a captured forward pass; if an operator cannot be captured, warn once and return ``run``.

        Args:
            run: The forward pass, of a tensor on a CUDA device.
            x: An input of the shape.
        """
        with self._lock, _CAPTURING, torch.cuda.device(x.device):
            if self._is_capturable:
                try:
                    if self._stream is None:
                        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                        self._memory = torch.cuda.graph_pool_handle()
                    return CudaGraph(run, x, self._stream, self._memory, self._lock)
                except RuntimeError as error:
                    self._is_capturable = False
                    reason = str(error).partition("\n")[0]
                    warn_user(f"this net cannot be captured as a CUDA graph and runs without: {reason}")
        return run


class CudaGraph:
    """A captured forward pass.

    Args:
        run: The forward pass, of a tensor on a CUDA device.
        x: An input of the shape.
        stream: The stream that all graphs of the net are replayed on.
        memory: Handle of the memory pool that they share.
        lock: Held while work is submitted to the stream; the caller holds it here.
    """

    def __init__(
        self, run: ForwardPass, x: Tensor, stream: torch.cuda.Stream, memory: Any, lock: threading.Lock
    ) -> None:
        self._stream, self._lock = stream, lock
        self._graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._x = torch.empty_like(x).copy_(x)
            for _ in range(3):  # warm-up: libraries choose their algorithms and allocate workspaces
                run(self._x)
        x.record_stream(stream)
        stream.synchronize()
        # "thread_local": work that other threads submit meanwhile is neither captured nor an error.
        with torch.cuda.graph(self._graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            self._outs = run(self._x)

    def __call__(self, x: Tensor) -> Any:
        """Replay the graph on another input of the shape, and return copies of its outputs."""
        caller = torch.cuda.current_stream(x.device)
        with self._lock, torch.cuda.stream(self._stream):
            self._stream.wait_stream(caller)
            self._x.copy_(x)
            self._graph.replay()
            outs = tree_map_only(Tensor, torch.clone, self._outs)  # the next replay overwrites the originals
        caller.wait_stream(self._stream)
        x.record_stream(self._stream)
        tree_map_only(Tensor, lambda out: out.record_stream(caller), outs)
        return outs
