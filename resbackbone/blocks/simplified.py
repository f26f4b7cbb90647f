"""The block of SCNet's heads: a basic block without the last ReLU, with or without norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resbackbone.blocks.base import BATCH_NORM, Style
from resbackbone.blocks.basic import BasicBlock
from resbackbone.layers import build_conv_layer
from resbackbone.layers.module import Config, InitConfig


class SimplifiedBasicBlock(BasicBlock):
    """Two 3x3 convolutions added to their input, with nothing behind the sum.

    Args:
        inplanes: Input channels.
        planes: Output channels.
        stride: As for :class:`BasicBlock`.
        dilation: As for :class:`BasicBlock`.
        downsample: As for :class:`BasicBlock`.
        style: As for :class:`BasicBlock`.
        with_cp: Must be False, as upstream.
        conv_cfg: As for :class:`BasicBlock`.
        norm_cfg: Config of the norms; None for none, in which case the convolutions have a bias.
        dcn: Must be None, as upstream.
        plugins: Must be None, as upstream.
        init_cfg: As for :class:`BasicBlock`.

    Raises:
        ValueError: If ``with_cp``, ``dcn`` or ``plugins`` is given.

    Source: Vu et al., SCNet, arXiv:2012.10150; mmdet 3.3.0 ``models/layers/res_layer.py``.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        style: Style = "pytorch",
        with_cp: bool = False,
        conv_cfg: Config | None = None,
        norm_cfg: Config | None = BATCH_NORM,
        dcn: Config | None = None,
        plugins: None = None,
        init_cfg: InitConfig | None = None,
    ) -> None:
        for name, value in {"dcn": dcn, "plugins": plugins, "with_cp": with_cp}.items():
            if value:
                raise ValueError(f"`{name}` is not for a SimplifiedBasicBlock, got {value!r}; use a BasicBlock")
        self.with_norm = norm_cfg is not None
        super().__init__(
            *(inplanes, planes, stride, dilation, downsample, style, False, conv_cfg),
            norm_cfg=norm_cfg,  # type: ignore[arg-type]  # None is read by `_build` alone
            init_cfg=init_cfg,
        )

    def _build(self) -> None:
        if self.with_norm:
            super()._build()
            return
        dilation = self.dilation
        self.conv1 = build_conv_layer(
            *(self.conv_cfg, self.inplanes, self.planes, 3),
            stride=self.stride,
            padding=dilation,
            dilation=dilation,
            bias=True,
        )
        self.conv2 = build_conv_layer(self.conv_cfg, self.planes, self.planes, 3, padding=1, bias=True)

    def _norm(self, index: int) -> Any:
        return super()._norm(index) if self.with_norm else None  # as in mmdet

    def forward(self, x: Tensor, *, checkpointed: bool = False) -> Tensor:
        """Map ``(N, inplanes, H, W)`` to ``(N, planes, H/stride, W/stride)``."""
        out = self.relu(self.conv_norm(x, self.conv1, self.norm1_name))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.conv_norm(out, self.conv2, self.norm2_name, shortcut)
