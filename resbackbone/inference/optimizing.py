"""A net that computes the same, faster."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import nn

from resbackbone.checks import check_choice, check_int
from resbackbone.inference.convolution import FoldedConv2d, FusedConv2d
from resbackbone.inference.engines import Captured, Compiled, Folded, Fused
from resbackbone.inference.graph import fuse, trace

Backend = Literal["auto", "onednn", "compile", "eager"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACK_BYTES = 1 << 29  # what packed weights may take unless said otherwise


def optimize(
    net: nn.Module,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    backend: Backend = "auto",
    *,
    pack_bytes: int = PACK_BYTES,
) -> nn.Module:
    """Return a net for inference that takes and hands out the same, and is faster.

    Norms are folded into convolutions, and everything lies in channels_last. On CPUs convolutions, sums and ReLUs are
    operators of oneDNN, which PyTorch ships: nothing is compiled, and a new image size costs nothing. A size that comes
    back gets weights laid out for it; on CUDA devices it is captured as a CUDA graph.

    Args:
        net: A backbone, or anything that calls one and can be traced, such as ``nn.Sequential(net, fpn)``. It stays as
            it is; later changes to it do not reach the result. Its forward hooks stay behind, with a warning, but for
            ``backend`` "compile".
        dtype: What is computed in, and handed out; "float16" on CUDA devices only.
        backend: "onednn" on CPUs; "eager" for PyTorch's own operators; "compile" for the net through
            ``torch.compile``; "auto" for the first on CPUs, and elsewhere for the second, on CUDA with graphs.
        pack_bytes: Bytes that the weights laid out for sizes may take with oneDNN; 0 for none. The others lay out none.

    Returns:
        A module: images ``(N, in_channels, H, W)`` to the same feature maps, in channels_last where the backend leaves
        them so, which "compile" decides for itself.

    Raises:
        ValueError: If an argument is unknown, ``net`` cannot be traced or has weights that are NaN, or the backend does
            not run here.
    """
    check_choice("dtype", dtype, tuple(_DTYPES))
    check_choice("backend", backend, ("auto", "onednn", "compile", "eager"))
    check_int("pack_bytes", pack_bytes, low=0)
    copied = copy.deepcopy(net).eval().requires_grad_(False)
    on_cuda = any(tensor.is_cuda for tensor in copied.state_dict().values())
    if dtype == "float16" and not on_cuda:
        raise ValueError("`dtype`='float16' is for nets on a CUDA device, move it there; on a CPU use 'bfloat16'")
    number = _DTYPES[dtype]
    if backend == "compile":
        return Compiled(copied.to(number, memory_format=torch.channels_last), number)  # type: ignore[call-overload]
    with_onednn = backend == "onednn" or (backend == "auto" and _runs_onednn(copied, number))
    if with_onednn:
        require_onednn(copied, number)
    traced = trace(copied)
    if with_onednn:
        fused = fuse(traced, FusedConv2d, number)
        return Fused(copied, traced.to(number), fused, number, pack_bytes)
    folded = fuse(traced, FoldedConv2d, number)
    engine = Captured if backend == "auto" and on_cuda else Folded
    return engine(copied, traced.to(number), folded, number)


def require_onednn(net: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Refuse a net that the operators of oneDNN cannot compute, in a dtype, on this machine."""
    if not _runs_onednn(net, dtype):
        raise ValueError(
            f"oneDNN needs weights on the CPU, a PyTorch built with it, and for bfloat16 a processor with AVX-512 or "
            f"the like; {type(net).__name__} in {dtype} lacks one of these; use optimize(net, backend='eager')"
        )


def _runs_onednn(net: nn.Module, dtype: torch.dtype) -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    on_cpu = all(tensor.device.type == "cpu" for tensor in net.state_dict().values())
    if not (available and on_cpu and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return False
    return dtype is not torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
