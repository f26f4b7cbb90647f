"""A net that computes the same, faster."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import nn

from resbackbone.checks import check_choice, check_int
from resbackbone.inference.engines import Fused, Plain
from resbackbone.inference.graph import fuse, trace

Backend = Literal["auto", "onednn", "compile", "eager"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACK_BYTES = 1 << 29  # what packed weights may take unless said otherwise


def optimize(
    net: nn.Module,
    dtype: Literal["float32", "bfloat16"] = "float32",
    backend: Backend = "auto",
    *,
    pack_bytes: int = PACK_BYTES,
) -> nn.Module:
    """Return a net for inference that takes and hands out the same, and is faster.

    Norms are folded into convolutions, sums and ReLUs run with them, and everything lies in channels_last. On CPUs the
    operators are those of oneDNN, which PyTorch ships: nothing is compiled, and a new image size costs nothing. A size
    that comes back gets weights laid out for it.

    Args:
        net: A backbone, or anything that calls one and can be traced, such as ``nn.Sequential(net, fpn)``. It stays as
            it is; later changes to it do not reach the result.
        dtype: What is computed in, and handed out.
        backend: "onednn" on CPUs, "eager" for plain PyTorch in channels_last, "compile" for that through
            ``torch.compile``, "auto" for the first of these that fits the weights' device.
        pack_bytes: Bytes that laid-out weights may take; 0 for none.

    Returns:
        A module: images ``(N, in_channels, H, W)`` to the same feature maps, in channels_last.

    Raises:
        ValueError: If an argument is unknown, ``net`` cannot be traced, or the backend does not run here.
    """
    check_choice("dtype", dtype, tuple(_DTYPES))
    check_choice("backend", backend, ("auto", "onednn", "compile", "eager"))
    check_int("pack_bytes", pack_bytes, low=0)
    copied = copy.deepcopy(net).eval().requires_grad_(False)
    if backend == "onednn" or (backend == "auto" and _runs_onednn(copied)):
        require_onednn(copied)
        graph = trace(copied)
        convolutions = fuse(graph, _DTYPES[dtype])
        return Fused(copied, graph.to(_DTYPES[dtype]), convolutions, _DTYPES[dtype], pack_bytes)
    plain = copied.to(_DTYPES[dtype], memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Plain(plain, _DTYPES[dtype], compiled=backend == "compile")


def require_onednn(net: nn.Module) -> None:
    """Refuse a net that the operators of oneDNN cannot compute."""
    if not _runs_onednn(net):
        raise ValueError(
            f"oneDNN needs weights on the CPU and a PyTorch built with it; {type(net).__name__} has others, or "
            "this PyTorch is without; use optimize(net, backend='eager')"
        )


def _runs_onednn(net: nn.Module) -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    on_cpu = all(tensor.device.type == "cpu" for tensor in net.state_dict().values())
    return available and on_cpu and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
