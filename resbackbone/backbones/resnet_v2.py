"""ResNet v2, with pre-activation; BiT is a ResNet v2 with other norms and convolutions."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from resbackbone.backbones.options import GroupedResNetOptions
from resbackbone.backbones.resnet import ResNet
from resbackbone.blocks import BasicBlock
from resbackbone.blocks.preact import PreActBasicBlock, PreActBottleneck
from resbackbone.layers import ConvWS2d, Sequential, build_norm_layer
from resbackbone.layers.module import Config
from resbackbone.registry import MODELS, resolve_type
from resbackbone.utils.validation import check_flag, convert_arguments


@MODELS.register_module()
class ResNetV2(ResNet):
    """ResNet with norm and ReLU before the convolutions: the sums run through the net untouched.

    The features are those of timm with ``features_only=True``: the sums, before the norm and ReLU that the next stage
    or the final norm begins with. They are negative in parts, and of a scale that grows from stage to stage.

    BiT is this with group norm and weight standardization, ``norm_cfg=dict(type="GN", num_groups=32)`` and
    ``conv_cfg=dict(type="StdConv2d", eps=1e-8)``, and with ``zero_padded_pool=True``. Its width factor is
    ``base_channels``: 64, 128 (x2), 192 (x3), 256 (x4).

    Args:
        depth: As for :class:`~resbackbone.ResNet`.
        zero_padded_pool: Whether the stem's max pooling sees zeros around the map, as in BiT, or the map alone. That
            differs here, since negative numbers are pooled.
        final_norm: Add the norm and ReLU that classifiers have behind the last stage; its feature map is then taken
            behind them. The norm is called ``bn`` or ``gn``.
        options: As for :class:`~resbackbone.ResNet`; ``zero_init_residual`` starts with the last convolution of each
            block at zero, and is False unless given, as in timm.

    Raises:
        KeyError, TypeError, ValueError: As for :class:`~resbackbone.ResNet`; also if ``final_norm`` meets
            ``out_indices`` without the last stage, or ``zero_init_residual`` weight standardization, which would
            divide zero by almost zero.

    Source: He et al., Identity Mappings in Deep Residual Networks, arXiv:1603.05027; Kolesnikov et al., Big Transfer
    (BiT), arXiv:1912.11370, section 3.1; the layout of timm's ``resnetv2_50`` and ``resnetv2_50x1_bit``.

    >>> block = ResNetV2(50).layer2[0]
    >>> block.bn1.num_features, block.bn2.num_features, len(block.downsample)
    (256, 128, 1)
    """

    arch_settings: ClassVar[dict[int, tuple[Any, tuple[int, ...]]]] = {
        depth: (PreActBasicBlock if block is BasicBlock else PreActBottleneck, blocks)
        for depth, (block, blocks) in ResNet.arch_settings.items()
    }

    @convert_arguments
    def __init__(
        self,
        depth: int,
        *,
        zero_padded_pool: bool = False,
        final_norm: bool = False,
        **options: Unpack[GroupedResNetOptions],
    ) -> None:
        check_flag("zero_padded_pool", zero_padded_pool)
        check_flag("final_norm", final_norm)
        self.zero_padded_pool = zero_padded_pool
        self.final_norm_name: str | None = None
        self.final_norm = final_norm
        options.setdefault("zero_init_residual", False)
        super().__init__(depth, **options)

    def _check_combinations(self) -> None:
        if self.final_norm and self.out_indices[-1] != self.num_stages - 1:
            raise ValueError(
                f"with `final_norm` the last stage must be among `out_indices`, got {self.out_indices}; "
                "drop one of the two"
            )
        conv_class = None if self.conv_cfg is None else resolve_type(self.conv_cfg["type"], "convolution")
        if self.zero_init_residual and isinstance(conv_class, type) and issubclass(conv_class, ConvWS2d):
            raise ValueError(
                "`zero_init_residual` must be False where `conv_cfg` standardizes weights, "
                f"got {self.conv_cfg!r}: zero cannot be divided by its deviation"
            )

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        """Add the layers before the first stage."""
        self._check_combinations()  # all arguments are set by now, and no layer is built yet
        super()._make_stem_layer(in_channels, stem_channels)
        if self.zero_padded_pool:
            self.maxpool = nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(kernel_size=3, stride=2))

    def _make_plain_stem(self, in_channels: int, stem_channels: int, kernel_size: int) -> None:
        """Add ``conv1`` alone; the first block begins with a norm."""
        super()._make_plain_stem(in_channels, stem_channels, kernel_size)
        self.add_module(self.norm1_name, nn.Identity())
        self.add_module("relu", nn.Identity())

    def _make_deep_stem(self, in_channels: int, stem_channels: int) -> None:
        """Add ``stem`` without its last norm and ReLU."""
        super()._make_deep_stem(in_channels, stem_channels)
        self.stem = Sequential(*list(self.stem)[:-2])

    def _make_stages(self, stride: int) -> None:
        """Add the stages and, if there is one, the norm behind the last."""
        super()._make_stages(stride)
        if self.final_norm:
            self.final_norm_name, norm = build_norm_layer(self.norm_cfg, self.inplanes)
            self.add_module(self.final_norm_name, norm)

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Make one stage of pre-activation blocks, whose shortcut has no norm."""
        return super().make_res_layer(shortcut_norm=False, **kwargs)

    def _block_init_cfg(self) -> Config | None:
        """How each block ends its initialization; a norm at zero would stay there, as no gradient passes its ReLU."""
        if not self.zero_init_residual:
            return None
        return {"type": "Constant", "val": 0, "override": {"name": f"conv{self.block.num_convs}"}}

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps.

        Args:
            x: Images ``(N, in_channels, H, W)``, normalized as the weights expect.

        Returns:
            One ``(N, C, H/s, W/s)`` per entry of ``feature_info``, in its order.
        """
        outs = super().forward(x)
        if self.final_norm_name is None:
            return outs
        return *outs[:-1], F.relu(getattr(self, self.final_norm_name)(outs[-1]))
