"""Load and validate configs (a name, a file or a dict) and build backbones from them."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from resbackbone.backbones import Backbone
from resbackbone.config.upstream_names import argument_hint, find_architecture, names_weights, nearest_architecture
from resbackbone.layers.arguments import parameters_of
from resbackbone.registry import MODELS, add_scope, construct, resolve_type, split_type
from resbackbone.registry.initialization import initialize
from resbackbone.registry.lookup import allow_imported, import_modules
from resbackbone.registry.types import is_restricted
from resbackbone.utils.validation import (
    UnknownKeyError,
    check_flag,
    check_sequence,
    check_type,
    convert_argument,
    message_of,
    to_builtin,
    warn_user,
)

_SUFFIXES = (".yaml", ".yml", ".py")  # of config files
_MAX_ENTRIES = 100_000  # in a YAML file, whose aliases could expand to billions
BackboneSource = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class BackboneConfig:
    """The config of a backbone, and the other content of its file.

    Attributes:
        backbone: ``type`` and constructor arguments.
        about: The other entries of a YAML file, such as ``source``, the paper.
    """

    backbone: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)


def build_backbone(
    config: BackboneSource,
    *,
    checkpoint: str | Path | None = None,
    imports: Sequence[str] = (),
    **overrides: Any,
) -> Backbone:
    """Build a backbone and initialize its weights.

    Args:
        config: A name that :func:`list_backbones` returns, or that of timm, torchvision, the catalog or the Hugging
            Face hub ("resnet50d", "regnet_y_3_2gf", "microsoft/resnet-50"); a path to a .yaml or .py file; or a dict
            with ``type`` and the constructor's arguments. It is not changed.
        checkpoint: Weights to load after the initialization: a file, a URL or a name, as for
            :func:`resbackbone.checkpoints.load_checkpoint`.
        imports: Your modules that register types of the config, such as ``["my_variant"]``. The config itself cannot
            import them: except for a .py file, it is data.
        overrides: Constructor arguments that replace those of the config, such as ``frozen_stages=1``.

    Returns:
        The backbone, in training mode: images ``(N, in_channels, H, W)`` to a tuple of ``(N, C, H/s, W/s)``.

    Raises:
        KeyError: If the name, the type or the choice of an argument is unknown; the message suggests the nearest.
        TypeError: If an argument is unknown, missing or of the wrong type.
        ValueError: If the value of an argument is invalid.
        FileNotFoundError: If the path or the checkpoint does not exist.
        ImportError: If a module of ``imports`` cannot be imported.

    >>> build_backbone("resnet18", frozen_stages=1).out_channels
    (64, 128, 256, 512)
    >>> build_backbone(dict(type="ResNet", depth=50, out_indices=(-1,))).feature_info
    (FeatureInfo(name='layer4', stage=3, channels=2048, stride=32),)
    """
    import_modules(imports)
    backbone = construct_backbone(config, **overrides)
    if checkpoint is None and isinstance(config, str) and not _is_own(config) and names_weights(config):
        warn_user(
            f"{config!r} names weights, but this builds the architecture alone, with new ones; weights are loaded by "
            f"checkpoint={config!r}, or another name of `resbackbone list --weights`, a file or a URL",
        )
    if hasattr(backbone, "init_weights") and not any(p.is_meta for p in backbone.parameters()):
        initialize(backbone, backbone.init_weights)
    if checkpoint is not None:
        from resbackbone.checkpoints import load_pretrained  # not above: building alone needs no reader

        load_pretrained(backbone, checkpoint)
    return backbone


def _is_own(name: str) -> bool:
    """Return whether a name is that of a file or of a config in ``configs/``."""
    return Path(name).suffix in _SUFFIXES or name in config_files()


def construct_backbone(config: BackboneSource, **overrides: Any) -> Backbone:
    """Build a backbone as :func:`build_backbone` does, but without initializing or loading weights."""
    type_, arguments = split_type({**load_config(config).backbone, **_plain(overrides)}, "backbone config")
    if isinstance(arguments.get("pretrained"), bool):
        raise TypeError(
            f"`pretrained` is a path, a URL or None here, got {arguments['pretrained']}; published weights are loaded "
            "by build_backbone(..., checkpoint='timm/resnet50.a1_in1k') or another name of `resbackbone list --weights`"
        )
    backbone_class = resolve_type(add_scope(type_, arguments.pop("_scope_", None)), "backbone")
    check_arguments(backbone_class, arguments)
    backbone: Backbone = construct(backbone_class, **arguments)
    return backbone


def list_backbones(pattern: str = "*") -> list[str]:
    """Return the sorted names of configs for :func:`build_backbone`.

    Args:
        pattern: A shell pattern with ``*`` and ``?``.

    >>> list_backbones("wide*")
    ['wide_resnet101_2', 'wide_resnet50_2']
    """
    return sorted(fnmatch.filter(config_files(), pattern))


def load_config(config: BackboneSource) -> BackboneConfig:
    """Load a backbone's config, given as for :func:`build_backbone`, as a copy.

    Raises:
        KeyError: If the name is unknown or the file has no backbone.
        TypeError: If ``config`` is not a name, a path or a dict.
        ValueError: If the file is not valid YAML.
        FileNotFoundError: If the file does not exist.
    """
    if isinstance(config, Mapping):
        return BackboneConfig(_plain(config))
    if not isinstance(config, (str, Path)):
        raise TypeError(
            "a backbone config must be a name, a path to a .yaml or .py file or a dict with `type`, "
            f"got {config!r} of type {type(config).__name__}"
        )
    path = Path(config)
    if path.suffix == ".py" and is_restricted():
        raise ValueError(f"a config inside another one is data, and cannot name a program; got {str(path)!r}")
    if path.suffix in _SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(
                f"no config file at {str(path)!r}; a name without a suffix is looked up in `configs/`"
            )
    elif str(config) in config_files():
        path = config_files()[str(config)]
    elif (found := find_architecture(str(config), config_files())) is not None:
        loaded = load_config(found[0])
        return replace(loaded, backbone={**loaded.backbone, **_plain(found[1])})
    else:
        hint = nearest_architecture(
            str(config), config_files(), list_all="`resbackbone list` shows all names; a file ends in .yaml or .py"
        )
        raise UnknownKeyError(f"unknown backbone {str(config)!r}{hint}")
    return _pick_backbone(_load_py(path) if path.suffix == ".py" else _load_yaml(path), path)


@lru_cache(maxsize=1)
def config_folder() -> Path:
    """Return the folder ``configs/``: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "configs", package.parent / "configs") if (folder / "resnet").is_dir())


@lru_cache(maxsize=1)
def config_files() -> dict[str, Path]:
    """Map each name to its file in ``configs/``; the folder above the file is the family."""
    return {path.stem: path for path in sorted(config_folder().glob("*/*.yaml"))}


@lru_cache(maxsize=1)
def recorded_costs() -> dict[str, dict[str, int]]:
    """Map each name to its ``params`` and ``macs`` in ``configs/costs.yaml``, which tools/record_costs.py writes.

    Both include a classifier of 1000 classes; ``macs`` are for one image of 224x224.
    """
    costs: dict[str, dict[str, int]] = yaml.safe_load((config_folder() / "costs.yaml").read_text(encoding="utf-8"))
    return costs


def check_arguments(target: type, arguments: Mapping[str, Any]) -> None:
    """Raise unless ``arguments`` are valid keyword arguments of a class, by name.

    Where a constructor has ``**kwargs``, the arguments of its base classes are valid, too.

    Raises:
        TypeError: If one is unknown or missing; the message suggests the nearest.
    """
    known, open_ended = parameters_of(target)
    unknown = [] if open_ended else [name for name in arguments if name not in known]
    if unknown:
        hint = argument_hint(unknown[0], known, _arguments_of_others(target))
        raise TypeError(f"{target.__name__} has no argument {unknown[0]!r}{hint}")
    missing = [
        name for name, parameter in known.items() if parameter.default is parameter.empty and name not in arguments
    ]
    if missing:
        raise TypeError(f"{target.__name__} needs `{missing[0]}`, got only {', '.join(arguments) or 'no arguments'}")


def _arguments_of_others(target: type) -> dict[str, set[str]]:
    """Map the names of other backbones to the arguments that they define themselves, for suggestions in errors."""
    if not issubclass(target, Backbone):
        return {}
    classes = [other for other in MODELS.module_dict.values() if inspect.isclass(other) and other is not target]
    constructors = {
        other.__name__: vars(other)["__init__"]
        for other in classes
        if issubclass(other, Backbone) and "__init__" in vars(other)
    }
    return {
        name: {
            parameter.name
            for parameter in list(inspect.signature(init).parameters.values())[1:]
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        }
        for name, init in constructors.items()
    }


def _pick_backbone(content: Any, path: Path) -> BackboneConfig:
    """Return the backbone's config in a file: the whole file, its ``backbone`` or its ``model.backbone``."""
    if isinstance(content, Mapping):
        if "type" in content:
            return BackboneConfig(_plain(content))
        if isinstance(content.get("backbone"), Mapping):
            about = {key: value for key, value in content.items() if key != "backbone"}
            return BackboneConfig(_plain(content["backbone"]), _plain(about))
        model = content.get("model")
        if isinstance(model, Mapping) and isinstance(model.get("backbone"), Mapping):
            return BackboneConfig(_plain(model["backbone"]))
    raise UnknownKeyError(
        f"{str(path)!r} has no backbone; it needs `type` at the top level, or a dict `backbone` or `model.backbone`"
    )


def _load_py(path: Path) -> Any:
    """Run a config in OpenMMLab's Python format; it is a program, so it must be trusted."""
    from mmengine.config import Config

    try:
        config = Config.fromfile(path).to_dict()
    except Exception as error:  # a program may raise anything
        raise ValueError(f"{str(path)!r} does not run: {type(error).__name__}: {message_of(error)}") from error
    allow_imported(config.get("custom_imports"))
    return config


def _load_yaml(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Load a YAML file and merge it into its ``_base_`` files; ``below`` are the files that have it as their base."""
    if path.resolve() in below:
        raise ValueError(f"{str(path)!r} is its own `_base_`, by way of {', '.join(p.name for p in below)}")
    try:
        # A subclass of SafeLoader: tags cannot call Python.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
        _check_extent(content, _MAX_ENTRIES)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not valid YAML of plain values: {error}") from error
    if not isinstance(content, dict):
        raise UnknownKeyError(f"{str(path)!r} has no backbone; it needs `type` at the top level, got {content!r}")
    if "custom_imports" in content:
        raise ValueError(
            f"{str(path)!r} has `custom_imports`, but a YAML file is data and imports nothing; name the modules "
            "when you run it: --import my_variant, or build_backbone(..., imports=['my_variant'])"
        )
    bases = content.pop("_base_", [])
    merged: dict[str, Any] = {}
    for base in check_sequence("_base_", [bases] if isinstance(bases, str) else bases):
        check_type("_base_", base, str, "a path or a list of paths, from the folder of the file")
        merged = _merge(merged, _load_yaml(path.parent / base, (*below, path.resolve())))
    return _merge(merged, content)


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, with an error for duplicate keys, and with tuples as mmengine dumps them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_tuple(self, node: yaml.SequenceNode) -> tuple[Any, ...]:
        return tuple(self.construct_sequence(node, deep=True))


_StrictLoader.add_constructor("tag:yaml.org,2002:python/tuple", _StrictLoader.construct_tuple)


def _check_extent(value: Any, left: int) -> int:
    """Count the entries of a value, with aliases expanded; return how many are left of the limit.

    Raises:
        YAMLError: If the limit is exceeded.
    """
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        left = _check_extent(item, left - 1)
        if left < 0:
            raise yaml.YAMLError(f"more than {_MAX_ENTRIES:,} entries with aliases expanded")
    return left


def _merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` updated recursively by ``update``.

    A dict of ``update`` with ``_delete_: true`` replaces the dict of ``base``, as in mmengine.
    """
    if "_delete_" in update:
        check_flag("_delete_", update["_delete_"])
    merged = {} if update.get("_delete_") else dict(base)
    for key, value in update.items():
        if key == "_delete_":
            continue
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _plain(value: Any) -> Any:
    """Return a copy of a config in builtin types; values of other types are kept."""
    if isinstance(value, Mapping):  # merged by now, so that `_delete_` has no effect
        plain_items = {key: convert_argument(key, item) for key, item in value.items() if key != "_delete_"}
        return {key: _plain(item) for key, item in plain_items.items()}
    value = to_builtin(value)
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    return value
