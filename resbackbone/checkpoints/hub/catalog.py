"""The published weights that are known by name, from ``catalog.yaml``, which tools/build_catalog.py writes."""

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

# The same origin under an older name, as mmengine reads it.
_OLD_PREFIXES = {"modelzoo": "torchvision", "openmmlab": "open-mmlab"}


@dataclass(frozen=True)
class Weights:
    """Weights that somebody published for one of the backbones of this library; None is what nobody says.

    Attributes:
        name: ``origin/name``, the name being the one that they have at their origin.
        url: Where they are.
        layout: How their keys are named, as :func:`~resbackbone.checkpoints.detect_layout` says it.
        config: The backbone, as :func:`resbackbone.list_backbones` lists it.
        overrides: Constructor arguments beside those of the config.
        sha256: First hexadecimal digits of the file's hash.
        params: Parameters of the backbone with a classifier of 1000 classes.
        macs: Its multiply-accumulates for one image of 224x224.
        acc1: Published top-1 accuracy in percent, on what they were trained for: ImageNet-1k where ``classes`` is 1000.
        acc5: Published top-5 accuracy in percent.
        classes: Outputs of the classifier in the file; 0 if it has none.
        license: Short name or address of the license.
        preprocessing: What they expect of an image.
        crop_pct: Side of the crop per shorter side of the resized image, 0-1, with which accuracy was measured.
        mebibytes: Size of the file in units of 2**20 bytes.
        default: Whether these are the weights to take for the config if no others are asked for.
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
    mebibytes: float | None = None
    default: bool = False
    aliases: tuple[str, ...] = ()


def list_weights(pattern: str = "*") -> list[Weights]:
    """List the published weights.

    Args:
        pattern: What the name must look like, with ``*`` and ``?`` as in a shell.

    Returns:
        The weights, sorted by name.

    >>> [weights.name for weights in list_weights("torchvision/resnet18*")]
    ['torchvision/resnet18.imagenet1k_v1']
    """
    return [_catalog()[name] for name in sorted(fnmatch.filter(_catalog(), pattern))]


def find_weights(name: str) -> Weights:
    """Find published weights by their name or one of their other names.

    Args:
        name: ``origin/name``, or as mmengine's and detectron2's configs write it, ``origin://name``.

    Raises:
        KeyError: If there are none; the nearest name is given.

    >>> find_weights("torchvision://resnet50").name
    'torchvision/resnet50.imagenet1k_v1'
    """
    known = all_names()
    asked = _modern(name)
    if asked not in known:
        hint = nearest(asked, known, list_all="`resbackbone list --weights` shows what there is", same_numbers=True)
        raise UnknownKeyError(f"no weights are known as {name!r}{hint}")
    return known[asked]


def default_weights(config_name: str) -> Weights:
    """Find the weights to take for a backbone if no others are asked for.

    They are those that their origin itself prefers, the origin being the first that has any of torchvision, mmpretrain,
    timm, mmengine's ``open-mmlab://`` and detectron2. Mind the license of a few.

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


def _modern(name: str) -> str:
    """Write ``origin://name`` with today's name of the origin."""
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
