"""Convolutions and activations built from configs, and ``ConvNormAct``, mmcv's ``ConvModule``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resbackbone.layers.arguments import CONV_ARGUMENTS_OF_NET, MAX_CHANNELS, check_entries, resolve_layer_cfg
from resbackbone.layers.conv_norm import ConvNormModule
from resbackbone.layers.dry_run import DryRun, current_dry_run, try_layer
from resbackbone.layers.module import Config
from resbackbone.layers.norm import build_norm_layer, check_norm_cfg
from resbackbone.layers.trident_conv import TridentConv2d
from resbackbone.registry import MODELS, construct
from resbackbone.utils.validation import check_choice

MODELS.register_module("Conv2d", module=nn.Conv2d)
MODELS.register_module("Conv", module=nn.Conv2d)
MODELS.register_module("ReLU", module=nn.ReLU)


def build_conv_layer(cfg: Config | None, *args: Any, **kwargs: Any) -> nn.Module:
    """Build a convolution.

    Args:
        cfg: None for ``nn.Conv2d``; or a dict with the registered ``type`` ("Conv2d", "DCN", "DCNv2", mmcv's
            "ConvWS", your own) and further arguments of that class.
        args: Positional arguments of every convolution: in_channels, out_channels, kernel_size.
        kwargs: Keyword arguments of every convolution: stride, padding, dilation, groups, bias.

    Returns:
        The layer, ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``.

    Raises:
        TypeError: If ``cfg`` is not a dict.
        KeyError: If it has no ``type`` or an unknown one.
    """
    conv_class, own = (nn.Conv2d, {}) if cfg is None else check_conv_cfg(cfg, "conv_cfg")
    run = current_dry_run()
    if run is not None:
        return _try_convolution(run, conv_class, own, *args, **kwargs)
    layer: nn.Module = construct(conv_class, *args, **kwargs, **own)
    return layer


def check_conv_cfg(cfg: Any, argument: str) -> tuple[type[Any], dict[str, Any]]:
    """Validate a convolution's config as far as possible without its channels.

    Args:
        cfg: As for :func:`build_conv_layer`.
        argument: Its name in errors.

    Returns:
        The convolution's class, and the arguments in the config.

    Raises:
        TypeError, KeyError, ValueError: If it is not the config of a convolution, or an entry is invalid.
    """
    conv_class, own = resolve_layer_cfg(cfg, argument, "convolution")
    check_entries(argument, conv_class, own, CONV_ARGUMENTS_OF_NET)
    if "padding_mode" in own:
        check_choice(f"{argument}['padding_mode']", own["padding_mode"], ("zeros", "reflect", "replicate", "circular"))
    return conv_class, own


def _try_convolution(
    run: DryRun,
    conv_class: type[Any],
    own: dict[str, Any],
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    groups: int = 1,
    **others: Any,
) -> nn.Module:
    """Check a convolution in a dry run; return the placeholder."""
    if min(in_channels, out_channels) < 1:
        raise ValueError(
            f"a convolution would have {in_channels} input and {out_channels} output channels; `base_channels`, or "
            "another argument for the width, is too small"
        )
    if in_channels % groups or out_channels % groups:
        raise ValueError(
            f"a convolution from {in_channels} to {out_channels} channels cannot have {groups} groups; these follow "
            "from `groups` and `radix`, the channels from `base_channels` and `base_width`"
        )
    run.num_weights += in_channels // groups * out_channels * kernel_size**2
    arguments = {
        **{"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, "groups": groups},
        **{**others, **own},
    }
    if conv_class not in (nn.Conv2d, TridentConv2d):
        run.once((conv_class, arguments), partial(_check_convolution, conv_class, arguments))
    return run.placeholder


def _check_convolution(conv_class: type[Any], arguments: dict[str, Any]) -> None:
    """Raise unless a convolution of this class can have these arguments."""
    if hasattr(conv_class, "check_arguments"):
        conv_class.check_arguments(**arguments)
        return
    reach = arguments.get("dilation", 1) * (arguments["kernel_size"] - 1)
    side = max(9, reach + 1)
    out_side = (side + 2 * arguments.get("padding", 0) - reach - 1) // arguments.get("stride", 1) + 1
    what = f"a convolution (`conv_cfg`, `dcn` or `sac`) of type {conv_class.__name__}"
    shape, expected = (2, arguments["in_channels"], side, side), (2, arguments["out_channels"], out_side, out_side)
    try_layer(conv_class, (), arguments, what, shape, expected)


class ConvNormAct(ConvNormModule):
    """A convolution, a norm and an activation, with the keys of mmcv's ``ConvModule``.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel_size: Side of the kernel in pixels.
        stride: Stride in pixels.
        padding: Zeros added on each side, in pixels.
        conv_cfg: As for :func:`build_conv_layer`.
        norm_cfg: As for :func:`build_norm_layer`; None for no norm, in which case the convolution has a bias.
        act_cfg: As for :func:`build_activation`; None for no activation.
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
            check_norm_cfg(norm_cfg, "norm_cfg")  # `norm_eval` does not apply to this norm
            self.norm_name, norm = build_norm_layer(norm_cfg, out_channels)
            self.add_module(self.norm_name, norm)
        self.activate = None
        if act_cfg is not None:
            self.activate = build_activation(act_cfg, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        x = self.conv_norm(x, self.conv, self.norm_name)
        return x if self.activate is None else self.activate(x)


def build_activation(cfg: Config, num_channels: int) -> nn.Module:
    """Build an activation.

    Args:
        cfg: A dict with the registered ``type`` and further arguments of that class.
        num_channels: Channels of the feature maps.

    Raises:
        TypeError, KeyError, ValueError: If it is not the config of an activation, or an entry is invalid.
    """
    act_class, own = resolve_layer_cfg(cfg, "act_cfg", "activation")
    check_entries("act_cfg", act_class, own, ("device", "dtype"))
    run = current_dry_run()
    if run is None:
        layer: nn.Module = construct(act_class, **own)
        return layer
    run.once((act_class, own, num_channels), partial(_check_activation, act_class, own, num_channels))
    return nn.Identity()


def _check_activation(act_class: type[Any], own: dict[str, Any], num_channels: int) -> None:
    """Raise unless an activation of this class can have these arguments; some fail for values only, hence the CPU."""
    what = f"`act_cfg` of type {act_class.__name__}"
    shape = (2, num_channels, 2, 3)
    layer = try_layer(act_class, (), own, what, shape, shape)
    if sum(parameter.numel() for parameter in layer.parameters()) > MAX_CHANNELS:
        raise ValueError(f"{what} has more than {MAX_CHANNELS} weights")
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        try_layer(act_class, (), own, what, shape, shape, device="cpu")
