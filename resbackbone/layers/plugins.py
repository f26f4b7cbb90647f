"""Plugins: attention and context layers that a config puts behind a block's convolutions.

ContextBlock, GeneralizedAttention and NonLocal2d are mmcv's (pure Python, in every distribution of it) and are imported
when a config first names one. Any registered module that takes ``in_channels`` will do.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from resbackbone.layers.module import Config
from resbackbone.registry import construct, find_type, split_type


def build_plugin_layer(
    cfg: Config, *, in_channels: int, postfix: int | str = "", **kwargs: Any
) -> tuple[str, nn.Module]:
    """Build a plugin and the attribute name that OpenMMLab gives it.

    Args:
        cfg: A dict with the registered ``type`` and arguments of that type's own.
        in_channels: Channels of the feature map it works on; its output has the same shape.
        postfix: What follows the abbreviation in the name, to tell several of one type apart.
        kwargs: Further arguments for the plugin.

    Returns:
        The name, such as ``"context_block1"``, and the layer.

    Raises:
        TypeError: If ``cfg`` is no dict.
        KeyError: If it has no ``type`` or an unknown one.
    """
    type_, rest = split_type(cfg, "plugin cfg")
    plugin_class = find_type(type_, "plugin")
    return plugin_name(cfg, postfix), construct(plugin_class, in_channels=in_channels, **kwargs, **rest)


def plugin_name(cfg: Config, postfix: int | str = "") -> str:
    """Return the attribute name that a plugin of this config has in a block."""
    plugin_class = find_type(split_type(cfg, "plugin cfg")[0], "plugin")
    return f"{getattr(plugin_class, '_abbr_', None) or _snake_case(plugin_class.__name__)}{postfix}"


def _snake_case(name: str) -> str:
    """Turn a class name into an attribute name.

    >>> _snake_case("SELayer2d"), _snake_case("GatherExcite")
    ('se_layer2d', 'gather_excite')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).replace("-", "_").lower()
