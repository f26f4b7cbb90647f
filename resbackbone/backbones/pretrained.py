"""Weight initialization: ``init_cfg``, its old spelling ``pretrained``, and the default."""

from __future__ import annotations

from typing import Any

from resbackbone.data.preprocessing import Preprocessing
from resbackbone.layers.module import FeatureModule, InitConfig
from resbackbone.registry.init_cfg import check_init_cfg
from resbackbone.utils.validation import warn_user


class PretrainedModule(FeatureModule):
    """A module that loads third-party checkpoints, by ``init_cfg`` or :func:`resbackbone.checkpoints.load_checkpoint`.

    ``dict(type="Pretrained", checkpoint=...)`` goes through :func:`resbackbone.checkpoints.load_checkpoint`.

    Args:
        init_cfg: As for :class:`~resbackbone.layers.Module`.
    """

    preprocessing: Preprocessing | None = None  # what the loaded weights were trained with


def check_initialization(pretrained: Any, init_cfg: Any) -> None:
    """Raise unless at most one of the two is given, and it is valid.

    Raises:
        KeyError: If an initializer has no ``type``.
        TypeError: If ``pretrained`` is not a string, or ``init_cfg`` not a dict or list of dicts.
        ValueError: If both are given.
    """
    if isinstance(pretrained, str) and not pretrained:
        raise ValueError("`pretrained` must be a path, a URL or None, got ''")
    if pretrained is not None and not isinstance(pretrained, str):
        raise TypeError(
            f"`pretrained` must be a path, a URL or None, got {pretrained!r} of type {type(pretrained).__name__}"
        )
    if pretrained is not None and init_cfg is not None:
        raise ValueError("give `init_cfg` or `pretrained`, not both; `pretrained` is the old spelling")
    check_init_cfg(init_cfg)


def resolve_init_cfg(pretrained: str | None, init_cfg: InitConfig | None) -> InitConfig:
    """Return the given initializers; by default He's normal for convolutions and ones for norms."""
    if pretrained is not None:
        warn_user(
            "`pretrained` is the old spelling; use init_cfg=dict(type='Pretrained', checkpoint=...)",
            FutureWarning,
        )
        return {"type": "Pretrained", "checkpoint": pretrained}
    if init_cfg is not None:
        return init_cfg
    return [
        {"type": "Kaiming", "layer": "Conv2d"},
        {"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},
    ]
