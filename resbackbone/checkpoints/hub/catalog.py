"""Catalog of published weights by name, from ``catalog.yaml``, which tools/build_catalog.py writes."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from resbackbone.data.preprocessing import Preprocessing
from resbackbone.utils.validation import UnknownKeyError, nearest

# Old names of origins that mmengine reads, too.
_OLD_PREFIXES = {"modelzoo": "torchvision", "openmmlab": "open-mmlab"}


@dataclass(frozen=True)
class Weights:
    """Published weights for one of the backbones of this library; None stands for unknown.

    Attributes:
        name: ``origin/name``, with the name at the origin.
        url: The address of the file.
        layout: The key layout, as :func:`~resbackbone.checkpoints.detect_layout` names it.
        config: The backbone, as :func:`resbackbone.list_backbones` lists it.
        overrides: Constructor arguments that differ from the config.
        sha256: First hexadecimal digits of the file's hash.
        params: Parameters of the backbone with a classifier of 1000 classes.
        macs: Multiply-accumulates of the same for one image of 224x224.
        acc1: Published top-1 accuracy in percent, on the data set of the training: ImageNet-1k if ``classes`` is 1000.
        acc5: Published top-5 accuracy in percent.
        classes: Outputs of the classifier in the file; 0 if it has none.
        license: Short name or address of the license.
        preprocessing: What the weights expect of an image.
        crop_pct: Side of the crop per shorter side of the resized image, 0-1, with which accuracy was measured.
        size_mib: Size of the file in units of 2**20 bytes.
        default: Whether they are the default weights of the config.
        aliases: Other names, such as ``open-mmlab://resnet50_v1c``.
    """

    name: str
    url: str
    layout: str
    config: str
    params: int
    macs: int
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sha256: str | None = None
    acc1: float | None = None
    acc5: float | None = None
    classes: int | None = None
    license: str | None = None
    preprocessing: Preprocessing | None = None
    crop_pct: float | None = None
    size_mib: float | None = None
    default: bool = False
    aliases: tuple[str, ...] = ()


def list_weights(pattern: str = "*") -> list[Weights]:
    """List the published weights.

    Args:
        pattern: Pattern of the names, with ``*`` and ``?`` as in a shell.

    Returns:
        The weights, sorted by name.

    >>> [weights.name for weights in list_weights("torchvision/resnet18*")]
    ['torchvision/resnet18.imagenet1k_v1']
    """
    return [_catalog()[name] for name in sorted(fnmatch.filter(_catalog(), pattern))]


def find_weights(name: str) -> Weights:
    """Return published weights by their name or an alias.

    Args:
        name: ``origin/name``, or ``origin://name`` as in configs of mmengine and detectron2.

    Raises:
        KeyError: If the name is unknown; the nearest one is given.

    >>> find_weights("torchvision://resnet50").name
    'torchvision/resnet50.imagenet1k_v1'
    """
    known = all_names()
    asked = _with_new_origin(name)
    if asked not in known:
        hint = nearest(asked, known, list_all="`resbackbone list --weights` shows what there is", same_numbers=True)
        raise UnknownKeyError(f"no weights are known as {name!r}{hint}")
    return known[asked]


def default_weights(config_name: str) -> Weights:
    """Return the default weights of a backbone.

    They are the ones that their origin prefers; the origin is the first that has any of torchvision, mmpretrain, timm,
    mmengine's ``open-mmlab://`` and detectron2. Check the license of a few.

    Args:
        config_name: As :func:`resbackbone.list_backbones` lists it.

    Raises:
        KeyError: If no weights are known for that config.

    >>> default_weights("resnet50").name
    'torchvision/resnet50.imagenet1k_v2'
    """
    defaults = {weights.config: weights for weights in _catalog().values() if weights.default}
    if config_name not in defaults:
        hint = nearest(
            config_name, defaults, list_all="`resbackbone list --weights` shows what there is", same_numbers=True
        )
        raise UnknownKeyError(f"no published weights are known for {config_name!r}{hint}")
    return defaults[config_name]


def _with_new_origin(name: str) -> str:
    """Replace an old name of the origin in ``origin://name``."""
    origin, separator, rest = name.partition("://")
    return f"{_OLD_PREFIXES.get(origin, origin)}{separator}{rest}"


@lru_cache(maxsize=1)
def _catalog() -> dict[str, Weights]:
    text = Path(__file__).with_name("catalog.yaml").read_text(encoding="utf-8")
    entries = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["weights"]
    return {name: _weights(name, entry) for name, entry in entries.items()}


def _weights(name: str, entry: dict[str, Any]) -> Weights:
    if "preprocessing" in entry:
        values = entry["preprocessing"]
        entry["preprocessing"] = Preprocessing(**values | {key: tuple(values[key]) for key in ("mean", "std")})
    return Weights(name=name, **entry | {"aliases": tuple(entry.get("aliases", ()))})


@lru_cache(maxsize=1)
def all_names() -> dict[str, Weights]:
    """Map every name, ``origin/name`` and ``origin://name``, to its weights."""
    names: dict[str, Weights] = {}
    for weights in _catalog().values():
        for name in (weights.name, weights.name.replace("/", "://", 1), *weights.aliases):
            assert name not in names, name
            names[name] = weights
    return names
