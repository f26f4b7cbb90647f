"""Plugins: attention and context layers that a config inserts behind the convolutions of blocks.

Any registered module with the argument ``in_channels`` can be one. ContextBlock, GeneralizedAttention and NonLocal2d
are mmcv's, in pure Python; mmcv is imported when a config first names one.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import nn

from resbackbone.layers.arguments import check_entries, resolve_layer_cfg
from resbackbone.layers.dry_run import check_layer_initializes, current_dry_run, try_layer
from resbackbone.layers.module import Config
from resbackbone.registry import construct, is_ours
from resbackbone.utils.validation import check_type


def build_plugin_layer(
    cfg: Config, *, in_channels: int, postfix: int | str = "", **kwargs: Any
) -> tuple[str, nn.Module]:
    """Build a plugin; return its attribute name, as in OpenMMLab, and the layer.

    Args:
        cfg: A dict with the registered ``type`` and further arguments of that class.
        in_channels: Channels of the input; the output must have its shape.
        postfix: Appended to the name, to distinguish several plugins of one type.
        kwargs: Further arguments for the plugin.

    Returns:
        The name, such as ``"context_block1"``, and the layer.

    Raises:
        TypeError: If ``cfg`` is not a dict.
        KeyError: If it has no ``type`` or an unknown one.
    """
    plugin_class, own = check_plugin_cfg(cfg, "plugin cfg")
    own.pop("postfix", None)
    run = current_dry_run()
    if run is None or is_ours(plugin_class):
        return plugin_name(cfg, postfix), construct(plugin_class, in_channels=in_channels, **kwargs, **own)
    arguments = {"in_channels": in_channels, **kwargs, **own}
    layer = run.once((plugin_class, arguments), partial(_try_third_party, plugin_class, arguments))
    run.num_weights += sum(parameter.numel() for parameter in layer.parameters())
    return plugin_name(cfg, postfix), layer


def _try_third_party(plugin_class: type[Any], arguments: dict[str, Any]) -> nn.Module:
    """Build a third-party plugin in a dry run, and check that it keeps the shape and can be initialized."""
    what = f"one of `plugins`, of type {plugin_class.__name__},"
    shape = (2, arguments["in_channels"], 8, 9)
    layer = try_layer(plugin_class, (), arguments, what, shape, shape)
    check_layer_initializes(layer, f"{what} with {arguments}")
    return layer


def check_plugin_cfg(cfg: Any, argument: str) -> tuple[type[Any], dict[str, Any]]:
    """Validate a plugin's config as far as possible without its channels.

    Args:
        cfg: As for :func:`build_plugin_layer`; it may have an entry ``postfix``.
        argument: Its name in errors.

    Returns:
        The plugin's class, and the arguments in the config, including ``postfix``.

    Raises:
        TypeError, KeyError, ValueError: If it is not the config of a plugin, or an entry is invalid.
    """
    plugin_class, own = resolve_layer_cfg(cfg, argument, "plugin")
    check_entries(argument, plugin_class, (key for key in own if key != "postfix"), ("in_channels",))
    postfix = own.get("postfix", "")
    check_type(f"{argument}['postfix']", postfix, (str, int), "text or an integer")
    if "." in str(postfix):
        raise ValueError(f"`{argument}['postfix']` must not have a dot, got {postfix!r}: it is part of a module's name")
    return plugin_class, own


def plugin_name(cfg: Config, postfix: int | str = "") -> str:
    """Return the attribute name that a plugin of this config has in a block."""
    plugin_class = resolve_layer_cfg(cfg, "plugin cfg", "plugin")[0]
    return f"{getattr(plugin_class, '_abbr_', None) or _snake_case(plugin_class.__name__)}{postfix}"


def _snake_case(name: str) -> str:
    """Turn a class name into an attribute name.

    >>> _snake_case("SELayer2d"), _snake_case("GatherExcite")
    ('se_layer2d', 'gather_excite')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).replace("-", "_").lower()
