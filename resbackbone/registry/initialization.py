"""Initialization by ``init_cfg`` as in mmengine, but without importing unregistered names, and with safe loading."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial, wraps
from types import ModuleType
from typing import Any

from torch import nn

from resbackbone.registry.init_cfg import (
    as_list,
    check_initializer_types,
    check_pretrained,
    loads_checkpoint,
    resolve_initializer,
)
from resbackbone.registry.types import is_ours, is_restricted, registered_types_only, split_type
from resbackbone.utils.validation import check_mapping, check_type

Step = Callable[[], object]


def initialize(module: nn.Module, init_weights: Callable[[], None]) -> None:
    """Run mmengine's ``init_weights`` of a module, with the ``init_cfg`` of all its submodules made safe.

    mmengine imports what ``type`` names, its checkpoint loader may run code in a file, and ignores missing keys. Here
    initializers are resolved by :func:`~resbackbone.registry.init_cfg.resolve_initializer`, and checkpoints are loaded
    by :mod:`resbackbone.checkpoints`, each completely or not at all, after all other initializers, inner modules first.

    Args:
        module: A module with an ``init_cfg``; if it has been initialized, it stays as it is.
        init_weights: mmengine's method, bound to it.

    Raises:
        FileNotFoundError, OSError: If a checkpoint cannot be read or downloaded.
        KeyError: If an initializer is unknown.
        TypeError, ValueError: If an ``init_cfg`` is invalid, or a checkpoint does not fit.
    """
    if getattr(module, "is_init", False):
        init_weights()
        return
    replaced: list[tuple[Any, Any]] = []
    loads: list[tuple[nn.Module, Step]] = []
    try:
        for part in reversed(list(module.modules())):
            init_cfg = vars(part).get("init_cfg")
            is_safe = part is not module and "init_weights" in vars(part)  # by `make_initialization_safe`
            if init_cfg and not is_safe and not getattr(part, "is_init", False):
                initializers, steps = _plan(part, init_cfg)
                replaced.append((part, init_cfg))
                part.init_cfg = initializers or None  # type: ignore[assignment]
                loads += [(part, step) for step in steps]
        if any(_is_third_party(part) for part in module.modules()):
            load_safely()
        with registered_types_only():
            init_weights()
    finally:
        for part, init_cfg in replaced:
            part.init_cfg = init_cfg
    for part, step in loads:
        # mmengine skips the children of modules that do not follow its protocol.
        if part is module or getattr(part, "is_init", True):
            step()


def make_initialization_safe(built: object) -> None:
    """Make ``init_weights()`` of third-party modules run :func:`initialize` for every caller.

    Args:
        built: An object built from a config; without modules that have an ``init_cfg`` it is left unchanged.

    Raises:
        KeyError, TypeError: If a ``type`` in an ``init_cfg`` is not an initializer.
    """
    for part in built.modules() if isinstance(built, nn.Module) else ():
        init_cfg = vars(part).get("init_cfg")
        if init_cfg and _is_third_party(part):
            check_initializer_types(init_cfg)
            part.init_weights = partial(_initialize_third_party, part)  # type: ignore[assignment]


def _is_third_party(module: nn.Module) -> bool:
    """Return whether a module has an ``init_weights()`` that this package does not define."""
    method = getattr(type(module), "init_weights", None)
    return callable(method) and not is_ours(method)


def _initialize_third_party(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    method: Any = type(module).init_weights  # type: ignore[attr-defined]
    initialize(module, partial(method, module, *args, **kwargs))


@lru_cache(maxsize=1)
def load_safely() -> None:
    """Make mmengine's checkpoint loader, which third-party classes call, ours within ``registered_types_only()``."""
    from mmengine.runner.checkpoint import CheckpointLoader

    load = CheckpointLoader.load_checkpoint

    @wraps(load)
    def load_checkpoint(filename: Any, *args: Any, **kwargs: Any) -> Any:
        return _checkpoints().read_checkpoint(filename) if is_restricted() else load(filename, *args, **kwargs)

    CheckpointLoader.load_checkpoint = staticmethod(load_checkpoint)


def _checkpoints() -> ModuleType:
    """Import the room that loads checkpoints, from above, since an ``init_cfg`` may name a checkpoint."""
    from resbackbone import checkpoints

    return checkpoints


def _plan(module: nn.Module, init_cfg: Any) -> tuple[list[dict[str, Any]], list[Step]]:
    """Return the initializers for mmengine, their types resolved, and the steps to run after them."""
    check_type("init_cfg", init_cfg, (Mapping, list, tuple), "a dict, a list of dicts or None")
    initializers: list[dict[str, Any]] = []
    steps: list[Step] = []
    for cfg in as_list(init_cfg):
        resolved = _resolve(cfg, "init_cfg")
        overrides = resolved.pop("override", None)
        loads = loads_checkpoint(resolved["type"])
        if loads:
            steps.append(partial(_load, module, resolved))
        kept = []
        for override, target in _overrides(module, overrides, resolved):
            if loads or loads_checkpoint(override["type"]):
                steps.append(partial(_run, target, override))
            else:
                kept.append(override)
        if not loads:
            initializers.append({**resolved, **({"override": kept} if kept else {})})
    return initializers, steps


def _overrides(module: nn.Module, overrides: Any, cfg: dict[str, Any]) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    for override in as_list(overrides):
        check_mapping("override", override, optional=False)
        name = override.get("name")
        target = getattr(module, name, None) if isinstance(name, str) else None
        if not isinstance(target, nn.Module):
            raise ValueError(f"`override` needs the `name` of a layer of {type(module).__name__}, got {name!r}")
        yield ({**cfg, "name": name} if len(override) == 1 else _resolve(override, "override")), target


def _resolve(cfg: Any, argument: str) -> dict[str, Any]:
    type_, rest = split_type(cfg, argument)
    return {"type": resolve_initializer(type_, rest.pop("_scope_", None)), **copy.deepcopy(rest)}


def _run(module: nn.Module, cfg: dict[str, Any]) -> None:
    """Initialize a whole module by the config of an override, which has its ``name``."""
    arguments = {key: value for key, value in cfg.items() if key != "name"}
    if loads_checkpoint(arguments["type"]):
        _load(module, arguments)
        return
    initializer = arguments.pop("type")(**arguments)
    initializer.wholemodule = True
    initializer(module)


def _load(module: nn.Module, cfg: dict[str, Any]) -> None:
    check_pretrained({key: value for key, value in cfg.items() if key != "type"}, "init_cfg")
    _checkpoints().load_pretrained(module, cfg["checkpoint"], prefix=cfg.get("prefix"))
