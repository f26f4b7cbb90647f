"""The registries: ``MODELS`` and its like, children of mmengine's, and how a type name becomes a class.

mmengine finds this module by its path (``<scope>.registry``), which is how ``type="resbackbone.ResNet"`` works in any
OpenMMLab config without an import.
"""

from __future__ import annotations

import inspect
from typing import Any

from resbackbone.checks import check_mapping, nearest

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


def _build(cfg: Any, registry: Registry, default_args: Any = None) -> Any:
    """Build as mmengine does, but answer an unknown type with its nearest match."""
    type_name = cfg.get("type") if hasattr(cfg, "get") else None
    if isinstance(type_name, str):
        find_type(type_name)
    return build_model_from_cfg(cfg, registry, default_args)


MODELS = Registry(
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
        locations=["resbackbone.training", "resbackbone.training.running", "resbackbone.training.classification"],
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


def find_type(type_or_name: Any, what: str = "model") -> Any:
    """Find the class behind a config's ``type``.

    Names are looked up here, then in mmengine's root, then in the registry of the current default scope (where an
    mmdet or mmseg user registered a layer of their own), and last in mmcv, which is imported only now.

    Args:
        type_or_name: A class, returned as it is, or a registered name, with or without a scope prefix.
        what: What kind of thing is wanted, for the error.

    Returns:
        The class.

    Raises:
        TypeError: If it is neither a class nor a string.
        KeyError: If nothing of that name is registered.
    """
    if inspect.isclass(type_or_name) or callable(type_or_name):
        return type_or_name
    if not isinstance(type_or_name, str):
        raise TypeError(
            f"`type` of a {what} must be a registered name or a class, "
            f"got {type_or_name!r} of type {type(type_or_name).__name__}"
        )
    found = _look_up(type_or_name)
    where = "`print(resbackbone.MODELS)` lists what is registered"
    if found is None and _import_mmcv():
        found = _look_up(type_or_name)
    elif found is None:
        where += "; mmcv, which has more layers, is not installed: pip install 'resbackbone[mm]'"
    if found is None:
        raise KeyError(f"unknown {what} type {type_or_name!r}" + nearest(type_or_name, _known_names(), list_all=where))
    return found


def split_type(cfg: Any, argument: str) -> tuple[Any, dict[str, Any]]:
    """Split a layer config into its type and a new dict of the other entries.

    Raises:
        TypeError: If it is no dict.
        KeyError: If it has no ``type``.
    """
    check_mapping(argument, cfg, optional=False)
    if "type" not in cfg:
        raise KeyError(f"`{argument}` needs a `type`, got {dict(cfg)!r}")
    rest = dict(cfg)
    return rest.pop("type"), rest


def _known_names() -> set[str]:
    return {*MODELS.module_dict, *ROOT_MODELS.module_dict}


def _look_up(name: str) -> Any:
    try:
        found = MODELS.get(name)
    except RuntimeError:  # how mmengine answers a name that looks like a module path and is none
        found = None
    if found is None:
        with MODELS.switch_scope_and_registry(None) as current:
            if current is not MODELS:
                found = current.get(name)
    return found


def _import_mmcv() -> bool:
    """Import the part of mmcv that registers layers without compiled operators; False where there is no mmcv."""
    try:
        import mmcv.cnn  # noqa: F401
    except ImportError:
        return False
    return True
