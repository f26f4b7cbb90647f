"""The block of SCNet's heads: a basic block without the last ReLU, with or without norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resbackbone.blocks.base import BATCH_NORM
from resbackbone.blocks.basic import BasicBlock
from resbackbone.layers.module import Config


class SimplifiedBasicBlock(BasicBlock):
    """Two 3x3 convolutions added to their input, with nothing behind the addition.

    Args:
        inplanes: Channels that come in.
        planes: Channels that go out.
        norm_cfg: Config of the norms; None for none, in which case the convolutions have a bias.
        kwargs: As for :class:`BasicBlock`; ``dcn``, ``plugins`` and ``with_cp`` are refused, as upstream.

    Raises:
        ValueError: If one of these three is given.

    Source: Vu et al., SCNet, arXiv:2012.10150; mmdet 3.3.0 ``models/layers/res_layer.py``.
    """

    def __init__(self, inplanes: int, planes: int, *, norm_cfg: Config | None = BATCH_NORM, **kwargs: Any) -> None:
        for name in ("dcn", "plugins", "with_cp"):
            if kwargs.get(name):
                raise ValueError(f"`{name}` is not for a SimplifiedBasicBlock, got {kwargs[name]!r}; use a BasicBlock")
        self.with_norm = norm_cfg is not None
        super().__init__(inplanes, planes, norm_cfg=norm_cfg, **kwargs)  # type: ignore[arg-type]  # None is for here

    def add_conv(self, index: int, *args: Any, **kwargs: Any) -> None:
        """Add ``conv{index}`` and, if the block has norms, the norm behind it."""
        if self.with_norm:
            super().add_conv(index, *args, **kwargs)
        else:
            self.add_module(f"conv{index}", self.make_conv(*args, bias=True, **kwargs))

    def _norm(self, index: int) -> Any:
        return super()._norm(index) if self.with_norm else None

    def step(self, index: int, x: Tensor) -> Tensor:
        """Run the ``index``-th convolution with its norm, if any, and, but for the last, the ReLU."""
        if self.with_norm:
            return super().step(index, x)
        x = getattr(self, f"conv{index}")(x)
        return self.relu(x) if index < self.num_convs else x

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, inplanes, H, W)`` to ``(N, planes, H/stride, W/stride)``."""
        return self._add_shortcut(x)
