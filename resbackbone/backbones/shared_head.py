"""The last stage of a ResNet as the shared head of a C4 detector, run on the features of each region."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor

from resbackbone.backbones.arguments import check_depth
from resbackbone.backbones.norm_eval import NormEvalModule
from resbackbone.backbones.pretrained import check_initialization, resolve_init_cfg
from resbackbone.backbones.res_layer import ResLayer
from resbackbone.backbones.resnet import BATCH_NORM, ResNet
from resbackbone.blocks.base import check_dcn
from resbackbone.layers.activation_checkpointing import WithCp, check_with_cp, recompute_norms
from resbackbone.layers.arguments import MAX_PIXELS
from resbackbone.layers.conv_norm import set_folding
from resbackbone.layers.dry_run import dry_run
from resbackbone.layers.module import Config, InitConfig
from resbackbone.layers.norm import check_norm_cfg
from resbackbone.registry import MODELS, register_kind
from resbackbone.utils.validation import check_choice, check_count, check_flag, check_int, convert_arguments


# The registered name is that in mmdet's configs: `shared_head=dict(type="ResLayer", ...)`.
@register_kind("shared head")
@MODELS.register_module("ResLayer")
class SharedHead(NormEvalModule):
    """One stage of a ResNet, run on the features of regions; the bounding-box and mask heads share it.

    Its keys are those of the stage in a ResNet (``layer4.0.conv1.weight``), so that it loads a ResNet's checkpoint.

    Args:
        depth: A depth of :class:`~resbackbone.ResNet`.
        stage: The stage, counted from 0, at least 1: its input is the output of the stage before it.
        stride: Stride of the stage.
        dilation: Dilation of the stage, in pixels.
        style: Where a bottleneck strides: "pytorch" in the 3x3, "caffe" in the first 1x1.
        norm_cfg: Config of the norms.
        norm_eval: Keep every batch norm in eval mode, synchronized ones too.
        with_cp: As for :class:`~resbackbone.ResNet`.
        dcn: Config of the deformable convolutions.
        pretrained: Deprecated alias of ``init_cfg=dict(type="Pretrained", checkpoint=...)``.
        init_cfg: How ``init_weights()`` initializes; None for He's normal and norms at one.
        fold_frozen_norms: As for :class:`~resbackbone.ResNet`.

    Raises:
        KeyError: If ``depth`` is none of ResNet's, or a type is not registered.
        TypeError, ValueError: If another argument does not fit; nothing is built then.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H/stride, W/stride)``.

    Source: He et al., arXiv:1512.03385, appendix A (res5 behind the region pooling); arguments as in mmdet 3.3.0
    ``models/roi_heads/shared_heads/res_layer.py``.

    >>> head = SharedHead(50)
    >>> head.in_channels, head.out_channels
    (1024, 2048)
    """

    @convert_arguments
    def __init__(
        self,
        depth: int,
        *,
        stage: int = 3,
        stride: int = 2,
        dilation: int = 1,
        style: str = "pytorch",
        norm_cfg: Config = BATCH_NORM,
        norm_eval: bool = True,
        with_cp: WithCp = False,
        dcn: Config | None = None,
        pretrained: str | None = None,
        init_cfg: InitConfig | None = None,
        fold_frozen_norms: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        _check(given)
        super().__init__(resolve_init_cfg(pretrained, init_cfg))
        self.depth = depth
        self.stage = stage
        self.norm_cfg = copy.deepcopy(norm_cfg)
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        block, stage_blocks = ResNet.arch_settings[depth]
        planes = 64 * 2**stage
        self.in_channels = planes // 2 * block.expansion
        self.out_channels = planes * block.expansion
        make_layer = partial(
            ResLayer,
            block,
            self.in_channels,
            planes,
            stage_blocks[stage],
            stride=stride,
            dilation=dilation,
            style=style,
            norm_cfg=self.norm_cfg,
            with_cp=with_cp is True,
            dcn=copy.deepcopy(dcn),
        )
        with dry_run():
            make_layer()
        layer = make_layer()
        layer[-1].is_output = True  # type: ignore[assignment]
        self.add_module(f"layer{stage + 1}", layer)
        if fold_frozen_norms:
            set_folding(self, True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H/stride, W/stride)``."""
        layer = getattr(self, f"layer{self.stage + 1}")
        out: Tensor = recompute_norms(layer, x, [layer]) if self.with_cp == "norms" else layer(x)
        return out


def _check(given: dict[str, Any]) -> None:
    check_depth("SharedHead", given["depth"], ResNet.arch_settings)
    check_int("stage", given["stage"], low=1, high=3)
    for pixels in ("stride", "dilation"):
        check_count(pixels, given[pixels], most=MAX_PIXELS)
    check_choice("style", given["style"], ("pytorch", "caffe"))
    for flag in ("norm_eval", "fold_frozen_norms"):
        check_flag(flag, given[flag])
    check_with_cp(given["with_cp"])
    check_norm_cfg(given["norm_cfg"], "norm_cfg", in_eval=given["norm_eval"])
    check_dcn(given["dcn"], None)
    check_initialization(given["pretrained"], given["init_cfg"])
