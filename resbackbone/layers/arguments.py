"""Checks of what a config gives to a layer's class, before there is a layer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

from torch import distributed, nn
from torch.nn.modules.batchnorm import _NormBase

from resbackbone.registry import resolve_type, split_type
from resbackbone.utils.validation import check_flag, check_number, check_type, nearest

# Far beyond any net, and small enough that no product of two is beyond what torch can count.
MOST_CHANNELS = 2**16
MOST_BLOCKS = 2**10  # of a stage
MOST_PIXELS = 2**10  # of a stride or a dilation
MOST_PARTS = 2**10  # groups, splits, paths or branches of a layer

# Norms that have their arguments checked.
CHECKED_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)

# What a convolution is given by the net around it, and what a norm, so that a config cannot say it.
GIVEN_TO_CONVOLUTIONS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
    *("device", "dtype"),
)
GIVEN_TO_NORMS = ("num_features", "num_channels", "normalized_shape", "device", "dtype")


def layer_type(cfg: Any, argument: str, kind: str) -> tuple[Any, dict[str, Any]]:
    """Split a layer's config into its class and a new dict of the other entries.

    Args:
        cfg: The config.
        argument: The argument that it is, for the errors.
        kind: As for :func:`~resbackbone.registry.resolve_type`.

    Raises:
        TypeError: If it is no dict with text for keys, or its type is no class of this kind.
        KeyError: If it has no ``type`` or an unknown one.
    """
    type_, rest = split_type(cfg, argument)
    try:
        layer_class = resolve_type(type_, kind)
    except (KeyError, TypeError) as error:
        raise type(error)(f"`{argument}`: {error.args[0]}") from error
    for key in rest:
        check_type(f"{argument} key", key, str, "text")
    _check_numbers(argument, rest)
    return layer_class, rest


def _check_numbers(argument: str, value: Any) -> None:
    """Raise where a number in a config is NaN, or a norm's config inside it does not fit."""
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"`{argument}` must be a number, got {value}")
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if type(value) in (list, tuple) else ()
    for key, item in entries:
        name = f"{argument}[{key!r}]"
        _check_numbers(name, item)
        if isinstance(item, Mapping) and str(key).endswith("norm_cfg") and _is_known_norm(item.get("type")):
            check_norm_entries(name, item)


def _is_known_norm(type_or_name: Any) -> bool:
    try:
        return issubclass(resolve_type(type_or_name), CHECKED_NORMS)
    except (KeyError, TypeError):  # which is for the layer to say
        return False


def check_entries(argument: str, layer_class: type, entries: Iterable[str], given: tuple[str, ...] = ()) -> None:
    """Raise unless a class's constructor knows all entries of its config.

    Args:
        argument: The argument that the config is, for the errors.
        layer_class: The class.
        entries: The config's keys but ``type``.
        given: Names of what the net says itself, which the config must not.

    Raises:
        TypeError: If an entry is none of the constructor's, or the net's.
    """
    known, takes_others = parameters_of(layer_class)
    own = [name for name in known if name not in given]
    for key in entries:
        if key in given:
            raise TypeError(f"`{argument}` must not have `{key}`, which the net says of each {layer_class.__name__}")
        if key not in known and not takes_others:
            raise TypeError(
                f"`{argument}` has the entry {key!r}, which {layer_class.__name__} does not know{nearest(key, own)}"
            )


@cache
def parameters_of(target: type) -> tuple[Mapping[str, inspect.Parameter], bool]:
    """Return the named parameters of a class's constructor, and whether it takes any others beside them."""
    known: dict[str, inspect.Parameter] = {}
    for base in inspect.getmro(target) if inspect.isclass(target) else ():
        if base is nn.Module:
            return known, False
        constructor = vars(base).get("__init__")
        if constructor is None:
            continue
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                known.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return known, False
    return known, True


def check_eps(name: str, value: object, *, in_eval: bool = False) -> float:
    """Return what is added to a variance as a Python number; raise unless it is above 0.

    It may be 0 for a batch norm that stays in eval mode, as in mmdet's NAS-FCOS; PyTorch refuses to train one.
    """
    return check_number(name, value, low=0, high=1, above=not in_eval)


def check_norm_entries(argument: str, entries: Mapping[str, Any], *, in_eval: bool = False) -> dict[str, Any]:
    """Return the entries that torch's norms share, as Python's own numbers; raise if one does not fit.

    Args:
        argument: The argument that the config is, for the errors.
        entries: ``eps``, ``momentum``, ``affine`` and the like; others are passed over.
        in_eval: As for :func:`check_eps`.

    Raises:
        TypeError, ValueError: If one is of the wrong type or out of range.
    """
    checks: dict[str, Callable[[str, Any], Any]] = {
        "eps": partial(check_eps, in_eval=in_eval),
        "momentum": _check_momentum,
        "affine": _check_flag,
        "track_running_stats": _check_flag,
        "bias": _check_flag,
        "process_group": _check_process_group,
    }
    return {
        key: checks[key](f"{argument}['{key}']", value) if key in checks else value for key, value in entries.items()
    }


def _check_flag(name: str, value: Any) -> Any:
    check_flag(name, value)
    return value


def _check_process_group(name: str, value: Any) -> Any:
    check_type(name, value, (type(None), getattr(distributed, "ProcessGroup", type(None))), "a process group or None")
    return value


def _check_momentum(name: str, value: Any) -> float | None:
    return None if value is None else check_number(name, value, low=0, high=1)
