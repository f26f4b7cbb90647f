"""A stage of a ResNet: a sequence of residual blocks, of which one changes resolution and channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from resbackbone.blocks.base import BATCH_NORM
from resbackbone.layers import Sequential, build_conv_layer, build_norm_layer
from resbackbone.layers.module import Config
from resbackbone.utils.validation import check_int, check_ints

DilationStyle = Literal["openmmlab", "timm"]


class ResLayer(Sequential):
    """``num_blocks`` blocks; the first (or the last, for Hourglass) strides and changes the channels.

    Args:
        block: The block class; it has ``expansion`` and accepts ``inplanes``, ``planes``, ``stride``, ``dilation``,
            ``downsample``, ``conv_cfg``, ``norm_cfg`` and those of ``kwargs``.
        inplanes: Input channels.
        planes: The blocks' width before expansion; the stage has ``planes * block.expansion`` output channels.
        num_blocks: Number of blocks.
        stride: Stride of the stage.
        dilation: Dilation of every block, in pixels.
        avg_down: Pool the shortcut before its 1x1 convolution instead of striding there.
        conv_cfg: Config of every convolution.
        norm_cfg: Config of every norm.
        downsample_first: Change resolution and channels in the first block (ResNet) or the last (Hourglass).
        multi_grid: One dilation per block, in place of ``dilation``.
        contract_dilation: Halve the dilation of the first block.
        dilation_style: As for :class:`~resbackbone.ResNet`.
        drop_path_rate: One probability for all blocks or one each.
        first_block: Further arguments for the first block alone.
        last_block: Further arguments for the last block alone.
        shortcut_norm: Whether there is a norm behind the shortcut's convolution.
        project_first_block: Project in the shortcut of the first block (the last, for Hourglass) also where the shapes
            agree.
        kwargs: Further arguments for every block.

    Raises:
        ValueError: If ``multi_grid`` or ``drop_path_rate`` has not one entry per block.

    Source: He et al., arXiv:1512.03385, table 1; ``avg_down`` is ResNet-D of arXiv:1812.01187; ``multi_grid`` is
    arXiv:1706.05587, section 3.2.1.
    """

    forward: Any = nn.Sequential.forward  # no convolution is followed by a norm between the blocks

    def __init__(
        self,
        block: Any,
        inplanes: int,
        planes: int,
        num_blocks: int,
        stride: int = 1,
        dilation: int = 1,
        avg_down: bool = False,
        conv_cfg: Config | None = None,
        norm_cfg: Config = BATCH_NORM,
        downsample_first: bool = True,
        multi_grid: Sequence[int] | None = None,
        contract_dilation: bool = False,
        dilation_style: DilationStyle = "openmmlab",
        drop_path_rate: float | Sequence[float] = 0.0,
        first_block: Mapping[str, Any] | None = None,
        last_block: Mapping[str, Any] | None = None,
        shortcut_norm: bool = True,
        project_first_block: bool = False,
        **kwargs: Any,
    ) -> None:
        check_int("num_blocks", num_blocks, low=1)
        per_block = [dict(kwargs, conv_cfg=conv_cfg, norm_cfg=norm_cfg) for _ in range(num_blocks)]
        per_block[0].update(first_block or {})
        per_block[-1].update(last_block or {})
        dilations = _dilations(num_blocks, dilation, multi_grid, contract_dilation)
        for arguments, block_dilation in zip(per_block, dilations, strict=True):
            arguments["dilation"] = block_dilation
            if dilation_style == "timm" and dilation > 1:
                arguments["stage_dilation"] = dilation if multi_grid is None else block_dilation
        for arguments, rate in zip(per_block, _drop_path_rates(num_blocks, drop_path_rate), strict=True):
            if rate:  # a block written for mmdet does not know this argument
                arguments["drop_path_rate"] = rate

        out_channels = planes * block.expansion
        changing = 0 if downsample_first else num_blocks - 1
        window = 2 if dilation_style == "timm" and dilation > 1 else stride
        blocks = []
        for index, arguments in enumerate(per_block):
            if index == changing:
                shortcut = None
                if project_first_block or stride != 1 or inplanes != out_channels:
                    shortcut = make_shortcut(
                        inplanes, out_channels, stride, avg_down, conv_cfg, norm_cfg if shortcut_norm else None, window
                    )
                arguments.update(inplanes=inplanes, planes=planes, stride=stride, downsample=shortcut)
            elif index < changing:
                arguments.update(inplanes=inplanes, planes=inplanes // block.expansion, stride=1)
            else:
                arguments.update(inplanes=out_channels, planes=planes, stride=1)
            blocks.append(block(**arguments))
        super().__init__(*blocks)
        self.block = block
        self.stride = stride
        self.out_channels = out_channels


def make_shortcut(
    in_channels: int,
    out_channels: int,
    stride: int,
    avg_down: bool,
    conv_cfg: Config | None,
    norm_cfg: Config | None,
    window: int | None = None,
) -> nn.Sequential:
    """Make the projection shortcut of a block.

    Returns:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H/stride), ceil(W/stride))``. With ``avg_down`` there is
        a pooling first even at stride 1, so that the parameters' keys do not depend on the stride; of ``stride`` x
        ``stride`` pixels, or at stride 1 of ``window`` x ``window``, with zeros on the right and below.
    """
    pooling: list[nn.Module] = []
    if avg_down:
        pooling = [nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)]
        if stride == 1 and window is not None and window > 1:
            pooling = [nn.Sequential(nn.ZeroPad2d((0, window - 1, 0, window - 1)), nn.AvgPool2d(window, 1))]
    conv = build_conv_layer(conv_cfg, in_channels, out_channels, 1, stride=1 if avg_down else stride, bias=False)
    norm = [] if norm_cfg is None else [build_norm_layer(norm_cfg, out_channels)[1]]
    return Sequential(*pooling, conv, *norm)  # ours calls the `init_weights()` of its layers, torch's does not


def _dilations(num_blocks: int, dilation: int, multi_grid: Sequence[int] | None, contract: bool) -> tuple[int, ...]:
    if multi_grid is not None:
        return check_ints("multi_grid", multi_grid, low=1, length=num_blocks, why="one per block of the last stage")
    first = dilation // 2 if contract and dilation > 1 else dilation
    return (first,) + (dilation,) * (num_blocks - 1)


def _drop_path_rates(num_blocks: int, rate: float | Sequence[float]) -> tuple[float, ...]:
    if isinstance(rate, (int, float)):
        return (float(rate),) * num_blocks
    if len(rate) != num_blocks:
        raise ValueError(f"`drop_path_rate` of a stage must have {num_blocks} entries, one per block, got {len(rate)}")
    return tuple(float(r) for r in rate)
