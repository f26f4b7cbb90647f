"""Optimizer constructor for mmengine with layer-wise learning rate decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from resbackbone.registry import OPTIM_WRAPPER_CONSTRUCTORS
from resbackbone.training.param_groups import param_groups
from resbackbone.utils.validation import UnknownKeyError, check_mapping, nearest


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds an optimizer over the groups of :func:`resbackbone.training.param_groups`.

    In a config: ``optim_wrapper=dict(constructor="resbackbone.LayerDecayOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05), paramwise_cfg=dict(layer_decay=0.8))``. As with mmengine's
    default constructor, the optimizer holds frozen parameters too, and does not change them while they are frozen.

    Args:
        optim_wrapper_cfg: Config of the wrapper; its ``optimizer`` needs ``lr``, that of the head, and
            ``weight_decay``.
        paramwise_cfg: ``layer_decay`` and ``no_decay`` of :func:`resbackbone.training.param_groups`.

    Raises:
        TypeError, KeyError: If an entry is missing, unknown or of the wrong type.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        check_mapping("paramwise_cfg", paramwise_cfg)
        known = ("layer_decay", "no_decay")
        for name in paramwise_cfg or ():
            if name not in known:
                raise UnknownKeyError(
                    f"`paramwise_cfg` of LayerDecayOptimWrapperConstructor has no {name!r}" + nearest(name, known)
                )
        # With an empty paramwise_cfg, mmengine does not call `add_params`.
        super().__init__(optim_wrapper_cfg, {"layer_decay": 1.0, **(paramwise_cfg or {})})
        for name in ("lr", "weight_decay"):
            if name not in self.optimizer_cfg:
                raise UnknownKeyError(
                    f"LayerDecayOptimWrapperConstructor needs `{name}` in `optimizer`, got {dict(self.optimizer_cfg)!r}"
                )

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **unused: Any) -> None:
        """Append the parameter groups of a model to ``params``."""
        settings = {"lr": self.base_lr, "weight_decay": self.base_wd, **self.paramwise_cfg}
        params.extend(param_groups(module, with_frozen=True, **settings))
