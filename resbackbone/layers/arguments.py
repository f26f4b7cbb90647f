"""Validation of layer configs against the constructors of their classes."""

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

# Upper limits of arguments: far beyond any net, and the product of two fits into torch's integers.
MAX_CHANNELS = 2**16
MAX_BLOCKS = 2**10  # of a stage
MAX_PIXELS = 2**10  # of a stride, a dilation or a kernel
MAX_PARTS = 2**10  # groups, splits, paths or branches of a layer

# Norms whose arguments are validated.
TORCH_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)

# Arguments that the net sets for each layer, and that a config must not have.
CONV_ARGUMENTS_OF_NET = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
    *("device", "dtype"),
)
NORM_ARGUMENTS_OF_NET = ("num_features", "num_channels", "normalized_shape", "device", "dtype")


def resolve_layer_cfg(cfg: Any, argument: str, kind: str) -> tuple[Any, dict[str, Any]]:
    """Split a layer's config into its class and a new dict of the other entries.

    Args:
        cfg: The config.
        argument: Its name in errors.
        kind: As for :func:`~resbackbone.registry.resolve_type`.

    Raises:
        TypeError: If it is not a dict with strings as keys, or its type is not a class of this kind.
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
        return issubclass(resolve_type(type_or_name), TORCH_NORMS)
    except (KeyError, TypeError):  # reported when the layer is built
        return False


def check_entries(argument: str, layer_class: type, entries: Iterable[str], set_by_net: tuple[str, ...] = ()) -> None:
    """Raise unless the constructor of a class has an argument for each entry of its config.

    Args:
        argument: The config's name in errors.
        layer_class: The class.
        entries: The config's keys, except for ``type``.
        set_by_net: Arguments that the net sets, and that the config must not have.

    Raises:
        TypeError: If an entry is unknown, or set by the net.
    """
    known, takes_others = parameters_of(layer_class)
    own = [name for name in known if name not in set_by_net]
    for key in entries:
        if key in set_by_net:
            raise TypeError(f"`{argument}` must not have `{key}`, which the net sets for each {layer_class.__name__}")
        if key not in known and not takes_others:
            raise TypeError(
                f"`{argument}` has the entry {key!r}, which {layer_class.__name__} does not know{nearest(key, own)}"
            )


@cache
def parameters_of(target: type) -> tuple[Mapping[str, inspect.Parameter], bool]:
    """Return the named parameters of a class's constructor, and whether it accepts others by ``**kwargs``.

    Constructors of base classes are included where ``**kwargs`` passes arguments on to them.
    """
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
    """Return the ``eps`` of a norm as a Python number; raise unless it is above 0.

    It may be 0 for a batch norm that stays in eval mode, as in mmdet's NAS-FCOS; PyTorch cannot train one.
    """
    return check_number(name, value, low=0, high=1, above=not in_eval)


def check_norm_entries(argument: str, entries: Mapping[str, Any], *, in_eval: bool = False) -> dict[str, Any]:
    """Return the arguments of a norm with numbers as Python numbers; raise if one is invalid.

    Args:
        argument: The config's name in errors.
        entries: Arguments; those that torch's norms do not share are not checked.
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
