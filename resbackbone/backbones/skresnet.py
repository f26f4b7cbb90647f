"""SK-ResNet: the first 3x3 of each block is a selective-kernel convolution."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from typing_extensions import Unpack

from resbackbone.backbones.options import GroupedResNetOptions
from resbackbone.backbones.resnet import ResNet
from resbackbone.blocks import BasicBlock
from resbackbone.blocks.selective_kernel import (
    SelectiveKernelBasicBlock,
    SelectiveKernelBottleneck,
    SelectiveKernelOptions,
)
from resbackbone.layers.selective_kernel import check_selective_kernel
from resbackbone.registry import MODELS
from resbackbone.utils.validation import convert_arguments


@MODELS.register_module()
class SKResNet(ResNet):
    """ResNet with selective kernels: in a basic block the first 3x3, in a bottleneck the one there is.

    Args:
        depth: As for :class:`~resbackbone.ResNet`.
        num_paths: Number of 3x3 convolutions of increasing dilation to select from, the paper's M.
        reduction: Reduction ratio of the attention, the paper's r.
        min_channels: Minimum number of channels of the attention, the paper's L.
        split_input: Give each path its share of the channels that come in, instead of all.
        options: As for :class:`~resbackbone.ResNet`; with ``groups=32`` it is the paper's SKNet.

    Raises:
        KeyError, TypeError, ValueError: As for :class:`~resbackbone.ResNet`; also if one of the four does not fit.

    Source: Li et al., Selective Kernel Networks, arXiv:1903.06586; splitting the input is timm's (``skresnet50``).

    >>> [path.conv.dilation for path in SKResNet(50).layer1[0].conv2.paths]
    [(1, 1), (2, 2)]
    """

    arch_settings: ClassVar[dict[int, tuple[Any, tuple[int, ...]]]] = {
        depth: (SelectiveKernelBasicBlock if block is BasicBlock else SelectiveKernelBottleneck, blocks)
        for depth, (block, blocks) in ResNet.arch_settings.items()
    }

    _sizes: ClassVar[tuple[str, ...]] = ("selective_kernel",)

    @convert_arguments
    def __init__(
        self,
        depth: int,
        *,
        num_paths: int = 2,
        reduction: int = 16,
        min_channels: int = 32,
        split_input: bool = False,
        **options: Unpack[GroupedResNetOptions],
    ) -> None:
        check_selective_kernel(num_paths, reduction, min_channels, split_input)
        self.selective_kernel: SelectiveKernelOptions = {
            "num_paths": num_paths,
            "reduction": reduction,
            "min_channels": min_channels,
            "split_input": split_input,
        }
        super().__init__(depth, **options)

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Make one stage of blocks with selective kernels."""
        return super().make_res_layer(selective_kernel=self.selective_kernel, **kwargs)
