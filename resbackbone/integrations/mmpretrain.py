"""Registers this library's backbones under plain names (``type="ResNet"``, ...) in mmpretrain on import.

In a config: ``custom_imports = dict(imports=["resbackbone.integrations.mmpretrain"], allow_failed_imports=False)``. The
classes have mmpretrain's argument names and defaults and load its checkpoints; they save the keys of mmdet's and
mmseg's ResNets. Subclasses written for mmpretrain's ResNet can derive from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from resbackbone import backbones
from resbackbone.backbones.feature_info import OutIndex
from resbackbone.checkpoints.layouts.mmpretrain import MMPRETRAIN
from resbackbone.integrations._hosts import replace_in_registry
from resbackbone.integrations._mmcv import guard_operators
from resbackbone.training.layer_depth import layer_depth
from resbackbone.utils.validation import check_int


class MmpretrainDefaults(backbones.ResNet):
    """Mixin with the defaults of all mmpretrain backbones; it precedes the backbone in the base classes.

    Args:
        args: As for the backbone.
        out_indices: Only the last of four stages by default, for classifiers.
        norm_eval: False by default: batch norms use batch statistics.
        kwargs: As for the backbone.
    """

    def __init__(
        self, *args: Any, out_indices: Sequence[OutIndex] = (3,), norm_eval: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, out_indices=out_indices, norm_eval=norm_eval, **kwargs)  # type: ignore[misc]
        self.register_load_state_dict_pre_hook(rename_keys)  # type: ignore[no-untyped-call]

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Return the depth of a parameter, for mmpretrain's layer-wise learning rates.

        Args:
            param_name: The parameter's name in the model.
            prefix: Prefix of the backbone's parameters in the model, such as "backbone."; other parameters belong to
                the head.

        Returns:
            The parameter's depth, as :func:`~resbackbone.training.layer_depth.layer_depth` has it, and the number of
            depths.
        """
        depth, head = layer_depth(self, param_name[len(prefix) :])
        return (depth if param_name.startswith(prefix) else head), head + 1


class DepthDefaults(MmpretrainDefaults):
    """Mixin with the defaults of mmpretrain backbones with a ``depth``.

    Args:
        depth: As for the backbone.
        stem_channels: 64 here, independent of ``base_channels``.
        expansion: Ratio of a block's output channels to ``planes``; None for 4 with bottlenecks and 1 with basic
            blocks. A model with another value cannot be pickled, only its state dict.
        kwargs: As for :class:`MmpretrainDefaults`.

    Raises:
        TypeError, ValueError: If ``expansion`` is not a positive integer, or not 1 with basic blocks; and as for the
            backbone.
    """

    def __init__(
        self, depth: int, *, stem_channels: int | None = 64, expansion: int | None = None, **kwargs: Any
    ) -> None:
        if expansion is not None:
            check_int("expansion", expansion, low=1)
        self.depth = depth
        self.expansion = expansion
        super().__init__(depth, stem_channels=stem_channels, **kwargs)
        self.expansion = self.block.expansion

    def block_and_stages(self, depth: int) -> tuple[Any, tuple[int, ...]]:
        """Return the block class with the given ``expansion``, and the number of blocks per stage."""
        block, stage_blocks = super().block_and_stages(depth)
        return block if self.expansion is None else _expanded(block, self.expansion), stage_blocks


class GroupDefaults(DepthDefaults):
    """Mixin with the defaults of mmpretrain backbones with grouped bottlenecks.

    Args:
        depth: As for the backbone.
        groups: Groups of the 3x3.
        width_per_group: Channels per group in the first stage, ``base_width`` elsewhere.
        kwargs: As for :class:`DepthDefaults`.
    """

    def __init__(self, depth: int, *, groups: int = 32, width_per_group: int = 4, **kwargs: Any) -> None:
        super().__init__(depth, groups=groups, base_width=width_per_group, **kwargs)


class ResNet(DepthDefaults):
    """:class:`resbackbone.ResNet` with mmpretrain's arguments."""


class ResNetV1c(DepthDefaults, backbones.ResNetV1c):
    """:class:`resbackbone.ResNetV1c` with mmpretrain's arguments."""


class ResNetV1d(DepthDefaults, backbones.ResNetV1d):
    """:class:`resbackbone.ResNetV1d` with mmpretrain's arguments."""


class ResNet_CIFAR(DepthDefaults, backbones.ResNet_CIFAR):
    """:class:`resbackbone.ResNet_CIFAR` with mmpretrain's arguments."""


class SEResNet(DepthDefaults, backbones.SEResNet):
    """:class:`resbackbone.SEResNet` with mmpretrain's arguments."""


class ResNeXt(GroupDefaults, backbones.ResNeXt):
    """:class:`resbackbone.ResNeXt` with mmpretrain's arguments."""


class SEResNeXt(GroupDefaults, backbones.SEResNeXt):
    """:class:`resbackbone.SEResNeXt` with mmpretrain's arguments."""


class ResNeSt(GroupDefaults, backbones.ResNeSt):
    """:class:`resbackbone.ResNeSt` with mmpretrain's arguments, one group by default."""

    def __init__(self, depth: int, *, groups: int = 1, **kwargs: Any) -> None:
        super().__init__(depth, groups=groups, **kwargs)


class Res2Net(DepthDefaults, backbones.Res2Net):
    """:class:`resbackbone.Res2Net` with mmpretrain's arguments; ``layer1`` pools, too, as in its weights."""

    def __init__(self, depth: int, *, pool_at_stride_1: bool = True, **kwargs: Any) -> None:
        super().__init__(depth, pool_at_stride_1=pool_at_stride_1, **kwargs)


class RegNet(MmpretrainDefaults, backbones.RegNet):
    """:class:`resbackbone.RegNet` with mmpretrain's defaults."""


def rename_keys(backbone: nn.Module, state_dict: dict[str, Any], prefix: str = "", *unused: Any) -> None:
    """Rename mmpretrain's keys of deep stems and pooling shortcuts to native keys, in place; others are kept.

    Its stem consists of ``ConvModule``, and its shortcuts pool only with a stride, which shifts the indices in
    ``layer1.0.downsample``. For ``backbone.register_load_state_dict_pre_hook``.

    Args:
        backbone: The backbone that loads the checkpoint.
        state_dict: The checkpoint's tensors by key.
        prefix: Prefix of the backbone's keys.
        unused: Further arguments of torch's hook.
    """
    inside = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    names = dict(zip(inside, MMPRETRAIN.to_native(inside), strict=True))
    items = list(state_dict.items())
    state_dict.clear()  # refilled below in the same order
    for key, value in items:
        state_dict[prefix + names[key.removeprefix(prefix)] if key.startswith(prefix) else key] = value


def _expanded(block: Any, expansion: int) -> Any:
    """Return a subclass of a block with another ``expansion``."""
    if block.expansion == 1 != expansion:
        raise ValueError(f"`expansion` of a {block.__name__} must be 1, got {expansion}; a deeper net has bottlenecks")
    return type(block.__name__, (block,), {"expansion": expansion, "__doc__": block.__doc__})


__all__ = [
    "RegNet",
    "Res2Net",
    "ResNeSt",
    "ResNeXt",
    "ResNet",
    "ResNetV1c",
    "ResNetV1d",
    "ResNet_CIFAR",
    "SEResNeXt",
    "SEResNet",
]

replace_in_registry(
    "mmpretrain",
    {name: globals()[name] for name in __all__},
    install="`pip install mmengine 'mmcv<2.4' mmpretrain torchvision`",
)
guard_operators()
