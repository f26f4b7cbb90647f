"""RegNet: bottlenecks whose widths follow a quantized line, with (Y) or without (X) squeeze-and-excitation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from resbackbone.backbones.feature_info import OutIndex
from resbackbone.backbones.regnet_archs import ARCHS, Arch, plan_stages, resolve_arch
from resbackbone.backbones.res_layer import DilationStyle
from resbackbone.backbones.resnet import BATCH_NORM, ResNet
from resbackbone.blocks import RegNetBottleneck
from resbackbone.blocks.base import Style
from resbackbone.layers.activation_checkpointing import WithCp
from resbackbone.layers.module import Config, InitConfig
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_int, convert_arguments, warn_user

_BASE_CHANNELS = 32  # what mmdet's argument of that name, which does nothing, is by default
_OWN = ("self", "__class__", "arch", "base_channels", "se_ratio")  # what ResNet's constructor does not get


@MODELS.register_module()
class RegNet(ResNet):
    """RegNetX with the arguments, keys and numbers of mmdet's RegNet; and RegNetY.

    Args:
        arch: A key of ``arch_settings``; or a dict of ``w0`` (width of the first block, a multiple of 8), ``wa`` (how
            much the width grows per block), ``wm`` (factor from one stage's width to the next), ``group_w`` (channels
            per group of the 3x3) and ``depth`` (number of blocks), and optionally of ``bot_mul`` (channels of the 3x3
            per output channel of its block, 1.0), ``se_ratio`` (0) and ``rounding`` (how widths become whole
            groups: "pycls" as in the paper, "torchvision" as there).
        in_channels: Channels of the images.
        stem_channels: Channels after the stem; None for those of the first stage.
        base_channels: Does nothing, as in mmdet: the widths come from ``arch``.
        strides: Step of each stage's first block, in pixels. The number of stages follows from ``arch``.
        deep_stem: Three 3x3 convolutions in place of the stem's one. (mmdet takes the argument and ignores it.)
        dilations, out_indices, ...: All others as for :class:`~resbackbone.ResNet`.
        se_ratio: Channels that squeeze-and-excitation squeezes to, per channel that its block takes in; 0 for no such
            layer, None for what ``arch`` says.

    Raises:
        KeyError: If there is no such name, or an entry of the dict is unknown or missing.
        TypeError, ValueError: If an entry or another argument does not fit; nothing is built then.

    Source: Radosavovic et al., Designing Network Design Spaces, arXiv:2003.13678, section 3.3; arguments as in mmdet
    3.3.0 ``models/backbones/regnet.py``.

    >>> RegNet("regnetx_400mf").out_channels
    (32, 64, 160, 384)
    >>> RegNet(dict(w0=24, wa=24.48, wm=2.54, group_w=16, depth=22, rounding="torchvision")).out_channels
    (32, 64, 160, 400)
    """

    arch_settings: ClassVar[dict[str, dict[str, Any]]] = ARCHS  # type: ignore[assignment]  # by name, as in mmdet
    stage_widths: tuple[int, ...]

    _sizes: ClassVar[tuple[str, ...]] = ("stage_widths", "bot_mul")

    @convert_arguments
    def __init__(
        self,
        arch: str | Arch,
        in_channels: int = 3,
        stem_channels: int | Sequence[int] | None = 32,
        base_channels: int = _BASE_CHANNELS,
        strides: Sequence[int] = (2, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[OutIndex] = (0, 1, 2, 3),
        style: Style = "pytorch",
        deep_stem: bool = False,
        avg_down: bool = False,
        frozen_stages: int = -1,
        conv_cfg: Config | None = None,
        norm_cfg: Config = BATCH_NORM,
        norm_eval: bool = True,
        dcn: Config | None = None,
        stage_with_dcn: Sequence[bool] = (False, False, False, False),
        plugins: Sequence[Config] | None = None,
        with_cp: WithCp = False,
        zero_init_residual: bool = True,
        pretrained: str | None = None,
        init_cfg: InitConfig | None = None,
        *,
        se_ratio: float | None = None,
        multi_grid: Sequence[int] | None = None,
        contract_dilation: bool = False,
        dilation_style: DilationStyle = "openmmlab",
        drop_path_rate: float = 0.0,
        project_first_block: bool = False,
        fold_frozen_norms: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in _OWN}
        settings = resolve_arch(arch, self.arch_settings, se_ratio=se_ratio)
        self.stage_widths, self.stage_blocks = zip(*plan_stages(settings), strict=True)
        self.group_width, self.bot_mul, self.se_ratio = (settings[key] for key in ("group_w", "bot_mul", "se_ratio"))
        check_int("base_channels", base_channels, low=1)
        if base_channels != _BASE_CHANNELS:
            warn_user(
                f"`base_channels` (={base_channels}) does nothing in a RegNet; its widths come from `arch`",
            )
        num_stages = len(self.stage_widths)
        super().__init__(settings["depth"], base_channels=self.stage_widths[0], num_stages=num_stages, **given)

    def block_and_stages(self, depth: int) -> tuple[Any, tuple[int, ...]]:
        """Return the block class and the number of blocks per stage, which follow from ``arch``."""
        return RegNetBottleneck, self.stage_blocks

    def stage_planes(self, index: int) -> int:
        """Return the width of a stage, counted from 0."""
        return self.stage_widths[index]

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        if self.deep_stem:
            self._make_deep_stem(in_channels, stem_channels)
        else:
            self._make_plain_stem(in_channels, stem_channels, kernel_size=3)
        self.maxpool = nn.Identity()  # where others pool, the first stage strides

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Make one stage of grouped bottlenecks."""
        return super().make_res_layer(
            group_width=self.group_width, bot_mul=self.bot_mul, se_ratio=self.se_ratio, **kwargs
        )
