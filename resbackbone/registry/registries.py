"""The registries: ``MODELS`` and its like, children of mmengine's, and how a type name becomes a class.

mmengine finds this module by its path (``<scope>.registry``), which is how ``type="resbackbone.ResNet"`` works in any
OpenMMLab config without an import.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import activation, batchnorm, conv, loss

from resbackbone.utils.validation import UnknownKeyError, check_mapping, message_of, nearest, plain

try:
    from mmengine import registry as roots
    from mmengine.registry import MODELS as ROOT_MODELS
    from mmengine.registry import Registry, build_model_from_cfg
except ImportError as error:
    raise ImportError(
        "resbackbone needs mmengine, which comes in two distributions under one import name; install one of them: "
        "pip install 'resbackbone[mm]' (onedl-mmengine and onedl-mmcv, maintained) or "
        "pip install 'resbackbone[openmmlab]' (mmengine and mmcv-lite)"
    ) from error

from resbackbone.registry.lookup import (
    HOSTS,
    default_registry,
    find_scope,
    import_plugins,
    is_registered,
    is_restricted,
    look_up,
    registered_only,
    unknown_scope,
)

Built = TypeVar("Built")
Kind = TypeVar("Kind", bound=type)


def _build(cfg: Any, registry: Registry, default_args: Any = None) -> Any:
    """Build as mmengine does, but import no name, and answer an unknown one with its nearest match."""
    for one in cfg if isinstance(cfg, list) else [cfg]:
        given = [source for source in (one, default_args) if hasattr(source, "get")]
        type_, scope = (next((g.get(key) for g in given if g.get(key)), None) for key in ("type", "_scope_"))
        if type_ is not None:
            find_type(scoped(type_, scope))
    return construct(build_model_from_cfg, cfg, registry, default_args)


class _Models(Registry):  # type: ignore[misc]  # mmengine is not annotated
    """A registry whose ``get`` imports nothing that is not registered."""

    def get(self, key: str) -> Any:
        """Return what is registered under a name, or the class at a dotted path that a config may name; or None."""
        if not isinstance(key, str) or is_restricted():
            return super().get(key)
        found = look_up(key, self)
        if found is not None:
            _check_kind(found, key, "model", nn.Module)
        return found


MODELS = _Models(
    "model",
    parent=ROOT_MODELS,
    scope="resbackbone",
    locations=["resbackbone.layers", "resbackbone.backbones", "resbackbone.necks"],
    build_func=_build,
)

# One child for every registry of mmengine, as mmengine looks for one in each once a config says
# `default_scope = "resbackbone"`. What trains lies in them, and is imported when it is first asked for.
_CHILDREN = {
    name: Registry(
        root.name,
        parent=root,
        scope="resbackbone",
        locations=["resbackbone.training", "resbackbone.training.engine", "resbackbone.training.classification"],
    )
    for name, root in vars(roots).items()
    if isinstance(root, Registry) and root is not ROOT_MODELS
}
DATASETS = _CHILDREN["DATASETS"]
DATA_SAMPLERS = _CHILDREN["DATA_SAMPLERS"]
HOOKS = _CHILDREN["HOOKS"]
LOOPS = _CHILDREN["LOOPS"]
METRICS = _CHILDREN["METRICS"]
MODEL_WRAPPERS = _CHILDREN["MODEL_WRAPPERS"]
OPTIMIZERS = _CHILDREN["OPTIMIZERS"]
OPTIM_WRAPPER_CONSTRUCTORS = _CHILDREN["OPTIM_WRAPPER_CONSTRUCTORS"]
RUNNERS = _CHILDREN["RUNNERS"]
TRANSFORMS = _CHILDREN["TRANSFORMS"]


# The classes of each kind. What a class of another package is, only its author knows.
_KINDS: dict[str, list[type]] = {
    "norm": [batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm],
    "convolution": [conv._ConvNd],
    "activation": [getattr(activation, name) for name in activation.__all__ if name != "MultiheadAttention"],
    "loss": [loss._Loss],
}
_NEVER_PLUGINS = ("backbone", "neck", "classifier", "shared head", "loss")


def of_kind(kind: str) -> Callable[[Kind], Kind]:
    """Decorate a class to say what it and those derived from it are, such as "norm"."""

    def note(cls: Kind) -> Kind:
        _KINDS.setdefault(kind, []).append(cls)
        return cls

    return note


def find_type(
    type_or_name: Any, what: str = "model", *, registry: Registry = MODELS, base: type | tuple[type, ...] = nn.Module
) -> Any:
    """Find the class behind a config's ``type``; only :mod:`resbackbone.registry.lookup` imports anything.

    Names are looked up here, then in mmengine's root, then in the registry of the current default scope (where an
    mmdet or mmseg user registered a layer of their own), in installed plugins, and last in mmcv, which is imported only
    now.

    Args:
        type_or_name: A class; or a registered name, with or without a scope prefix; or the dotted path of a class.
        what: What kind of thing is wanted: "backbone", "norm", "convolution", "activation", "plugin" or "loss", or a
            word for the error.
        registry: Where names are looked up.
        base: What the class must be derived from.

    Returns:
        The class.

    Raises:
        TypeError: If it is neither a class nor a string, or the class is none of this kind.
        KeyError: If nothing of that name is registered.
    """
    if isinstance(type_or_name, str):
        found = _find_name(type_or_name, what, registry)
    elif inspect.isclass(type_or_name):
        found = type_or_name
    else:
        raise TypeError(
            f"`type` of a {what} must be a registered name or a class, "
            f"got {type_or_name!r} of type {type(type_or_name).__name__}"
        )
    _check_kind(found, type_or_name, what, base)
    return found


def find_initializer(type_or_name: Any, scope: Any = None) -> Any:
    """Find the class behind an initializer's ``type``, in ``init_cfg`` and ``override``.

    Args:
        type_or_name: A class; or a name that mmengine or a user registered, or the dotted path of such a class.
        scope: Its ``_scope_``.

    Returns:
        The class.

    Raises:
        TypeError: If it is neither a class nor a string, or no initializer.
        KeyError: If nothing of that name is registered.
    """
    from mmengine.model import BaseInit, PretrainedInit

    registry = roots.WEIGHT_INITIALIZERS
    if type_or_name in ("PretrainedInit", "mmengine.PretrainedInit"):
        type_or_name = PretrainedInit
    found = find_type(scoped(type_or_name, scope), "initializer", registry=registry, base=object)
    known = issubclass(found, (BaseInit, PretrainedInit)) or is_registered(found, registry)
    called = any("__call__" in vars(base) for base in found.__mro__)
    if not known and (isinstance(type_or_name, str) or not called):
        raise TypeError(f"`type` of an initializer must name one, got {type_or_name!r}, which is none")
    return found


def scoped(type_or_name: Any, scope: Any) -> Any:
    """Return a name with its config's ``_scope_`` in front, where that has one and the name has none.

    Raises:
        KeyError: If no registry has this scope.
    """
    if scope is None or scope == "":
        return type_or_name
    if not isinstance(scope, str) or find_scope(scope, MODELS) is None:
        raise unknown_scope(scope)
    return f"{scope}.{type_or_name}" if isinstance(type_or_name, str) and "." not in type_or_name else type_or_name


def construct(builder: Callable[..., Built], *args: Any, **kwargs: Any) -> Built:
    """Call a class with arguments from a config, and hold it to :func:`find_type` for the configs inside them.

    Raises:
        TypeError: If one of them names anything but a class of layers, or as an initializer what is none.
        KeyError: If one of them names what is not registered.
    """
    # Upwards, and so only when it is called: what a config builds may be initialized from a checkpoint.
    from resbackbone.layers.initialization import guard, read_safely

    _check_inner_types([args, kwargs])
    if "mmengine.runner.checkpoint" in sys.modules:  # importing it takes long; who calls it here, has done so
        read_safely()
    with registered_types():
        built = builder(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})
    guard(built)
    return built


def registered_types() -> AbstractContextManager[None]:
    """Let mmengine's registries find only what :func:`find_type` would, in a ``with`` statement."""
    return registered_only(_find_inner)


def check_initializers(init_cfg: Any) -> None:
    """Raise unless every ``type`` in an ``init_cfg``, and in its overrides, names an initializer.

    Raises:
        KeyError: If one is missing or unknown.
        TypeError: If one is no initializer, or an entry is no dict.
    """
    for cfg in [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg:
        type_, rest = split_type(cfg, "init_cfg")
        overrides = rest.pop("override", None) or ()
        named = [one for one in ([overrides] if isinstance(overrides, Mapping) else overrides) if "type" in one]
        for one in [{**rest, "type": type_}, *named]:
            try:
                find_initializer(one["type"], one.get("_scope_"))
            except (KeyError, TypeError) as error:
                raise type(error)(f"`init_cfg`: {message_of(error)}") from error


def _find_inner(name: str, registry: Registry) -> Any:
    found = _find_name(name, "layer", registry)
    if registry.root is ROOT_MODELS:
        _check_kind(found, name, "layer", nn.Module)
    elif not is_registered(found, registry):
        raise UnknownKeyError(f"unknown type {name!r}; it is in no {registry.name} registry")
    return found


def _check_inner_types(value: Any) -> None:
    """Raise TypeError where a dict inside has a ``type`` that is neither a name nor a class of layers."""
    if isinstance(value, Mapping):
        if "type" in value and callable(value["type"]):
            _check_kind(value["type"], value["type"], "layer", nn.Module)
        for key, item in value.items():
            if key != "init_cfg":
                _check_inner_types(item)
            elif item and isinstance(item, (Mapping, list, tuple)):
                check_initializers(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_inner_types(item)


def _find_name(name: str, what: str, registry: Registry) -> Any:
    found = _look_up(name, registry)
    where = (
        "`print(resbackbone.MODELS)` lists what is registered; a module of yours is imported by --import or `imports`"
    )
    if found is None:
        import_plugins()
        found = _look_up(name, registry)
    if found is None and _import_mmcv():
        found = _look_up(name, registry)
    elif found is None:
        where += "; mmcv, which has more layers, is not installed: pip install 'resbackbone[mm]'"
    if found is None:
        raise UnknownKeyError(f"unknown {what} type {name!r}" + nearest(name, _known_names(registry), list_all=where))
    return found


def _check_kind(found: Any, given: Any, what: str, base: type | tuple[type, ...]) -> None:
    """Raise TypeError unless ``found`` is a class of the kind ``what``, as far as can be said."""
    name = repr(given) if isinstance(given, str) else getattr(given, "__name__", repr(given))
    if not inspect.isclass(found):
        raise TypeError(f"`type` of a {what} must name a class, got {name}, which is a {type(found).__name__}")
    if not issubclass(found, base):
        bases = " or ".join(item.__name__ for item in (base if isinstance(base, tuple) else (base,)))
        raise TypeError(f"`type` of a {what} must be a class derived from {bases}, got {name}")
    kind = next((kind for kind, classes in _KINDS.items() if issubclass(found, tuple(classes))), None)
    if what == "plugin":
        wrong = kind in _NEVER_PLUGINS
    elif what == "backbone" and kind is None:
        wrong = not _may_be_backbone(found.__module__)
    elif what in _KINDS:
        foreign = not found.__module__.startswith("torch.") or (found is nn.Identity and what in ("norm", "activation"))
        wrong = kind != what and not (kind is None and foreign)
    else:
        wrong = False
    if wrong:
        raise TypeError(f"`type` of a {what} must name a {what}, got {name}" + (f", a {kind}" if kind else ""))


def split_type(cfg: Any, argument: str) -> tuple[Any, dict[str, Any]]:
    """Split a layer config into its type and a new dict of the other entries.

    Raises:
        TypeError: If it is no dict.
        KeyError: If it has no ``type``.
    """
    check_mapping(argument, cfg, optional=False)
    if "type" not in cfg:
        raise UnknownKeyError(f"`{argument}` needs a `type`, got {dict(cfg)!r}")
    rest = dict(plain(cfg))
    return rest.pop("type"), rest


def _may_be_backbone(module: str) -> bool:
    """Whether a class of this module can be a backbone: one of a host's, or of somebody else's own."""
    package = module.partition(".")[0]
    return package not in ("torch", "mmengine", "mmcv") and (package not in HOSTS or ".backbones" in module)


def _known_names(registry: Registry) -> set[str]:
    return {*registry.module_dict, *registry.root.module_dict}


def is_ours(thing: Any) -> bool:
    """Return whether a class, function or method is defined in this package, and not by a user or another library."""
    return str(thing.__module__).partition(".")[0] == __name__.partition(".")[0]


def _look_up(name: str, registry: Registry) -> Any:
    found = look_up(name, registry)
    if found is None and (current := default_registry(registry)) is not None:
        found = look_up(name, current)
    return found


@functools.lru_cache(maxsize=1)
def _import_mmcv() -> bool:
    """Import the part of mmcv that registers layers without compiled operators; False where there is no mmcv."""
    try:
        import mmcv.cnn  # noqa: F401
    except ImportError:
        return False
    return True
