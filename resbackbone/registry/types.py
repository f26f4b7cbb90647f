"""Resolve the ``type`` of a config to a class of the wanted kind: a norm, a convolution, a backbone and so on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry
from torch import nn
from torch.nn.modules import activation, batchnorm, conv, loss

from resbackbone.registry.lookup import HOSTS, default_registry, find_scope, import_plugins, is_registered, look_up
from resbackbone.utils.validation import UnknownKeyError, check_mapping, nearest, to_builtin

Class = TypeVar("Class", bound=type)

# Base classes of each kind; a third-party class derived from none of them may be of any kind.
_KINDS: dict[str, list[type]] = {
    "norm": [batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm],
    "convolution": [conv._ConvNd],
    "activation": [getattr(activation, name) for name in activation.__all__ if name != "MultiheadAttention"],
    "loss": [loss._Loss],
}
_NEVER_PLUGINS = ("backbone", "neck", "classifier", "shared head", "loss")
_restricted: ContextVar[bool] = ContextVar("resbackbone_restricted", default=False)


def register_kind(kind: str) -> Callable[[Class], Class]:
    """Decorate a class: it and its subclasses are of a kind, such as "norm"."""

    def register(cls: Class) -> Class:
        _KINDS.setdefault(kind, []).append(cls)
        return cls

    return register


def resolve_type(
    type_or_name: Any,
    kind: str = "model",
    *,
    registry: Registry | None = None,
    base: type | tuple[type, ...] = nn.Module,
) -> Any:
    """Return the class that a config's ``type`` names; nothing unregistered is imported.

    Names are looked up in ``registry``, then in mmengine's root, then in the registry of the current default scope
    (where mmdet or mmseg users register their layers), then in installed plugins, and last in mmcv, which is imported
    only at that point.

    Args:
        type_or_name: A class; or a registered name, with or without a scope prefix; or the dotted path of a class.
        kind: "backbone", "norm", "convolution", "activation", "plugin" or "loss"; any other word is for the error only.
        registry: Where names are looked up first; None for ``resbackbone.MODELS``.
        base: What the class must be derived from.

    Raises:
        TypeError: If it is neither a class nor a string, or the class is of another kind.
        KeyError: If the name is not registered.
    """
    if isinstance(type_or_name, str):
        # MODELS is this scope's child of mmengine's registry; it is defined above this module.
        found = _find(type_or_name, kind, registry or ROOT_MODELS.children["resbackbone"])
    elif inspect.isclass(type_or_name):
        found = type_or_name
    else:
        raise TypeError(
            f"`type` of a {kind} must be a registered name or a class, "
            f"got {type_or_name!r} of type {type(type_or_name).__name__}"
        )
    check_kind(found, type_or_name, kind, base)
    return found


def split_type(cfg: Any, argument: str) -> tuple[Any, dict[str, Any]]:
    """Split a config into its ``type`` and a new dict of the other entries.

    Raises:
        TypeError: If it is no dict.
        KeyError: If it has no ``type``.
    """
    check_mapping(argument, cfg, optional=False)
    if "type" not in cfg:
        raise UnknownKeyError(f"`{argument}` needs a `type`, got {dict(cfg)!r}")
    rest = dict(to_builtin(cfg))
    return rest.pop("type"), rest


def add_scope(type_or_name: Any, scope: Any) -> Any:
    """Prefix a name with the ``_scope_`` of its config, unless it has a prefix.

    Raises:
        KeyError: If no registry has this scope.
    """
    if scope is None or scope == "":
        return type_or_name
    _check_scope(scope, ROOT_MODELS)
    return f"{scope}.{type_or_name}" if isinstance(type_or_name, str) and "." not in type_or_name else type_or_name


def check_kind(found: Any, given: Any, kind: str, base: type | tuple[type, ...] = nn.Module) -> None:
    """Raise TypeError if ``found``, which a config names as ``given``, is known not to be a class of a kind."""
    name = repr(given) if isinstance(given, str) else getattr(given, "__name__", repr(given))
    if not inspect.isclass(found):
        raise TypeError(f"`type` of a {kind} must name a class, got {name}, which is a {type(found).__name__}")
    if not issubclass(found, base):
        bases = " or ".join(item.__name__ for item in (base if isinstance(base, tuple) else (base,)))
        raise TypeError(f"`type` of a {kind} must be a class derived from {bases}, got {name}")
    known = next((known for known, classes in _KINDS.items() if issubclass(found, tuple(classes))), None)
    package = found.__module__.partition(".")[0]
    if kind == "plugin":
        wrong = known in _NEVER_PLUGINS
    elif kind == "backbone" and known is None:  # a host's, or a user's own
        wrong = package in ("torch", "mmengine", "mmcv") or (package in HOSTS and ".backbones" not in found.__module__)
    else:
        third_party = package != "torch" or (found is nn.Identity and kind in ("norm", "activation"))
        wrong = kind in _KINDS and known != kind and not (known is None and third_party)
    if wrong:
        raise TypeError(f"`type` of a {kind} must name a {kind}, got {name}" + (f", a {known}" if known else ""))


def is_ours(item: Any) -> bool:
    """Return whether this package defines a class, function or method, not a user or another library."""
    return str(item.__module__).partition(".")[0] == __name__.partition(".")[0]


def _find(name: str, kind: str, registry: Registry) -> Any:
    where = (
        "`print(resbackbone.MODELS)` lists what is registered; a module of yours is imported by --import or `imports`"
    )
    found = _look_up(name, registry)
    if found is None:
        import_plugins()
        found = _look_up(name, registry)
    if found is None and _import_mmcv():
        found = _look_up(name, registry)
    elif found is None:
        where += "; mmcv, which has more layers, is not installed: pip install 'resbackbone[mm]'"
    if found is None:
        known = {*registry.module_dict, *registry.root.module_dict}
        raise UnknownKeyError(f"unknown {kind} type {name!r}" + nearest(name, known, list_all=where))
    return found


def _look_up(name: str, registry: Registry) -> Any:
    found = look_up(name, registry)
    if found is None and (current := default_registry(registry)) is not None:
        found = look_up(name, current)
    return found


@functools.lru_cache(maxsize=1)
def _import_mmcv() -> bool:
    """Import the part of mmcv that registers layers without compiled operators; False if mmcv is not installed."""
    try:
        import mmcv.cnn  # noqa: F401
    except ImportError:
        return False
    return True


def _check_scope(scope: Any, registry: Registry) -> None:
    if not isinstance(scope, str) or find_scope(scope, registry) is None:
        raise UnknownKeyError(f"unknown scope {scope!r} in `_scope_`; a scope is that of a registry, such as 'mmdet'")


@contextmanager
def registered_types_only() -> Iterator[None]:
    """Restrict mmengine's registries to what :func:`resolve_type` finds, in this context and thread.

    Third-party layers look up nested configs themselves, by ``Registry.get``, which imports any dotted path.
    """
    _patch_mmengine()
    token = _restricted.set(True)
    try:
        yield
    finally:
        _restricted.reset(token)


def is_restricted() -> bool:
    """Return whether this runs within :func:`registered_types_only`."""
    return _restricted.get()


@functools.lru_cache(maxsize=1)
def _patch_mmengine() -> None:
    """Make the lookups of all registries obey :func:`registered_types_only`; outside of it they are unchanged."""
    get, switch = Registry.get, Registry.switch_scope_and_registry

    @functools.wraps(get)
    def restricted_get(self: Registry, key: str) -> Any:
        return _find_nested(key, self) if is_restricted() and isinstance(key, str) else get(self, key)

    @functools.wraps(switch)
    def restricted_switch(self: Registry, scope: str | None) -> Any:
        if scope is not None and is_restricted():
            _check_scope(scope, self)
        return switch(self, scope)

    Registry.get = restricted_get
    Registry.switch_scope_and_registry = restricted_switch


def _find_nested(name: str, registry: Registry) -> Any:
    found = _find(name, "layer", registry)
    if registry.root is ROOT_MODELS:
        check_kind(found, name, "layer")
    elif not is_registered(found, registry):
        raise UnknownKeyError(f"unknown type {name!r}; it is in no {registry.name} registry")
    return found
