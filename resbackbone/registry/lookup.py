"""Look up the objects that configs name, without importing anything that a config names.

Registered names are looked up in mmengine's registries. A dotted path may name a class of torch.nn, mmengine, mmcv, the
frameworks built on them, a module that the program has named (:func:`import_modules`), or any registered class.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from mmengine.registry import DefaultScope, Registry

from resbackbone.utils.validation import check_sequence, check_type, warn_user

HOSTS = ("mmdet", "mmseg", "mmpretrain")
# Packages in which dotted paths may name classes, as they do in configs dumped by mmengine.
PACKAGES = ("torch.nn", "mmengine", "mmcv", *HOSTS)
PLUGINS = "resbackbone.plugins"  # entry point group of modules that register types when they are imported
_imported: set[str] = set()


def allow_imported(custom_imports: Any) -> None:
    """Allow dotted paths into the modules that a program's ``custom_imports`` has imported."""
    names = (custom_imports or {}).get("imports", ()) if hasattr(custom_imports or {}, "get") else ()
    _imported.update(name for name in ([names] if isinstance(names, str) else names) if name in sys.modules)


def import_modules(names: Iterable[str]) -> None:
    """Import modules that register types, and allow dotted paths into them.

    Args:
        names: Importable modules, such as ``["my_variant"]``.

    Raises:
        TypeError: If ``names`` is not a list or tuple of strings.
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
    """Import, once, the modules that installed packages list in the entry point group ``resbackbone.plugins``."""
    for entry_point in importlib.metadata.entry_points(group=PLUGINS):
        try:
            entry_point.load()
        except Exception as error:  # third-party modules may raise anything
            warn_user(f"the plugin {entry_point.value!r} was not imported: {error!r}")
        else:
            _imported.add(entry_point.module)


def look_up(name: str, registry: Registry) -> Any:
    """Return the registered object of a name or the class at a dotted path; None if there is none.

    Args:
        name: A registered name, with or without a scope in front, or the dotted path of a class.
        registry: Searched with its parents.
    """
    found = _registered(name, registry)
    return _at_path(name, registry) if found is None and "." in name else found


def is_registered(item: object, registry: Registry) -> bool:
    """Return whether an object is registered, under any name, in a registry of the same tree."""
    return any(item is known for node in _tree(registry.root) for known in node.module_dict.values())


def default_registry(registry: Registry) -> Registry | None:
    """Return the registry of mmengine's default scope, such as mmdet's while one of its configs is built."""
    scope = DefaultScope.get_current_instance()
    return None if scope is None else find_scope(scope.scope_name, registry)


def find_scope(scope: str, registry: Registry) -> Registry | None:
    """Return the registry of a scope in the tree of ``registry``, importing it for :data:`HOSTS`; None if unknown."""
    if scope in HOSTS:
        _import(f"{scope}.registry")
    return next((found for found in _tree(registry.root) if found.scope == scope), None)


def _tree(registry: Registry) -> Iterator[Registry]:
    yield registry
    for child in registry.children.values():
        yield from _tree(child)


def _registered(name: str, registry: Registry) -> Any:
    """Follow the rules of ``Registry.get`` up to the point where it would import the name."""
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
    """Return the class at a dotted path if a config may name it."""
    if not all(part.isidentifier() and not part.startswith("__") for part in path.split(".")):
        return None
    package = next((name for name in (*PACKAGES, *_imported) if path.startswith(f"{name}.")), None)
    found = _walk(path, import_from=package)
    if found is None or _is_within(found.__module__, (*PACKAGES, *_imported)):
        return found
    return found if is_registered(found, registry) else None


def _walk(path: str, import_from: str | None) -> type | None:
    """Walk from module to submodule to class to nested class, without entering another package.

    Args:
        path: Identifiers joined by dots.
        import_from: Package whose modules may be imported; with None only loaded modules are searched.
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
        except Exception:  # an optional module with missing requirements
            return None
    return _loaded(name)


def _is_within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
