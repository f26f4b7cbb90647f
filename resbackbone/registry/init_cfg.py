"""Validation of ``init_cfg``: its initializers are resolved, and tried on a small layer before anything is built."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from resbackbone.registry.lookup import is_registered
from resbackbone.registry.types import add_scope, resolve_type, split_type
from resbackbone.utils.validation import check_number, check_type, message_of

_LAYER = nn.Conv2d(3, 3, 3, device="meta")  # four dimensions, which a user's initializer may rely on
_LAYER_NAMES = "the name of a layer's class or a list of such"


def as_list(cfgs: Any) -> list[Any]:
    """Return one config, several or None as a list."""
    return [cfgs] if isinstance(cfgs, Mapping) else list(cfgs or ())


def resolve_initializer(type_or_name: Any, scope: Any = None) -> Any:
    """Return the class that an initializer's ``type`` names, in ``init_cfg`` or ``override``.

    Args:
        type_or_name: A class; or a name that mmengine or a user registered, or the dotted path of such a class.
        scope: Its ``_scope_``.

    Raises:
        TypeError: If it is neither a class nor a string, or not an initializer.
        KeyError: If the name is not registered.
    """
    from mmengine.model import BaseInit, PretrainedInit

    if type_or_name in ("PretrainedInit", "mmengine.PretrainedInit"):
        type_or_name = PretrainedInit
    found = resolve_type(add_scope(type_or_name, scope), "initializer", registry=WEIGHT_INITIALIZERS, base=object)
    known = issubclass(found, (BaseInit, PretrainedInit)) or is_registered(found, WEIGHT_INITIALIZERS)
    has_call = any("__call__" in vars(base) for base in found.__mro__)
    if not known and (isinstance(type_or_name, str) or not has_call):
        raise TypeError(f"`type` of an initializer must name one, got {type_or_name!r}")
    return found


def loads_checkpoint(initializer: type) -> bool:
    """Return whether an initializer class is mmengine's ``PretrainedInit`` or a subclass that loads as it does."""
    from mmengine.model import PretrainedInit

    return issubclass(initializer, PretrainedInit) and initializer.__call__ is PretrainedInit.__call__


def check_initializer_types(init_cfg: Any) -> None:
    """Raise unless every ``type`` in an ``init_cfg`` of a third-party module, and its overrides, is an initializer.

    Raises:
        KeyError: If one is missing or unknown.
        TypeError: If one is not an initializer, or an entry is not a dict.
    """
    for cfg in as_list(init_cfg):
        type_, rest = split_type(cfg, "init_cfg")
        named = [override for override in as_list(rest.pop("override", None)) if "type" in override]
        for one in [{**rest, "type": type_}, *named]:
            _resolve(one["type"], one.get("_scope_"), "init_cfg")


def check_init_cfg(init_cfg: Any, argument: str = "init_cfg") -> None:
    """Raise unless ``init_cfg`` is None, the config of an initializer or a list of such, and each can initialize.

    Args:
        init_cfg: As for :class:`~resbackbone.layers.Module`.
        argument: Its name in errors.

    Raises:
        TypeError: If it or an entry is of the wrong type, or ``checkpoint`` is missing.
        KeyError: If a ``type`` is missing or unknown.
        ValueError: If an initializer fails, or its weights are not finite.
    """
    check_type(argument, init_cfg, (Mapping, list, tuple, type(None)), "a dict, a list of dicts or None")
    for index, cfg in enumerate(as_list(init_cfg)):
        _check_initializer(cfg, argument if isinstance(init_cfg, Mapping) else f"{argument}[{index}]")


def check_pretrained(arguments: Mapping[str, Any], name: str) -> None:
    """Raise unless the arguments are those of an initializer that loads a checkpoint.

    Args:
        arguments: Its config without ``type`` and ``override``.
        name: Name of the config in errors.

    Raises:
        TypeError: If an entry is missing, unknown or of the wrong type.
        ValueError: If the checkpoint's name is empty.
    """
    if "checkpoint" not in arguments or arguments.keys() - {"checkpoint", "prefix", "map_location"}:
        raise TypeError(
            f"`{name}` of type 'Pretrained' takes `checkpoint`, `prefix` and `map_location`, which has no effect; got "
            f"{', '.join(arguments) or 'none of them'}"
        )
    check_type(f"{name}['checkpoint']", arguments["checkpoint"], (str, Path), "a path, a URL or a name")
    if not str(arguments["checkpoint"]):
        raise ValueError(f"`{name}['checkpoint']` must be a path, a URL or a name, got ''")
    check_type(f"{name}['prefix']", arguments.get("prefix"), (str, type(None)), "text or None")


def check_overrides(init_cfg: Any, module: nn.Module) -> None:
    """Raise ValueError unless a module has the layers that the overrides of its ``init_cfg`` name."""
    for override in _all_overrides(init_cfg):
        if not hasattr(module, override["name"]):
            raise ValueError(
                f"`init_cfg` has an `override` for {override['name']!r}, which is none of "
                f"{', '.join(name for name, _ in module.named_children())}"
            )


def _all_overrides(init_cfg: Any) -> Iterator[Mapping[str, Any]]:
    for cfg in as_list(init_cfg):
        yield from as_list(cfg.get("override"))


def _check_initializer(cfg: Any, name: str) -> None:
    type_, arguments = split_type(cfg, name)
    initializer_class = _resolve(type_, arguments.pop("_scope_", None), name)
    overrides = arguments.pop("override", None)
    if loads_checkpoint(initializer_class):
        check_pretrained(arguments, name)
        return
    layers = arguments.pop("layer", None)
    check_type(f"{name}['layer']", layers, (str, list, tuple, type(None)), _LAYER_NAMES)
    for layer in layers if isinstance(layers, (list, tuple)) else ():
        check_type(f"{name}['layer']", layer, str, _LAYER_NAMES)
    for key, value in arguments.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            check_number(f"{name}['{key}']", value, low=-1e30, high=1e30)
    _try_initializer(initializer_class, arguments, name)
    check_type(f"{name}['override']", overrides, (Mapping, list, type(None)), "a dict with `name`, or a list of such")
    for override in as_list(overrides):
        _check_override(override, type_, arguments, f"{name}['override']")


def _check_override(override: Any, type_: Any, arguments: Mapping[str, Any], name: str) -> None:
    check_type(name, override, Mapping, "a dict with `name`")
    own = dict(override)
    check_type(f"{name}['name']", own.pop("name", None), str, "the name of a layer")
    if own:
        _check_initializer(own if "type" in own else {"type": type_, **arguments, **own}, name)


def _resolve(type_: Any, scope: Any, name: str) -> Any:
    try:
        return resolve_initializer(type_, scope)
    except (KeyError, TypeError) as error:
        raise type(error)(f"`{name}`: {message_of(error)}") from error


def _try_initializer(initializer_class: Any, arguments: Mapping[str, Any], name: str) -> None:
    """Raise unless an initializer fills a small layer with finite numbers; the random state is restored."""
    layer = copy.deepcopy(_LAYER).to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # raised again when the net is initialized
            initializer = initializer_class(**copy.deepcopy(dict(arguments)))
            if hasattr(initializer, "wholemodule"):  # a BaseInit; other initializers may expect another module
                initializer.wholemodule = True
                initializer(layer)
    except Exception as error:  # mmengine and torch raise AssertionError, too
        kind = TypeError if isinstance(error, TypeError) else ValueError
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        words = ": ".join(filter(None, (type(error).__name__, str(error))))
        raise kind(
            f"`{name}` of type {initializer_class.__name__} does not initialize with {given or 'nothing else'}: {words}"
        ) from error
    if not all(parameter.isfinite().all() for parameter in layer.parameters()):
        raise ValueError(f"`{name}` of type {initializer_class.__name__} draws infinite numbers or NaN")
