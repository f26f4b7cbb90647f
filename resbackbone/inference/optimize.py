"""Optimize a net for inference: the same feature maps, faster."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from resbackbone.inference.engines import (
    CompiledEngine,
    CudaGraphEngine,
    EagerEngine,
    Engine,
    OneDNNEngine,
    copy_for_inference,
)
from resbackbone.inference.fused_conv import FusedConv2d, OneDNNConv2d
from resbackbone.inference.graph import fuse, trace
from resbackbone.utils import processor
from resbackbone.utils.validation import check_choice, check_int, warn_user

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PREPACK_BYTES = 1 << 29  # default limit of the memory for prepacked weights


def optimize(
    net: nn.Module,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    backend: Literal["auto", "onednn", "compile", "eager"] = "auto",
    *,
    prepack_bytes: int = PREPACK_BYTES,
) -> nn.Module:
    """Return a copy of a net that is optimized for inference: the same inputs and outputs, faster.

    Batch norms are folded into convolutions, and the computation is in channels_last. On CPUs, convolutions are fused
    with additions and ReLUs into operators of oneDNN, which PyTorch ships: nothing is compiled, and a new image size
    costs nothing. For repeated sizes weights are prepacked; on CUDA devices a CUDA graph is captured.

    Args:
        net: A backbone, or a traceable model that calls one, such as ``nn.Sequential(net, fpn)``. It is not changed,
            and later changes to it do not affect the result. Its forward hooks are dropped with a warning, except with
            ``backend`` "compile".
        dtype: Dtype of the computation and the feature maps; "float16" on CUDA devices only. A CPU without
            instructions for bfloat16 (on x86 AVX-512 BF16 or AMX) computes in float32, which is faster there, and
            returns feature maps in bfloat16, with a warning.
        backend: "onednn" for oneDNN on CPUs; "eager" for PyTorch operators; "compile" for ``torch.compile``; "auto"
            for oneDNN on CPUs, and PyTorch operators elsewhere, in CUDA graphs on CUDA devices.
        prepack_bytes: Bytes that weights prepacked for repeated sizes may take with oneDNN; 0 for none.

    Returns:
        A module: images ``(N, in_channels, H, W)`` to the same feature maps as the net's. They are contiguous unless
        the images are in channels_last, which saves the conversion.

    Raises:
        ValueError: If an argument is unknown, ``net`` cannot be traced or has weights that are NaN, or the backend does
            not run here.
    """
    check_choice("dtype", dtype, tuple(_DTYPES))
    check_choice("backend", backend, ("auto", "onednn", "compile", "eager"))
    check_int("prepack_bytes", prepack_bytes, low=0)
    if dtype == "float16" and not _is_on_cuda(net):
        raise ValueError(
            "`dtype`='float16' needs a net on a CUDA device: move it there, or use 'float32' or 'bfloat16' on a CPU"
        )
    computed = _computed_dtype(net, _DTYPES[dtype])
    engine = _make_engine(copy_for_inference(net), computed, backend, prepack_bytes)
    engine.out_dtype = _DTYPES[dtype]
    return engine


def _computed_dtype(net: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the computation: float32, with a warning, if the CPU has no instructions for ``dtype``."""
    computed = processor.computed_dtype(dtype) if _is_on_cpu(net) else dtype
    if computed is not dtype:
        name = str(dtype).removeprefix("torch.")
        warn_user(
            f"{processor.reason(dtype)} and would be several times slower in it than in float32: "
            f"{type(net).__name__} computes in float32 and returns feature maps in {name}; "
            "pass dtype='float32' if those may be float32"
        )
    return computed


def _make_engine(net: nn.Module, dtype: torch.dtype, backend: str, prepack_bytes: int) -> Engine:
    if backend == "compile":
        return CompiledEngine(net.to(dtype, memory_format=torch.channels_last), dtype)  # type: ignore[call-overload]
    with_onednn = backend == "onednn" or (backend == "auto" and _runs_onednn(net))
    if with_onednn:
        require_onednn(net)
    traced = trace(net)
    if with_onednn:
        fused = fuse(traced, OneDNNConv2d, dtype)
        return OneDNNEngine(net, traced.to(dtype), fused, dtype, prepack_bytes)
    engine_class = CudaGraphEngine if backend == "auto" and _is_on_cuda(net) else EagerEngine
    convolutions = fuse(traced, FusedConv2d, dtype)
    return engine_class(net, traced.to(dtype), convolutions, dtype)


def require_onednn(net: nn.Module) -> None:
    """Raise ValueError unless oneDNN can compute a net on this machine."""
    if not _runs_onednn(net):
        raise ValueError(
            f"oneDNN needs weights on the CPU and a PyTorch built with it; {type(net).__name__} lacks one of these; "
            "use optimize(net, backend='eager')"
        )


def _runs_onednn(net: nn.Module) -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and _is_on_cpu(net) and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _is_on_cpu(net: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in net.state_dict().values())


def _is_on_cuda(net: nn.Module) -> bool:
    return any(tensor.is_cuda for tensor in net.state_dict().values())
