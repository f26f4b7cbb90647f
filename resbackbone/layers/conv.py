"""Convolutions built from a config, alone or with the norm and activation behind them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resbackbone.layers.conv_norm import conv_norm
from resbackbone.layers.memory_format import FormatKeeper
from resbackbone.layers.module import Config
from resbackbone.layers.norm import build_norm_layer
from resbackbone.registry import MODELS, construct, find_type, split_type

MODELS.register_module("Conv2d", module=nn.Conv2d)
MODELS.register_module("Conv", module=nn.Conv2d)
MODELS.register_module("ReLU", module=nn.ReLU)


def build_conv_layer(cfg: Config | None, *args: Any, **kwargs: Any) -> nn.Module:
    """Build a convolution.

    Args:
        cfg: ``None`` for ``nn.Conv2d``; or a dict with the registered ``type`` ("Conv2d", "DCN", "DCNv2", mmcv's
            "ConvWS", your own) and arguments of that type's own.
        args: What every convolution takes: in_channels, out_channels, kernel_size.
        kwargs: The same by name: stride, padding, dilation, groups, bias.

    Returns:
        The layer, ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``.

    Raises:
        TypeError: If ``cfg`` is no dict.
        KeyError: If it has no ``type`` or an unknown one.
    """
    if cfg is None:
        return nn.Conv2d(*args, **kwargs)
    type_, rest = split_type(cfg, "conv_cfg")
    layer: nn.Module = construct(find_type(type_, "convolution"), *args, **kwargs, **rest)
    return layer


class ConvNormAct(FormatKeeper):
    """A convolution with the norm and activation behind it, under the key names of mmcv's ``ConvModule``.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        kernel_size: Side of the kernel in pixels.
        stride: Step in pixels.
        padding: Zeros added on each side, in pixels.
        conv_cfg: As for :func:`build_conv_layer`.
        norm_cfg: As for :func:`build_norm_layer`; None for no norm, in which case the convolution has a bias.
        act_cfg: The activation's ``type`` and arguments; None for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        conv_cfg: Config | None = None,
        norm_cfg: Config | None = None,
        act_cfg: Config | None = None,
    ) -> None:
        super().__init__()
        self.conv = build_conv_layer(
            conv_cfg, in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=norm_cfg is None
        )
        self.norm_name = None
        if norm_cfg is not None:
            self.norm_name, norm = build_norm_layer(norm_cfg, out_channels)
            self.add_module(self.norm_name, norm)
        self.activate = None
        if act_cfg is not None:
            type_, rest = split_type(act_cfg, "act_cfg")
            self.activate = construct(find_type(type_, "activation"), **rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        x = self.conv(x) if self.norm_name is None else conv_norm(x, self.conv, getattr(self, self.norm_name))
        return x if self.activate is None else self.activate(x)
