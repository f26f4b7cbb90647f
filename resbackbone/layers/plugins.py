"""Plugins: attention and context layers that a config puts behind a block's convolutions.

ContextBlock, GeneralizedAttention and NonLocal2d are mmcv's (pure Python, in every distribution of it) and are imported
when a config first names one. Any registered module that takes ``in_channels`` will do.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import nn

from resbackbone.layers.arguments import check_entries, layer_type
from resbackbone.layers.dry_run import (
    check_layer_initializes,
    check_layer_runs,
    current_dry_run,
    is_tried,
    make_foreign,
)
from resbackbone.layers.module import Config
from resbackbone.registry import construct, is_ours
from resbackbone.utils.validation import check_type


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
    plugin_class, own = check_plugin_cfg(cfg, "plugin cfg")
    own.pop("postfix", None)
    run = current_dry_run()
    if run is None or is_ours(plugin_class):
        return plugin_name(cfg, postfix), construct(plugin_class, in_channels=in_channels, **kwargs, **own)
    arguments = {"in_channels": in_channels, **kwargs, **own}
    layer = run.once((plugin_class, arguments), partial(_try_foreign, plugin_class, arguments))
    run.num_weights += sum(parameter.numel() for parameter in layer.parameters())
    return plugin_name(cfg, postfix), layer


def _try_foreign(plugin_class: type[Any], arguments: dict[str, Any]) -> nn.Module:
    """Make a plugin of a class that is not ours, in a dry run, and see that it keeps the shape of feature maps."""
    if not is_tried(plugin_class):
        return nn.Identity()
    what = f"one of `plugins`, of type {plugin_class.__name__},"
    layer = make_foreign(plugin_class, arguments, what)
    if layer is None:
        return nn.Identity()
    shape = (2, arguments["in_channels"], 8, 9)
    check_layer_runs(layer.eval(), shape, shape, what)
    check_layer_initializes(layer, f"{what} with {arguments}")
    return layer


def check_plugin_cfg(cfg: Any, argument: str) -> tuple[type[Any], dict[str, Any]]:
    """Check what can be said of a plugin's config before its channels are known.

    Args:
        cfg: As for :func:`build_plugin_layer`; it may have an entry ``postfix``, too.
        argument: The argument that it is, for the errors.

    Returns:
        The plugin's class and its arguments, with ``postfix``, if that is there.

    Raises:
        TypeError, KeyError: If it is no plugin's config, or its class does not know an entry.
    """
    plugin_class, own = layer_type(cfg, argument, "plugin")
    check_entries(argument, plugin_class, (key for key in own if key != "postfix"), ("in_channels",))
    postfix = own.get("postfix", "")
    check_type(f"{argument}['postfix']", postfix, (str, int), "text or an integer")
    if "." in str(postfix):
        raise ValueError(f"`{argument}['postfix']` must not have a dot, got {postfix!r}: it is part of a module's name")
    return plugin_class, own


def plugin_name(cfg: Config, postfix: int | str = "") -> str:
    """Return the attribute name that a plugin of this config has in a block."""
    plugin_class = layer_type(cfg, "plugin cfg", "plugin")[0]
    return f"{getattr(plugin_class, '_abbr_', None) or _snake_case(plugin_class.__name__)}{postfix}"


def _snake_case(name: str) -> str:
    """Turn a class name into an attribute name.

    >>> _snake_case("SELayer2d"), _snake_case("GatherExcite")
    ('se_layer2d', 'gather_excite')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).replace("-", "_").lower()
