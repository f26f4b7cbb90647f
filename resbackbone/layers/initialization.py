"""Weight initialization by ``init_cfg``: initializers are looked up as every type is, checkpoints are read safely.

An ``init_cfg`` may name a checkpoint, so this module imports :mod:`resbackbone.checkpoints.loading`, which lies above
the layers, inside the two functions that read one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial, wraps
from typing import Any

from torch import nn

from resbackbone.layers.init_cfg import check_pretrained, loads_checkpoint
from resbackbone.registry import check_initializers, find_initializer, registered_types, split_type
from resbackbone.registry.lookup import is_restricted
from resbackbone.utils.validation import check_mapping, check_type

Step = Callable[[], object]


def initialize(module: nn.Module, init_weights: Callable[[], None]) -> None:
    """Run mmengine's ``init_weights`` of a module, with every ``init_cfg`` in it, of foreign layers too, made safe.

    mmengine imports whatever ``type`` names, and its loader may run what a file holds and load a part of it in silence.
    Here initializers are those that :func:`~resbackbone.registry.find_initializer` finds, and checkpoints, whatever
    they are called by, are loaded at the end, inner modules first, all of each or none.

    Args:
        module: It has an ``init_cfg``; done once, it is not initialized again.
        init_weights: mmengine's method, bound to it.

    Raises:
        FileNotFoundError, OSError: If a checkpoint is not to be had.
        KeyError: If an initializer is unknown.
        TypeError, ValueError: If an ``init_cfg`` is not as it must be, or a checkpoint does not fit.
    """
    if getattr(module, "is_init", False):
        init_weights()
        return
    given: list[tuple[Any, Any]] = []
    loading: list[tuple[nn.Module, Step]] = []
    try:
        for part in reversed(list(module.modules())):
            init_cfg = vars(part).get("init_cfg")
            guarded = part is not module and "init_weights" in vars(part)  # and does the same for itself
            if init_cfg and not guarded and not getattr(part, "is_init", False):
                others, steps = _plan(part, init_cfg)
                given.append((part, init_cfg))
                part.init_cfg = others or None  # type: ignore[assignment]
                loading += [(part, step) for step in steps]
        if any(_is_foreign(part) for part in module.modules()):
            read_safely()
        with registered_types():
            init_weights()
    finally:
        for part, init_cfg in given:
            part.init_cfg = init_cfg
    for part, step in loading:
        # mmengine passes over what lies in modules that are not its own.
        if part is module or getattr(part, "is_init", True):
            step()


def guard(built: object) -> None:
    """Make ``init_weights()`` of every foreign module that was built safe, whoever calls it, as :func:`initialize` is.

    Args:
        built: A module of any class; modules without an ``init_cfg`` stay as they are, and so do other objects.

    Raises:
        KeyError, TypeError: If an ``init_cfg`` names what is no initializer.
    """
    for part in built.modules() if isinstance(built, nn.Module) else ():
        init_cfg = vars(part).get("init_cfg")
        if init_cfg and _is_foreign(part):
            check_initializers(init_cfg)
            part.init_weights = partial(_initialize_foreign, part)  # type: ignore[assignment]


def _is_foreign(module: nn.Module) -> bool:
    """Return whether a module has an ``init_weights()`` that is not ours."""
    method = getattr(type(module), "init_weights", None)
    return callable(method) and not method.__module__.startswith("resbackbone.")


def _initialize_foreign(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    method: Any = type(module).init_weights  # type: ignore[attr-defined]
    initialize(module, partial(method, module, *args, **kwargs))


@lru_cache(maxsize=1)
def read_safely() -> None:
    """Let mmengine's reading of checkpoints, which foreign classes call, be ours where registered types alone count."""
    from mmengine.runner.checkpoint import CheckpointLoader

    read = CheckpointLoader.load_checkpoint

    @wraps(read)
    def read_as_ours(filename: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_restricted():
            return read(filename, *args, **kwargs)
        from resbackbone.checkpoints.loading import read_content

        return read_content(filename)

    CheckpointLoader.load_checkpoint = staticmethod(read_as_ours)


def _plan(module: nn.Module, init_cfg: Any) -> tuple[list[dict[str, Any]], list[Step]]:
    """Return the initializers for mmengine, with classes for names, and what is to be done after them."""
    check_type("init_cfg", init_cfg, (Mapping, list, tuple), "a dict, a list of dicts or None")
    others: list[dict[str, Any]] = []
    steps: list[Step] = []
    for cfg in [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg:
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
                kept.append({**override, "name": override["name"]})
        if not loads:
            others.append({**resolved, **({"override": kept} if kept else {})})
    return others, steps


def _overrides(module: nn.Module, overrides: Any, cfg: dict[str, Any]) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    for override in [overrides] if isinstance(overrides, Mapping) else overrides or ():
        check_mapping("override", override, optional=False)
        name = override.get("name")
        target = getattr(module, name, None) if isinstance(name, str) else None
        if not isinstance(target, nn.Module):
            raise ValueError(f"`override` needs the `name` of a layer of {type(module).__name__}, got {name!r}")
        yield ({**cfg, "name": name} if len(override) == 1 else _resolve(override, "override")), target


def _resolve(cfg: Any, argument: str) -> dict[str, Any]:
    type_, rest = split_type(cfg, argument)
    return {"type": find_initializer(type_, rest.pop("_scope_", None)), **copy.deepcopy(rest)}


def _run(module: nn.Module, cfg: dict[str, Any]) -> None:
    """Initialize a whole module, whose ``name`` stands in the config."""
    arguments = {key: value for key, value in cfg.items() if key != "name"}
    if loads_checkpoint(arguments["type"]):
        _load(module, arguments)
        return
    initializer = arguments.pop("type")(**arguments)
    initializer.wholemodule = True
    initializer(module)


def _load(module: nn.Module, cfg: dict[str, Any]) -> None:
    check_pretrained({key: value for key, value in cfg.items() if key != "type"}, "init_cfg")
    from resbackbone.checkpoints.loading import load_pretrained

    load_pretrained(module, cfg["checkpoint"], prefix=cfg.get("prefix"))
