"""Passes over images of one size, each recorded on a CUDA device and launched at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from resbackbone.utils.validation import warn_user

Pass = Callable[[Tensor], Any]
_CAPTURING = threading.Lock()  # CUDA captures one graph at a time in a process


class Recorder:
    """What all passes of one net share: a stream, on which one follows the other, and so the memory in between.

    A copy, in this process or another, records its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works = True
        self._stream: Any = None  # made on the device that the first images are on
        self._pool: Any = None

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return Recorder, ()

    def record(self, run: Pass, x: Tensor) -> Pass:
        """Return a recorded pass; if an operator cannot be captured, warn once, and return the pass as it is.

        Args:
            run: What is recorded; of a tensor on a CUDA device.
            x: A tensor of the size.
        """
        with self._lock, _CAPTURING, torch.cuda.device(x.device):
            if self._works:
                try:
                    if self._stream is None:
                        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                        self._pool = torch.cuda.graph_pool_handle()
                    return CudaGraph(run, x, self._stream, self._pool, self._lock)
                except RuntimeError as error:
                    self._works = False
                    reason = str(error).partition("\n")[0]
                    warn_user(f"no CUDA graph can be made of this net, it runs without: {reason}")
        return run


class CudaGraph:
    """A pass that was recorded.

    Args:
        run: What is recorded; of a tensor on a CUDA device.
        x: A tensor of the size.
        stream: Where it runs, and those that share its memory.
        pool: That memory.
        lock: Held while the stream is given work; the caller holds it here.
    """

    def __init__(self, run: Pass, x: Tensor, stream: torch.cuda.Stream, pool: Any, lock: threading.Lock) -> None:
        self._stream, self._lock = stream, lock
        self._graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._x = torch.empty_like(x).copy_(x)
            for _ in range(3):  # libraries choose their algorithms and get their workspaces
                run(self._x)
        x.record_stream(stream)
        stream.synchronize()
        # What other threads do on the device meanwhile is no part of it, and no error.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._outs = run(self._x)

    def __call__(self, x: Tensor) -> Any:
        """Compute on another tensor of the size; what it returns is the caller's."""
        caller = torch.cuda.current_stream(x.device)
        with self._lock, torch.cuda.stream(self._stream):
            self._stream.wait_stream(caller)
            self._x.copy_(x)
            self._graph.replay()
            outs = tree_map_only(Tensor, torch.clone, self._outs)  # the next pass computes in the same memory
        caller.wait_stream(self._stream)
        x.record_stream(self._stream)
        tree_map_only(Tensor, lambda out: out.record_stream(caller), outs)
        return outs
