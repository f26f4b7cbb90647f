"""A sequence of layers that folds frozen norms into the convolutions before them."""

from __future__ import annotations

from typing import Any

from torch import nn

from resbackbone.layers.module import InitConfig, Module


class Sequential(Module, nn.Sequential):
    """An ``nn.Sequential`` with an ``init_cfg``, which can fold norms; see :class:`~resbackbone.layers.Module`."""

    def __init__(self, *modules: Any, init_cfg: InitConfig | None = None) -> None:
        Module.__init__(self, init_cfg)
        nn.Sequential.__init__(self, *modules)

    def forward(self, input: Any) -> Any:
        """Run the layers one after the other."""
        conv = None
        for name, layer in self._modules.items():
            if conv is not None:
                input, conv = self.conv_norm(input, conv, name), None
            elif isinstance(layer, nn.Conv2d):
                conv = layer
            else:
                input = layer(input)
        return input if conv is None else conv(input)
