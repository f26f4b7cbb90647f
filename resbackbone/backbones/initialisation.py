"""How weights start: ``init_cfg``, its old spelling ``pretrained``, and what holds where neither is given."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from resbackbone.checks import check_type
from resbackbone.layers import Module
from resbackbone.layers.module import InitConfig
from resbackbone.preprocessing import Preprocessing
from resbackbone.registry import split_type


class PretrainedModule(Module):
    """A module whose ``init_cfg`` may be ``dict(type="Pretrained", checkpoint=..., prefix=...)``, and is loaded whole.

    mmengine would load what fits, and go on with whatever that is. Here :func:`resbackbone.checkpoints.load_checkpoint`
    loads everything or raises.

    Args:
        init_cfg: As for :class:`~resbackbone.layers.Module`.
    """

    load_pretrained: ClassVar[Callable[..., object]]  # set in resbackbone/__init__.py, as checkpoints lie above this
    preprocessing: Preprocessing | None = None  # what the loaded weights expect of an image

    def init_weights(self) -> None:
        """Initialise by ``init_cfg``, once; a checkpoint comes last.

        Raises:
            ValueError: If a tensor of the module is not in the checkpoint, or the file is no checkpoint.
            FileNotFoundError, KeyError, OSError: If the checkpoint is not to be had.
        """
        cfgs = [self.init_cfg] if isinstance(self.init_cfg, Mapping) else self.init_cfg or []
        pretrained = [cfg for cfg in cfgs if cfg["type"] in ("Pretrained", "PretrainedInit")]
        if not pretrained or self.is_init:
            super().init_weights()
            return
        given, self.init_cfg = self.init_cfg, [cfg for cfg in cfgs if cfg not in pretrained]
        try:
            super().init_weights()
        finally:
            self.init_cfg = given
        for cfg in pretrained:
            self.load_pretrained(cfg["checkpoint"], prefix=cfg.get("prefix"))


def check_initialisation(pretrained: Any, init_cfg: Any) -> None:
    """Raise unless at most one of the two is given, and is what it should be.

    Raises:
        KeyError: If an initialiser has no ``type``.
        TypeError: If ``pretrained`` is no string, or ``init_cfg`` no dict or list of dicts.
        ValueError: If both are given.
    """
    if pretrained is not None and not isinstance(pretrained, str):
        raise TypeError(
            f"`pretrained` must be a path, a URL or None, got {pretrained!r} of type {type(pretrained).__name__}"
        )
    if pretrained is not None and init_cfg is not None:
        raise ValueError("give `init_cfg` or `pretrained`, not both; `pretrained` is the old spelling")
    if init_cfg is not None:
        check_type("init_cfg", init_cfg, (Mapping, list, tuple), "a dict, a list of dicts or None")
        for index, entry in enumerate([init_cfg] if isinstance(init_cfg, Mapping) else init_cfg):
            split_type(entry, f"init_cfg[{index}]")


def resolve_init_cfg(pretrained: str | None, init_cfg: InitConfig | None) -> InitConfig:
    """Return the initialisers that were asked for; else He's normal for convolutions and ones for norms."""
    if pretrained is not None:
        warnings.warn(
            "`pretrained` is the old spelling; use init_cfg=dict(type='Pretrained', checkpoint=...)",
            FutureWarning,
            stacklevel=5,
        )
        return {"type": "Pretrained", "checkpoint": pretrained}
    if init_cfg is not None:
        return init_cfg
    return [
        {"type": "Kaiming", "layer": "Conv2d"},
        {"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},
    ]
