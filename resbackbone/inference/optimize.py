"""Optimize a net for inference: the same feature maps, faster."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from resbackbone.inference.convolution import FoldedConv2d, FusedConv2d
from resbackbone.inference.copying import copy_for_inference
from resbackbone.inference.engines import Captured, Compiled, Folded, Fused, Optimized
from resbackbone.inference.graph import fuse, trace
from resbackbone.utils import processor
from resbackbone.utils.validation import check_choice, check_int, warn_user

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
    """Return a net for inference with the same inputs and outputs that is faster.

    Norms are folded into convolutions, and everything lies in channels_last. On CPUs convolutions, sums and ReLUs are
    operators of oneDNN, which PyTorch ships: nothing is compiled, and a new image size costs nothing. A size that comes
    back gets weights laid out for it; on CUDA devices it is captured as a CUDA graph.

    Args:
        net: A backbone, or anything that calls one and can be traced, such as ``nn.Sequential(net, fpn)``. It stays as
            it is; later changes to it do not reach the result. Its forward hooks stay behind, with a warning, but for
            ``backend`` "compile".
        dtype: Of the computation and the feature maps; "float16" on CUDA devices only. A CPU without instructions for
            bfloat16 (on x86 AVX-512 BF16 or AMX) computes in float32, which is faster there, and returns feature maps
            in bfloat16; a warning says so.
        backend: "onednn" on CPUs; "eager" for PyTorch's own operators; "compile" for the net through
            ``torch.compile``; "auto" for the first on CPUs, and elsewhere for the second, on CUDA with graphs.
        pack_bytes: Bytes that the weights laid out for sizes may take with oneDNN; 0 for none. The others lay out none.

    Returns:
        A module: images ``(N, in_channels, H, W)`` to the same feature maps. They are contiguous, as the net's are,
        unless the images are in channels_last, which saves the conversion.

    Raises:
        ValueError: If an argument is unknown, ``net`` cannot be traced or has weights that are NaN, or the backend does
            not run here.
    """
    check_choice("dtype", dtype, tuple(_DTYPES))
    check_choice("backend", backend, ("auto", "onednn", "compile", "eager"))
    check_int("pack_bytes", pack_bytes, low=0)
    if dtype == "float16" and not any(tensor.is_cuda for tensor in net.state_dict().values()):
        raise ValueError(
            "`dtype`='float16' is for nets on a CUDA device, move it there; on a CPU use 'float32' or 'bfloat16'"
        )
    computed = _computed_dtype(net, _DTYPES[dtype])
    optimized = _optimize(copy_for_inference(net), computed, backend, pack_bytes)
    optimized.out_dtype = _DTYPES[dtype]
    return optimized


def _computed_dtype(net: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Return what to compute in: float32, with a warning, where a CPU has no instructions for the dtype."""
    computed = processor.computed_dtype(dtype) if _is_on_cpu(net) else dtype
    if computed is not dtype:
        name = str(dtype).removeprefix("torch.")
        warn_user(
            f"{processor.reason(dtype)} and would be several times slower in it than in float32: "
            f"{type(net).__name__} computes in float32 and returns feature maps in {name}; "
            "pass dtype='float32' if those may be float32"
        )
    return computed


def _optimize(net: nn.Module, dtype: torch.dtype, backend: Backend, pack_bytes: int) -> Optimized:
    if backend == "compile":
        return Compiled(net.to(dtype, memory_format=torch.channels_last), dtype)  # type: ignore[call-overload]
    with_onednn = backend == "onednn" or (backend == "auto" and _runs_onednn(net))
    if with_onednn:
        require_onednn(net)
    traced = trace(net)
    if with_onednn:
        fused = fuse(traced, FusedConv2d, dtype)
        return Fused(net, traced.to(dtype), fused, dtype, pack_bytes)
    folded = fuse(traced, FoldedConv2d, dtype)
    on_cuda = any(tensor.is_cuda for tensor in net.state_dict().values())
    engine = Captured if backend == "auto" and on_cuda else Folded
    return engine(net, traced.to(dtype), folded, dtype)


def require_onednn(net: nn.Module) -> None:
    """Refuse a net that the operators of oneDNN cannot compute on this machine."""
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
