"""Feature pyramid network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resbackbone.layers import ConvNormAct
from resbackbone.layers.arguments import MAX_CHANNELS
from resbackbone.layers.dry_run import check_memory, dry_run
from resbackbone.layers.module import Config, FeatureModule, InitConfig
from resbackbone.registry import MODELS, register_kind
from resbackbone.registry.init_cfg import check_init_cfg
from resbackbone.utils.validation import (
    check_choice,
    check_count,
    check_flag,
    check_int,
    check_ints,
    check_mapping,
    convert_arguments,
)

XAVIER: Config = {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"}  # defaults, never mutated
NEAREST: Config = {"mode": "nearest"}
MAX_NUM_OUTS = 2**5  # each level halves the size
EXTRA_CONV_INPUTS = ("on_input", "on_lateral", "on_output")


@register_kind("neck")
@MODELS.register_module()
class FPN(FeatureModule):
    """Feature pyramid network with the arguments, state dict and outputs of mmdet's.

    Args:
        in_channels: Channels of each backbone feature map: ``net.out_channels``.
        out_channels: Channels of each output.
        num_outs: Number of outputs; those beyond the backbone's levels halve the size each.
        start_level: Index of the first backbone level to use.
        end_level: Index of the last backbone level to use, inclusive; -1 for the last. With any other level there are
            no extra outputs.
        add_extra_convs: How extra outputs are computed: False for max pooling; "on_input" (or True), "on_lateral" or
            "on_output" for strided convolutions of the last backbone level, its lateral or its output.
        relu_before_extra_convs: Whether a ReLU precedes each extra convolution except the first.
        no_norm_on_lateral: Whether the lateral convolutions have no norm.
        conv_cfg: Config of the convolutions.
        norm_cfg: Config of the norms; None for no norms.
        act_cfg: Config of the activations; None for no activations.
        upsample_cfg: Arguments of :func:`torch.nn.functional.interpolate` in the top-down pathway.
        init_cfg: As for :class:`~resbackbone.layers.Module`.

    Raises:
        TypeError, ValueError: If an argument is invalid.

    Source: Lin et al., Feature Pyramid Networks for Object Detection, arXiv:1612.03144; extra levels as in RetinaNet,
    arXiv:1708.02002; arguments as in mmdet 3.3.0 ``models/necks/fpn.py``.

    >>> import torch
    >>> from resbackbone import build_backbone
    >>> net = build_backbone("resnet18")
    >>> fpn = FPN(in_channels=net.out_channels, out_channels=256, num_outs=5)
    >>> [tuple(level.shape[1:]) for level in fpn(net(torch.zeros(1, 3, 64, 64)))]
    [(256, 16, 16), (256, 8, 8), (256, 4, 4), (256, 2, 2), (256, 1, 1)]
    """

    @convert_arguments
    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        end_level: int = -1,
        add_extra_convs: bool | str = False,
        relu_before_extra_convs: bool = False,
        no_norm_on_lateral: bool = False,
        conv_cfg: Config | None = None,
        norm_cfg: Config | None = None,
        act_cfg: Config | None = None,
        upsample_cfg: Config = NEAREST,
        init_cfg: InitConfig | None = XAVIER,
    ) -> None:
        if init_cfg is not XAVIER:
            check_init_cfg(init_cfg)
        super().__init__(init_cfg)
        self.in_channels = check_ints("in_channels", in_channels, low=1, most=MAX_CHANNELS)
        if not self.in_channels:
            raise ValueError("`in_channels` must have at least one entry, got (); it is `net.out_channels`")
        for name, value, most in (("out_channels", out_channels, MAX_CHANNELS), ("num_outs", num_outs, MAX_NUM_OUTS)):
            check_count(name, value, most=most)
        for name, flag in (
            ("relu_before_extra_convs", relu_before_extra_convs),
            ("no_norm_on_lateral", no_norm_on_lateral),
        ):
            check_flag(name, flag)
        _check_upsampling(upsample_cfg)
        self.out_channels = out_channels
        self.num_ins = len(self.in_channels)
        self.num_outs = num_outs
        self.start_level = start_level
        self.end_level = end_level
        self.relu_before_extra_convs = relu_before_extra_convs
        self.no_norm_on_lateral = no_norm_on_lateral
        self.upsample_cfg = dict(upsample_cfg)
        self.add_extra_convs = _extra_conv_input(add_extra_convs)
        self.backbone_end_level = self._check_levels()

        layers: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "act_cfg": act_cfg}
        in_memory = torch.get_default_device().type != "meta"
        with dry_run() as run:
            self._make_convs(**layers)
        if in_memory:
            check_memory(run.num_weights, {"in_channels": self.in_channels, "out_channels": out_channels})
        self.lateral_convs, self.fpn_convs = self._make_convs(**layers)

    def _make_convs(self, norm_cfg: Config | None, **others: Any) -> tuple[nn.ModuleList, nn.ModuleList]:
        """Return the lateral convolutions, and the output convolutions including those of extra levels."""
        used = self.in_channels[self.start_level : self.backbone_end_level]
        out = self.out_channels
        lateral_norm = None if self.no_norm_on_lateral else norm_cfg
        laterals = nn.ModuleList(ConvNormAct(channels, out, 1, norm_cfg=lateral_norm, **others) for channels in used)
        layers: dict[str, Any] = {"norm_cfg": norm_cfg, **others}
        outputs = nn.ModuleList(ConvNormAct(out, out, 3, padding=1, **layers) for _ in used)
        if self.add_extra_convs:
            first = self.in_channels[self.backbone_end_level - 1] if self.add_extra_convs == "on_input" else out
            for channels in [first, *[out] * self.num_outs][: self.num_outs - len(used)]:
                outputs.append(ConvNormAct(channels, out, 3, stride=2, padding=1, **layers))
        return laterals, outputs

    def _check_levels(self) -> int:
        """Return the exclusive end of the backbone levels to use; raise if levels and outputs do not match."""
        last = self.num_ins - 1
        check_int("start_level", self.start_level, low=0, high=last)
        check_int("end_level", self.end_level, low=-1, high=last)
        end = last if self.end_level == -1 else self.end_level
        levels = end - self.start_level + 1
        if levels < 1:
            raise ValueError(f"`end_level` must not be below `start_level` (={self.start_level}), got {self.end_level}")
        if self.num_outs < levels or (end != last and self.num_outs > levels):
            allowed = "at least" if end == last else "exactly (an early `end_level` leaves no room for extra levels)"
            raise ValueError(
                f"`num_outs` must be {allowed} {levels}, the backbone levels from `start_level` {self.start_level} "
                f"to {end}; got {self.num_outs}"
            )
        return end + 1

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the feature pyramid.

        Args:
            inputs: The backbone's feature maps, ``(N, in_channels[i], H_i, W_i)``, finest first.

        Returns:
            ``num_outs`` maps ``(N, out_channels, H_i, W_i)``, finest first.

        Raises:
            ValueError: If there are not as many maps as ``in_channels``.
        """
        if len(inputs) != self.num_ins:
            raise ValueError(f"FPN expects {self.num_ins} feature maps, one per `in_channels`, got {len(inputs)}")
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, inputs[self.start_level :], strict=False)]
        for level in range(len(laterals) - 1, 0, -1):
            laterals[level - 1] = laterals[level - 1] + self._upsample(laterals[level], laterals[level - 1])
        outs = [conv(lateral) for conv, lateral in zip(self.fpn_convs, laterals, strict=False)]
        self._append_extra_levels(outs, laterals, inputs)
        return tuple(outs)

    def _upsample(self, coarse: Tensor, fine: Tensor) -> Tensor:
        if "scale_factor" in self.upsample_cfg:
            return F.interpolate(coarse, **self.upsample_cfg)
        return F.interpolate(coarse, size=fine.shape[2:], **self.upsample_cfg)

    def _append_extra_levels(self, outs: list[Tensor], laterals: list[Tensor], inputs: Sequence[Tensor]) -> None:
        if not self.add_extra_convs:
            while len(outs) < self.num_outs:
                outs.append(F.max_pool2d(outs[-1], kernel_size=1, stride=2))
            return
        sources = {"on_input": inputs[self.backbone_end_level - 1], "on_lateral": laterals[-1], "on_output": outs[-1]}
        x = sources[self.add_extra_convs]
        for index, conv in enumerate(self.fpn_convs[len(laterals) :]):
            x = conv(F.relu(x) if index and self.relu_before_extra_convs else x)
            outs.append(x)


def _check_upsampling(upsample_cfg: Any) -> None:
    """Raise unless these are valid arguments of ``F.interpolate``."""
    check_mapping("upsample_cfg", upsample_cfg, optional=False)
    if "size" in upsample_cfg or "input" in upsample_cfg:
        raise ValueError(
            f"`upsample_cfg` must not set `size` or `input`, which follow from the maps; got {upsample_cfg}"
        )
    size = {} if upsample_cfg.get("scale_factor") is not None else {"size": (4, 6)}
    try:
        F.interpolate(torch.empty(1, 1, 2, 3, device="meta"), **{**size, **upsample_cfg})
    except Exception as error:  # torch raises a different class for each argument
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"`upsample_cfg` {dict(upsample_cfg)!r} is invalid for interpolation: {error}") from error


def _extra_conv_input(add_extra_convs: Any) -> str:
    """Return the name of the extra convolutions' input; empty if there are none."""
    if isinstance(add_extra_convs, bool):
        return "on_input" if add_extra_convs else ""
    check_choice("add_extra_convs", add_extra_convs, (False, True, *EXTRA_CONV_INPUTS))
    return str(add_extra_convs)
