"""The arguments of ResNet that its variants accept by name, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from resbackbone.backbones.feature_info import OutIndex
from resbackbone.backbones.res_layer import DilationStyle
from resbackbone.blocks.base import Style
from resbackbone.layers.activation_checkpointing import WithCp
from resbackbone.layers.module import Config, InitConfig


class ResNetOptions(TypedDict, total=False):
    """The arguments of :class:`~resbackbone.ResNet` but ``depth``, ``groups`` and ``base_width``."""

    in_channels: int
    stem_channels: int | Sequence[int] | None
    base_channels: int
    num_stages: int
    strides: Sequence[int]
    dilations: Sequence[int]
    out_indices: Sequence[OutIndex]
    style: Style
    deep_stem: bool
    avg_down: bool
    frozen_stages: int
    conv_cfg: Config | None
    norm_cfg: Config
    norm_eval: bool
    dcn: Config | None
    stage_with_dcn: Sequence[bool]
    plugins: Sequence[Config] | None
    with_cp: WithCp
    zero_init_residual: bool
    pretrained: str | None
    init_cfg: InitConfig | None
    multi_grid: Sequence[int] | None
    contract_dilation: bool
    dilation_style: DilationStyle
    drop_path_rate: float
    stage_blocks: Sequence[int] | None
    project_first_block: bool
    fold_frozen_norms: bool


class GroupedResNetOptions(ResNetOptions, total=False):
    """:class:`ResNetOptions`, and the arguments that make a variant with bottlenecks a ResNeXt."""

    groups: int
    base_width: int
