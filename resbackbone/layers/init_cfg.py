"""Checks of ``init_cfg``, before anything is built: an initializer is tried on weights of a few numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resbackbone.registry import find_initializer, split_type
from resbackbone.utils.validation import check_number, check_type, message_of

_TRIED = nn.Conv2d(3, 3, 3, device="meta")  # of four dimensions, as a user's subclass may expect


def check_init_cfg(init_cfg: Any, argument: str = "init_cfg") -> None:
    """Raise unless ``init_cfg`` is None, an initializer's config or several, and each can draw weights.

    Args:
        init_cfg: As for :class:`~resbackbone.layers.Module`.
        argument: The argument that it is, for the errors.

    Raises:
        TypeError: If it is none of these, an entry is of the wrong type, or a checkpoint is not named.
        KeyError: If a ``type`` is missing or unknown.
        ValueError: If an initializer fails, or draws what is not finite.
    """
    if init_cfg is None:
        return
    check_type(argument, init_cfg, (Mapping, list, tuple), "a dict, a list of dicts or None")
    single = isinstance(init_cfg, Mapping)
    for index, cfg in enumerate([init_cfg] if single else init_cfg):
        _check_initializer(cfg, argument if single else f"{argument}[{index}]")


def _check_initializer(cfg: Any, name: str) -> None:
    type_, arguments = split_type(cfg, name)
    scope = arguments.pop("_scope_", None)
    initializer_class = _find_initializer(type_, scope, name)
    overrides = arguments.pop("override", None)
    if loads_checkpoint(initializer_class):
        check_pretrained(arguments, name)
        return
    _check_layers(arguments.pop("layer", None), f"{name}['layer']")
    for key, value in arguments.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            check_number(f"{name}['{key}']", value, low=-1e30, high=1e30)
    _try(initializer_class, arguments, name)
    if overrides is not None:
        check_type(f"{name}['override']", overrides, (Mapping, list), "a dict with `name`, or a list of such")
        for override in [overrides] if isinstance(overrides, Mapping) else overrides:
            _check_override(override, type_, arguments, f"{name}['override']")


def loads_checkpoint(initializer: type) -> bool:
    """Return whether an initializer is mmengine's that loads a checkpoint, by whatever name or subclass."""
    from mmengine.model import PretrainedInit

    return issubclass(initializer, PretrainedInit) and initializer.__call__ is PretrainedInit.__call__


def check_pretrained(arguments: Mapping[str, Any], name: str) -> None:
    """Raise unless an initializer that loads a checkpoint is given one, and nothing that it does not know.

    Args:
        arguments: Its config without ``type`` and ``override``.
        name: What the config is called in the errors.

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


def _check_layers(layers: Any, name: str) -> None:
    check_type(name, layers, (str, list, tuple, type(None)), "the name of a layer's class or a list of such")
    for layer in layers if isinstance(layers, (list, tuple)) else ():
        check_type(name, layer, str, "the name of a layer's class or a list of such")


def _check_override(override: Any, type_: Any, arguments: Mapping[str, Any], name: str) -> None:
    check_type(name, override, Mapping, "a dict with `name`")
    own = dict(override)
    check_type(f"{name}['name']", own.pop("name", None), str, "the name of a layer")
    if own:
        _check_initializer(own if "type" in own else {"type": type_, **arguments, **own}, name)


def check_overrides(init_cfg: Any, module: nn.Module) -> None:
    """Raise ValueError unless a module has the layers that the overrides of its ``init_cfg`` name."""
    for cfg in [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg or ():
        overrides = cfg.get("override") or ()
        for override in [overrides] if isinstance(overrides, Mapping) else overrides:
            if not hasattr(module, override["name"]):
                raise ValueError(
                    f"`init_cfg` has an `override` for {override['name']!r}, which is none of "
                    f"{', '.join(name for name, _ in module.named_children())}"
                )


def _find_initializer(type_: Any, scope: Any, name: str) -> Any:
    try:
        return find_initializer(type_, scope)
    except (KeyError, TypeError) as error:
        raise type(error)(f"`{name}`: {message_of(error)}") from error


def _try(initializer_class: Any, arguments: Mapping[str, Any], name: str) -> None:
    """Raise unless an initializer fills a small layer with finite numbers; random numbers stay as they were."""
    layer = copy.deepcopy(_TRIED).to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to warn of is said where the net is initialized
            initializer = initializer_class(**copy.deepcopy(dict(arguments)))
            if hasattr(initializer, "wholemodule"):  # one of mmengine's; what another expects is not known
                initializer.wholemodule = True
                initializer(layer)
    except Exception as error:  # mmengine and torch have asserts among their errors
        kind = TypeError if isinstance(error, TypeError) else ValueError
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        words = ": ".join(filter(None, (type(error).__name__, str(error))))
        raise kind(
            f"`{name}` of type {initializer_class.__name__} does not initialize with {given or 'nothing else'}: {words}"
        ) from error
    if not all(parameter.isfinite().all() for parameter in layer.parameters()):
        raise ValueError(f"`{name}` of type {initializer_class.__name__} draws infinite numbers or NaN")
