"""The block of DetectoRS: a bottleneck with switchable atrous convolution and an input for fed-back features."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from resbackbone.blocks.base import GroupOptions
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.layers import build_conv_layer
from resbackbone.layers.activation_checkpointing import needs_backward, recompute_in_backward
from resbackbone.layers.module import Config
from resbackbone.utils.validation import check_int, check_mapping

NO_FEEDBACK: Config = {"type": "Constant", "val": 0, "override": {"name": "rfp_conv"}}  # read, never written to


class DetectorsBottleneck(Bottleneck):
    """A bottleneck whose 3x3 may be a switchable atrous convolution, and that adds features of a pyramid to its sum.

    Args:
        inplanes: Input channels.
        planes: A quarter of the output channels.
        sac: Config of the 3x3, such as ``dict(type="SAC", use_deform=True)``; None for ``conv_cfg`` or ``dcn``.
        rfp_inplanes: Channels of the features that are fed back into the block; None for a block without. Their
            convolution starts at zero.
        options: As for :class:`~resbackbone.blocks.Bottleneck`.

    Raises:
        TypeError, ValueError: As for the bottleneck, and if it is given both ``sac`` and ``dcn``.

    Source: Qiao et al., DetectoRS, arXiv:2006.02334, sections 3.2 and 4.
    """

    unsupported: ClassVar[tuple[str, ...]] = ("ibn",)

    optional_keys: ClassVar[tuple[str, ...]] = ("rfp_conv",)  # keys that a checkpoint may lack: initialized to zero

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        sac: Config | None = None,
        rfp_inplanes: int | None = None,
        **options: Unpack[GroupOptions],
    ) -> None:
        check_mapping("sac", sac)
        if sac is not None and options.get("dcn") is not None:
            raise ValueError("give a block `sac` or `dcn`, not both: each is the config of its spatial convolution")
        if rfp_inplanes is not None:
            check_int("rfp_inplanes", rfp_inplanes, low=1)
            init_cfg = options.get("init_cfg")
            given = [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []
            options["init_cfg"] = [*given, NO_FEEDBACK]
        self.sac = sac
        super().__init__(inplanes, planes, **options)
        self.rfp_inplanes = rfp_inplanes
        out_channels = self.planes * self.expansion
        self.rfp_conv = None if rfp_inplanes is None else build_conv_layer(None, rfp_inplanes, out_channels, 1)

    @property
    def with_sac(self) -> bool:
        """Whether the block was asked for a switchable atrous convolution."""
        return self.sac is not None

    def spatial_conv_cfg(self, stride: int) -> Config | None:
        """Return the config of the 3x3: ``sac``, if the block has it."""
        return super().spatial_conv_cfg(stride) if self.sac is None else self.sac

    def forward(self, x: Tensor, rfp_feat: Tensor | None = None, *, checkpointed: bool = False) -> Tensor:
        """Map ``(N, inplanes, H, W)`` to ``(N, planes * expansion, H/stride, W/stride)``; see :meth:`rfp_forward`."""
        if self.rfp_conv is None or rfp_feat is None:
            return super().forward(x, checkpointed=checkpointed)
        if self.with_cp and not checkpointed and needs_backward(x, [self]):
            again = partial(DetectorsBottleneck.forward, self, rfp_feat=rfp_feat, checkpointed=True)
            return recompute_in_backward(again, x, [self])  # type: ignore[no-any-return]
        out: Tensor = self.relu(self.conv_norm(x, self.conv1, self.norm1_name))
        out = self.forward_plugin(out, self.after_conv1_plugin_names)
        out = self.relu(self.conv_norm(out, self.conv2, self.norm2_name))
        out = self.forward_plugin(out, self.after_conv2_plugin_names)
        out = self.conv_norm(out, self.conv3, self.norm3_name)
        out = self.finish_branch(out, self.after_conv3_plugin_names)
        out = self.join(out, x if self.downsample is None else self.downsample(x))
        return self.relu(out + self.rfp_conv(rfp_feat))

    def rfp_forward(self, x: Tensor, rfp_feat: Tensor | None) -> Tensor:
        """Compute the block with features fed back into it, the method that mmdet's backbone calls.

        Args:
            x: ``(N, inplanes, H, W)``.
            rfp_feat: ``(N, rfp_inplanes, H/stride, W/stride)``; unused in a block without ``rfp_inplanes``.

        Returns:
            ``(N, planes * expansion, H/stride, W/stride)``.
        """
        return self.forward(x, rfp_feat)
