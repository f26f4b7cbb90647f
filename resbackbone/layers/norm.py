"""Normalization layers built from a config."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from resbackbone.layers.arguments import (
    NORM_ARGUMENTS_OF_NET,
    TORCH_NORMS,
    check_entries,
    check_norm_entries,
    resolve_layer_cfg,
)
from resbackbone.layers.dry_run import current_dry_run, try_layer
from resbackbone.layers.frozen_batch_norm import FrozenBatchNorm2d
from resbackbone.layers.module import Config
from resbackbone.registry import MODELS, construct
from resbackbone.utils.validation import check_flag, check_int

for _name, _norm in {
    "BN": nn.BatchNorm2d,
    "BN2d": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": nn.GroupNorm,
    "IN": nn.InstanceNorm2d,
    "IN2d": nn.InstanceNorm2d,
}.items():
    MODELS.register_module(_name, module=_norm)

# Norms of feature maps, which need no dry run.
_KNOWN = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)

# Of these, the first base class; instance norm before batch norm, its base in some versions of torch.
_ABBREVIATIONS: tuple[tuple[type, str], ...] = (
    (_InstanceNorm, "in"),
    (_BatchNorm, "bn"),
    (nn.GroupNorm, "gn"),
    (nn.LayerNorm, "ln"),
)


def build_norm_layer(cfg: Config, num_features: int, postfix: int | str = "") -> tuple[str, nn.Module]:
    """Build a norm; return its attribute name, as in OpenMMLab, and the layer.

    Args:
        cfg: A dict with the registered ``type`` ("BN", "SyncBN", "GN", "IN", "FrozenBN", your own), optionally
            ``requires_grad`` (False freezes the affine parameters), and further arguments of that class; ``eps``
            defaults to 1e-5.
        num_features: Number of channels.
        postfix: Appended to the name.

    Returns:
        The name, such as ``"bn1"``, ``"gn1"`` or ``"in1"``, and the layer.

    Raises:
        TypeError: If ``cfg`` is not a dict.
        KeyError: If it has no ``type`` or an unknown one.
        ValueError: If a group norm has no ``num_groups``, or they do not divide the channels.
    """
    run = current_dry_run()
    build = partial(_build, cfg, num_features)
    name, norm = build() if run is None else run.once((cfg, num_features), build)
    return f"{name}{postfix}", norm


def _build(cfg: Config, num_features: int) -> tuple[str, nn.Module]:
    """Build a norm; return the abbreviation that its name begins with, and the layer."""
    norm_class, arguments = check_norm_cfg(cfg, "norm_cfg", in_eval=True)  # callers have checked it with False
    requires_grad = arguments.pop("requires_grad", True)
    if issubclass(norm_class, nn.GroupNorm):
        _check_groups(cfg, arguments, num_features)
        norm: nn.Module = norm_class(num_channels=num_features, **arguments)
    elif current_dry_run() is None or norm_class in _KNOWN:
        norm = construct(norm_class, num_features, **arguments)
    else:
        shape = (2, num_features, 5, num_features + 7)  # sides that differ from the number of channels
        norm = try_layer(
            norm_class, (num_features,), arguments, f"`norm_cfg` of type {norm_class.__name__}", shape, shape
        )
    for parameter in norm.parameters():
        parameter.requires_grad = requires_grad
    return _abbreviation(norm_class), norm


def check_norm_cfg(cfg: Any, argument: str, *, in_eval: bool = False) -> tuple[type[Any], dict[str, Any]]:
    """Validate a norm's config as far as possible without its channels.

    Args:
        cfg: As for :func:`build_norm_layer`.
        argument: Its name in errors.
        in_eval: Whether its batch norms stay in eval mode, as with ``norm_eval``; only then ``eps`` may be 0.

    Returns:
        The norm's class, and the arguments in the config, including ``requires_grad``.

    Raises:
        TypeError, KeyError, ValueError: If it is not the config of a norm, or an entry is invalid.
    """
    norm_class, arguments = resolve_layer_cfg(cfg, argument, "norm")
    arguments.setdefault("eps", 1e-5)
    check_flag(f"{argument}['requires_grad']", arguments.get("requires_grad", True))
    entries = [key for key in arguments if key not in ("requires_grad", "eps")]
    check_entries(argument, norm_class, entries, NORM_ARGUMENTS_OF_NET)
    if issubclass(norm_class, TORCH_NORMS):
        reads_statistics = issubclass(norm_class, _BatchNorm) and arguments.get("track_running_stats", True) is True
        frozen = issubclass(norm_class, FrozenBatchNorm2d) or (in_eval and reads_statistics)
        arguments = check_norm_entries(argument, arguments, in_eval=frozen)
    if issubclass(norm_class, nn.GroupNorm):
        if "num_groups" not in arguments:
            raise ValueError(f"`{argument}` of type 'GN' needs `num_groups`, such as 32; got {dict(cfg)!r}")
        arguments["num_groups"] = check_int(f"{argument}['num_groups']", arguments["num_groups"], low=1)
    return norm_class, arguments


def _check_groups(cfg: Config, arguments: Config, num_features: int) -> None:
    num_groups = arguments["num_groups"]
    if num_features % num_groups:
        raise ValueError(
            f"`norm_cfg` asks for {num_groups} groups, which do not divide the {num_features} channels of a layer; "
            f"choose a common divisor of all widths, got {dict(cfg)!r}"
        )


def is_norm(layer: nn.Module) -> bool:
    """Return whether a layer is a norm: torch's, a subclass, or a class with a name like "...Norm2d"."""
    bases = tuple(base for base, _ in _ABBREVIATIONS)
    return isinstance(layer, bases) or re.search(r"norm(\dd)?$", type(layer).__name__, re.IGNORECASE) is not None


def _abbreviation(norm_class: type) -> str:
    if hasattr(norm_class, "_abbr_"):
        return str(norm_class._abbr_)
    for base, abbreviation in _ABBREVIATIONS:
        if issubclass(norm_class, base):
            return abbreviation
    name = norm_class.__name__.lower()
    for word, abbreviation in (("batch", "bn"), ("group", "gn"), ("layer", "ln"), ("instance", "in")):
        if word in name:
            return abbreviation
    return "norm_layer"
