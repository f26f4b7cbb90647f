"""The blocks of DetectoRS: bottlenecks with switchable atrous convolution and an input for fed-back features."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from resbackbone.blocks.base import ResidualBlock
from resbackbone.blocks.bottleneck import Bottleneck
from resbackbone.blocks.resnext import ResNeXtBottleneck
from resbackbone.layers import build_conv_layer
from resbackbone.layers.module import Config, InitConfig
from resbackbone.utils.validation import check_int, check_mapping

NO_FEEDBACK: Config = {"type": "Constant", "val": 0, "override": {"name": "rfp_conv"}}  # read, never written to


class RecursiveBlock(ResidualBlock):
    """A base to put before a block, which adds what DetectoRS has beside it.

    Args:
        inplanes: Channels that come in.
        planes: As for the block.
        sac: Config of the spatial convolution, such as ``dict(type="SAC", use_deform=True)``; None for ``conv_cfg``.
        rfp_inplanes: Channels of the features that are fed back into the block; None for a block without.
        init_cfg: As for :class:`~resbackbone.layers.Module`. What is fed back starts at zero times.
        kwargs: As for the block.

    Raises:
        TypeError, ValueError: As for the block, and if it is given both ``sac`` and ``dcn``.

    Source: Qiao et al., DetectoRS, arXiv:2006.02334, sections 3.2 and 4.
    """

    optional_keys: ClassVar[tuple[str, ...]] = ("rfp_conv",)  # what a checkpoint need not have: it starts at zero

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        sac: Config | None = None,
        rfp_inplanes: int | None = None,
        init_cfg: InitConfig | None = None,
        **kwargs: Any,
    ) -> None:
        check_mapping("sac", sac)
        if sac is not None and kwargs.get("dcn") is not None:
            raise ValueError("give a block `sac` or `dcn`, not both: each says its spatial convolution")
        if rfp_inplanes is not None:
            check_int("rfp_inplanes", rfp_inplanes, low=1)
            given = [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []
            init_cfg = [*given, NO_FEEDBACK]
        self.sac = sac
        super().__init__(inplanes, planes, init_cfg=init_cfg, **kwargs)
        self.rfp_inplanes = rfp_inplanes
        out_channels = self.planes * self.expansion
        self.rfp_conv = None if rfp_inplanes is None else build_conv_layer(None, rfp_inplanes, out_channels, 1)

    @property
    def with_sac(self) -> bool:
        """Whether the block was asked for a switchable atrous convolution."""
        return self.sac is not None

    def spatial_conv_cfg(self, stride: int) -> Config | None:
        """Return the config of the spatial convolution: ``sac``, where the block has it."""
        return super().spatial_conv_cfg(stride) if self.sac is None else self.sac

    def rfp_forward(self, x: Tensor, rfp_feat: Tensor | None) -> Tensor:
        """Compute the block with features fed back into it.

        Args:
            x: ``(N, inplanes, H, W)``.
            rfp_feat: ``(N, rfp_inplanes, H/stride, W/stride)``; unused in a block without ``rfp_inplanes``.

        Returns:
            ``(N, planes * expansion, H/stride, W/stride)``.
        """
        out = self.residual(x)
        if self.rfp_conv is not None:
            out = out + self.rfp_conv(rfp_feat)
        return self.relu(out)  # type: ignore[no-any-return]


class DetectorsBottleneck(RecursiveBlock, Bottleneck):
    """A bottleneck with the arguments of :class:`RecursiveBlock`."""


class DetectorsResNeXtBottleneck(RecursiveBlock, ResNeXtBottleneck):
    """A grouped bottleneck with the arguments of :class:`RecursiveBlock`."""
