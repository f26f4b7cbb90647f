"""Look up the object behind a type name of a config, without importing what a config names.

A registered name is found in the registries of mmengine. A dotted path is found in torch.nn, mmengine, mmcv and the
frameworks built on them, in modules that whoever runs the program named (:func:`import_modules`), or where it is that
of a registered class. Nothing else is imported, whatever a config says.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from mmengine.registry import DefaultScope, Registry

from resbackbone.utils.validation import UnknownKeyError, check_sequence, check_type, warn_user

HOSTS = ("mmdet", "mmseg", "mmpretrain")
# A dotted path may name a class of these, as the configs do that mmengine dumps.
PACKAGES = ("torch.nn", "mmengine", "mmcv", *HOSTS)
PLUGINS = "resbackbone.plugins"  # an entry point group: modules that register types when they are imported
_imported: set[str] = set()


def allow_imported(custom_imports: Any) -> None:
    """Let configs name classes in the modules that a program's ``custom_imports`` has imported."""
    names = (custom_imports or {}).get("imports", ()) if hasattr(custom_imports or {}, "get") else ()
    _imported.update(name for name in ([names] if isinstance(names, str) else names) if name in sys.modules)


def import_modules(names: Iterable[str]) -> None:
    """Import modules that register types, and let configs name classes in them by dotted paths.

    Args:
        names: Of modules that can be imported, such as ``["my_variant"]``.

    Raises:
        TypeError: If they are not given as a list or tuple of names.
        ImportError: If one cannot be imported.
    """
    for name in check_sequence("imports", names):
        check_type("imports", name, str, 'a list of module names, such as ["my_variant"]')
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"`imports` names the module {name!r}, which cannot be imported: {error}; is its folder on PYTHONPATH?"
            ) from error
        _imported.add(name)


@functools.lru_cache(maxsize=1)
def import_plugins() -> None:
    """Import, once, what installed packages offer as entry points of the group ``resbackbone.plugins``."""
    for entry_point in importlib.metadata.entry_points(group=PLUGINS):
        try:
            entry_point.load()
        except Exception as error:  # whatever somebody's module raises
            warn_user(f"the plugin {entry_point.value!r} was left out: {error!r}")
        else:
            _imported.add(entry_point.module)


def look_up(name: str, registry: Registry) -> Any:
    """Find what is registered under a name or stands at a dotted path; None where that is nothing.

    Args:
        name: A registered name, with or without a scope in front, or the dotted path of a class.
        registry: Where to look, and in its parents.
    """
    found = _registered(name, registry)
    return _at_path(name, registry) if found is None and "." in name else found


def is_registered(item: object, registry: Registry) -> bool:
    """Return whether something is registered, under whatever name, in a registry or in one related to it."""
    return any(item is known for node in _tree(registry.root) for known in node.module_dict.values())


def default_registry(registry: Registry) -> Registry | None:
    """Return the registry of the current default scope, such as mmdet's while one of its configs is built."""
    scope = DefaultScope.get_current_instance()
    return None if scope is None else find_scope(scope.scope_name, registry)


def unknown_scope(scope: object) -> UnknownKeyError:
    """Return the error for a scope that no registry has."""
    return UnknownKeyError(f"unknown scope {scope!r} in `_scope_`; a scope is that of a registry, such as 'mmdet'")


def find_scope(scope: str, registry: Registry) -> Registry | None:
    """Find the registry of a scope in the tree of ``registry``; those of :data:`HOSTS` are imported."""
    if scope in HOSTS:
        _import(f"{scope}.registry")
    return next((found for found in _tree(registry.root) if found.scope == scope), None)


def _tree(registry: Registry) -> Iterator[Registry]:
    yield registry
    for child in registry.children.values():
        yield from _tree(child)


def _registered(name: str, registry: Registry) -> Any:
    """Follow the rules of ``Registry.get`` up to where it would import the name."""
    registry.import_from_location()
    scope, dot, rest = name.partition(".")
    if dot:
        if scope == registry.scope:
            return registry.module_dict.get(rest)
        other = find_scope(scope, registry)
        return None if other is None else _registered(rest, other)
    above: Registry | None = registry
    while above is not None:
        if name in above.module_dict:
            return above.module_dict[name]
        above = above.parent
    return None


def _at_path(path: str, registry: Registry) -> Any:
    """Find the class at a dotted path, if it is one that a config may name."""
    if not all(part.isidentifier() and not part.startswith("__") for part in path.split(".")):
        return None
    package = next((name for name in (*PACKAGES, *_imported) if path.startswith(f"{name}.")), None)
    found = _walk(path, import_from=package)
    if found is None or _is_within(found.__module__, (*PACKAGES, *_imported)):
        return found
    return found if is_registered(found, registry) else None


def _walk(path: str, import_from: str | None) -> type | None:
    """Go from module to submodule, then to a class and those inside it; never from one package to another.

    Args:
        path: Identifiers with dots between them.
        import_from: The package whose modules may be imported; modules of others are found only where they are loaded.
    """
    start = import_from or path.partition(".")[0]
    module = _import(start) if import_from else _loaded(start)
    parts = iter(path[len(start) + 1 :].split("."))
    for part in parts:
        if module is None:
            return None
        found = vars(module).get(part)
        if inspect.isclass(found):
            for inner in parts:
                found = vars(found).get(inner)
                if not inspect.isclass(found):
                    return None
            return found
        name = f"{module.__name__}.{part}"
        module = _import(name) if import_from else _loaded(name)
    return None


def _loaded(name: str) -> ModuleType | None:
    module = sys.modules.get(name)
    return module if module is not None and module.__name__ == name else None


def _import(name: str) -> ModuleType | None:
    if _loaded(name) is None:
        try:
            if importlib.util.find_spec(name) is None:
                return None
            importlib.import_module(name)
        except Exception:  # an optional part of a package whose requirements are missing
            return None
    return _loaded(name)


def _is_within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


_find: ContextVar[Callable[[str, Registry], Any] | None] = ContextVar("resbackbone_find", default=None)


@contextmanager
def registered_only(find: Callable[[str, Registry], Any]) -> Iterator[None]:
    """Let mmengine's registries find only what we would, as long as this lasts and in this thread.

    Layers of mmcv and of others look up the configs inside theirs themselves, with ``Registry.get``, which imports any
    dotted path.

    Args:
        find: Finds the class behind a name, or raises.
    """
    _install()
    token = _find.set(find)
    try:
        yield
    finally:
        _find.reset(token)


def is_restricted() -> bool:
    """Return whether this runs within :func:`registered_only`."""
    return _find.get() is not None


@functools.lru_cache(maxsize=1)
def _install() -> None:
    """Make the lookups of all registries heed :func:`registered_only`; elsewhere they do what they did."""
    get, switch = Registry.get, Registry.switch_scope_and_registry

    @functools.wraps(get)
    def safe_get(self: Registry, key: str) -> Any:
        find = _find.get()
        return get(self, key) if find is None or not isinstance(key, str) else find(key, self)

    @functools.wraps(switch)
    def safe_switch(self: Registry, scope: str | None) -> Any:
        if scope is not None and _find.get() is not None and find_scope(scope, self) is None:
            raise unknown_scope(scope)
        return switch(self, scope)

    Registry.get = safe_get
    Registry.switch_scope_and_registry = safe_switch
