"""The registries: ``MODELS`` and its siblings, children of mmengine's, and how configs are built safely."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mmengine import registry as mmengine_registries
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry, build_model_from_cfg

from resbackbone.registry.init_cfg import check_initializer_types
from resbackbone.registry.initialization import load_safely, make_initialization_safe
from resbackbone.registry.lookup import look_up
from resbackbone.registry.types import add_scope, check_kind, is_restricted, registered_types_only, resolve_type
from resbackbone.utils.validation import to_builtin

Built = TypeVar("Built")


def construct(builder: Callable[..., Built], *args: Any, **kwargs: Any) -> Built:
    """Call a class with arguments from a config; configs nested in them are restricted as in :func:`resolve_type`.

    Raises:
        TypeError: If a nested ``type`` is not a layer, or that of an ``init_cfg`` not an initializer.
        KeyError: If a nested ``type`` is not registered.
    """
    _check_nested_types([args, kwargs])
    if "mmengine.runner.checkpoint" in sys.modules:  # slow to import; a constructor that reads checkpoints imported it
        load_safely()
    with registered_types_only():
        built = builder(*map(to_builtin, args), **{name: to_builtin(value) for name, value in kwargs.items()})
    make_initialization_safe(built)
    return built


def _check_nested_types(value: Any) -> None:
    """Raise where a nested config has a class for its ``type`` that is not a layer, or a wrong ``init_cfg``."""
    if isinstance(value, Mapping):
        if "type" in value and callable(value["type"]):
            check_kind(value["type"], value["type"], "layer")
        for key, item in value.items():
            if key != "init_cfg":
                _check_nested_types(item)
            elif item and isinstance(item, (Mapping, list, tuple)):
                check_initializer_types(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_nested_types(item)


def _build(cfg: Any, registry: Registry, default_args: Any = None) -> Any:
    """Build as mmengine does, but import no name, and suggest the nearest match for an unknown one."""
    for one in cfg if isinstance(cfg, list) else [cfg]:
        given = [source for source in (one, default_args) if hasattr(source, "get")]
        type_, scope = (next((g.get(key) for g in given if g.get(key)), None) for key in ("type", "_scope_"))
        if type_ is not None:
            resolve_type(add_scope(type_, scope))
    return construct(build_model_from_cfg, cfg, registry, default_args)


class _Models(Registry):  # type: ignore[misc]  # mmengine is not annotated
    """A registry whose ``get`` imports no unregistered names."""

    def get(self, key: str) -> Any:
        """Return the registered object of a name, or the class at a dotted path that a config may name; or None."""
        if not isinstance(key, str) or is_restricted():
            return super().get(key)
        found = look_up(key, self)
        if found is not None:
            check_kind(found, key, "model")
        return found


MODELS = _Models(
    "model",
    parent=ROOT_MODELS,
    scope="resbackbone",
    locations=["resbackbone.layers", "resbackbone.backbones", "resbackbone.necks"],
    build_func=_build,
)

# One child of every mmengine registry, since mmengine looks for one in each with `default_scope = "resbackbone"`.
_CHILDREN = {
    name: Registry(
        root.name,
        parent=root,
        scope="resbackbone",
        locations=["resbackbone.training", "resbackbone.training.engine", "resbackbone.training.classification"],
    )
    for name, root in vars(mmengine_registries).items()
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
