"""Selective kernels: attention over convolutions of several dilations."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resbackbone.layers.arguments import MAX_CHANNELS, MAX_PARTS
from resbackbone.layers.conv import build_conv_layer
from resbackbone.layers.conv_norm import ConvNormModule
from resbackbone.layers.module import Config
from resbackbone.layers.norm import build_norm_layer
from resbackbone.layers.sequential import Sequential
from resbackbone.layers.split_attention import add_up, check_norm_of_one_pixel
from resbackbone.utils.validation import check_count, check_flag, check_int


class SelectiveKernelConv2d(nn.Module):
    """Attention-weighted sum of ``num_paths`` 3x3 convolutions, the k-th with k times the dilation.

    The attention weights, one per path and channel, sum to 1 over the paths. The keys are timm's: ``paths.0.conv``,
    ``paths.0.bn``, ..., ``attn.fc_reduce``, ``attn.bn``, ``attn.fc_select``.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels, also of each path.
        stride: Stride in pixels.
        dilation: Dilation of the first path, in pixels; twice as much in the second, and so on.
        groups: Groups of each convolution.
        num_paths: Number of paths, the paper's M.
        reduction: Reduction ratio of the attention, the paper's r.
        min_channels: Minimum number of channels of the attention, the paper's L.
        split_input: Split the input channels among the paths, instead of passing all to each.
        conv_cfg: Config of the paths' convolutions; they may be deformable.
        norm_cfg: Config of the norms. That of the attention normalizes maps of one pixel.

    Shapes:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H/stride), ceil(W/stride))``.

    Raises:
        ValueError: If the channels cannot be split, or the attention's norm would normalize single values.

    Source: Li et al., Selective Kernel Networks, arXiv:1903.06586, section 3.1; ``split_input`` is timm's.

    >>> layer = SelectiveKernelConv2d(16, 32, norm_cfg=dict(type="BN"))
    >>> [path.conv.dilation for path in layer.paths], layer.attn.fc_reduce.out_channels
    ([(1, 1), (2, 2)], 32)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        num_paths: int = 2,
        reduction: int = 16,
        min_channels: int = 32,
        split_input: bool = False,
        conv_cfg: Config | None = None,
        norm_cfg: Config,
    ) -> None:
        super().__init__()
        if split_input and in_channels % num_paths:
            raise ValueError(
                f"with `split_input` the {in_channels} input channels must be divisible by `num_paths`, got {num_paths}"
            )
        self.out_channels = out_channels
        self.split_input = split_input
        self.attn = SelectiveKernelAttention(
            out_channels, max(out_channels // reduction, min_channels), num_paths=num_paths, norm_cfg=norm_cfg
        )
        self.paths = nn.ModuleList()
        for reach in range(1, num_paths + 1):
            conv = build_conv_layer(
                conv_cfg,
                in_channels // num_paths if split_input else in_channels,
                out_channels,
                3,
                stride=stride,
                padding=reach * dilation,
                dilation=reach * dilation,
                groups=groups,
                bias=False,
            )
            norm_name, norm = build_norm_layer(norm_cfg, out_channels)
            self.paths.append(Sequential(OrderedDict([("conv", conv), (norm_name, norm), ("relu", nn.ReLU(True))])))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H/stride), ceil(W/stride))``."""
        shares = x.chunk(len(self.paths), dim=1) if self.split_input else [x] * len(self.paths)
        # By index, since torch.fx cannot iterate over the chunks.
        views = torch.stack([path(shares[index]) for index, path in enumerate(self.paths)], dim=1)
        return add_up(views * self.attn(add_up(views, len(self.paths))), len(self.paths))


class SelectiveKernelAttention(ConvNormModule):
    """Attention weights of the paths, computed from the channel means of their sum.

    Args:
        in_channels: Channels of each path.
        channels: Channels between the two fully connected layers.
        num_paths: Number of paths.
        norm_cfg: Config of the norm between them.

    Source: arXiv:1903.06586, equations 2 to 5.
    """

    def __init__(self, in_channels: int, channels: int, *, num_paths: int, norm_cfg: Config) -> None:
        super().__init__()
        self.num_paths = num_paths
        self.norm_name, norm = build_norm_layer(norm_cfg, channels)
        check_norm_of_one_pixel(norm, norm_cfg, "selective-kernel attention")
        self.fc_reduce = build_conv_layer(None, in_channels, channels, 1, bias=False)
        self.add_module(self.norm_name, norm)
        self.fc_select = build_conv_layer(None, channels, in_channels * num_paths, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map the paths' sum ``(N, in_channels, H, W)`` to weights ``(N, num_paths, in_channels, 1, 1)``."""
        hidden = self.conv_norm(F.adaptive_avg_pool2d(x, 1), self.fc_reduce, self.norm_name)
        logits: Tensor = self.fc_select(F.relu(hidden))
        return torch.unflatten(logits, 1, (self.num_paths, -1)).softmax(1)


def check_selective_kernel(num_paths: int, reduction: int, min_channels: int, split_input: bool) -> None:
    """Raise TypeError or ValueError unless these are arguments of :class:`SelectiveKernelConv2d`."""
    check_count("num_paths", num_paths, low=2, most=MAX_PARTS)
    check_int("reduction", reduction, low=1)
    check_count("min_channels", min_channels, most=MAX_CHANNELS)
    check_flag("split_input", split_input)
