"""A net that computes the same, faster."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resbackbone.backbones.base import check_images
from resbackbone.checks import check_choice, check_int
from resbackbone.features import FeatureInfo
from resbackbone.inference.graph import fuse, trace
from resbackbone.inference.packs import PackStore

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
    on_cpu = all(tensor.device.type == "cpu" for tensor in copied.state_dict().values())
    if backend == "onednn" and not (on_cpu and _has_onednn()):
        raise ValueError("`backend`='onednn' needs weights on the CPU and a PyTorch built with oneDNN; use 'auto'")
    if on_cpu and _has_onednn() and backend in ("auto", "onednn"):
        return _Fused(copied, _DTYPES[dtype], pack_bytes)
    plain = copied.to(_DTYPES[dtype], memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _Plain(plain, _DTYPES[dtype], compiled=backend == "compile")


class _Optimized(nn.Module):
    """What both have: the promises of the backbone, and the conversion of the input."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.name = type(net).__name__
        self.in_channels: int | None = getattr(net, "in_channels", None)  # None if it is not a backbone alone
        self.feature_info: tuple[FeatureInfo, ...] = getattr(net, "feature_info", ())
        self.out_channels = getattr(net, "out_channels", None)
        self.out_strides = getattr(net, "out_strides", None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        """Compute the feature maps of images ``(N, in_channels, H, W)``."""
        if self.in_channels is not None:
            check_images(x, self.name, self.in_channels)
        return self._run(x.to(self.dtype, memory_format=torch.channels_last))

    @property
    def packed_sizes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of images for which weights are laid out, that of longest ago first."""
        return ()

    def _run(self, x: Tensor) -> Any:
        raise NotImplementedError


class _Plain(_Optimized):
    def __init__(self, net: nn.Module, dtype: torch.dtype, compiled: bool) -> None:
        super().__init__(net, dtype)
        self.net = net
        if compiled:
            self.net.compile()

    def _run(self, x: Tensor) -> Any:
        return self.net(x)


class _Fused(_Optimized):
    def __init__(self, net: nn.Module, dtype: torch.dtype, pack_bytes: int) -> None:
        super().__init__(net, dtype)
        self.graph = trace(net)
        convolutions = fuse(self.graph, dtype)
        self.convolutions = nn.ModuleList(convolutions)
        self.graph.to(dtype)
        self.packs = PackStore(convolutions, pack_bytes)

    @property
    def packed_sizes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of images for which weights are laid out, that of longest ago first."""
        return self.packs.sizes

    def _run(self, x: Tensor) -> Any:
        outs = self.graph(x, self.packs.calls_for(tuple(x.shape)))
        spoilt = x.amax((1, 2, 3)).isnan()  # oneDNN's ReLU makes a zero of NaN, which would hide it
        if spoilt.any():
            for out in outs if isinstance(outs, (tuple, list)) else (outs,):
                out[spoilt] = torch.nan
        return outs


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
