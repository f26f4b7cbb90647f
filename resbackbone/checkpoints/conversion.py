"""Whose tensors these are, and turning them into somebody else's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from resbackbone.checkpoints.layouts import ALIASES, LAYOUTS, Layout, Tensors, is_native
from resbackbone.checks import UnknownKeyError, nearest

# Tensors that nearly every net of the family has: where one of them is found, a backbone begins.
_ANCHORS = (
    "layer1.0.conv1.weight",
    "layer1.0.conv2.weight",
    "layer1.0.conv2.conv.weight",
    "layer1.0.conv1.paths.0.conv.weight",
    "layer1.0.conv2.paths.0.conv.weight",
)
# Of two backbones in one file the other one is meant: what is trained slower, or by the other.
_SECOND_CHOICE = re.compile(r"(^|\.)(student|encoder_k|momentum_\w+|target_\w+)\.")


@dataclass(frozen=True)
class Backbone:
    """A backbone that was found among tensors.

    Attributes:
        layout: How it is named.
        prefix: What stands before its names, such as "backbone.".
        native: Its tensors, and its classifier's, by their native names.
        others: The names of all other tensors, which are those of heads, necks and the like.
        prefixes: Where further backbones were found.
    """

    layout: Layout
    prefix: str
    native: Tensors
    others: tuple[str, ...]
    prefixes: tuple[str, ...]


def detect_layout(state_dict: Mapping[str, Tensor]) -> str:
    """Tell from the keys alone whose a state dict is.

    Args:
        state_dict: Tensors by key, whatever stands before the backbone's own keys (``module.``, ``backbone.``, ...).

    Returns:
        A key of ``LAYOUTS``: "native" (also torchvision's ResNets, mmdet's and mmseg's), "timm" (where it differs from
        native), "timm-resnetv2", "timm-regnet", "torchvision-regnet", "pycls", "mmpretrain" (where it differs),
        "detectron2", "caffe2", "huggingface" or "paddle".

    Raises:
        ValueError: If no layout fits.
    """
    return find_backbone(state_dict).layout.name


def convert_state_dict(
    state_dict: Mapping[str, Tensor], source: str | None = None, target: str = "native"
) -> dict[str, Tensor]:
    """Turn a backbone's state dict into another library's.

    Args:
        state_dict: Tensors by key, with whatever prefix; what is neither the backbone's nor its classifier's is left
            out. It is not changed.
        source: Whose they are, as :func:`detect_layout` says it, which is asked where this is None; "torchvision",
            "mmdet", "mmseg" and "mmcls" are known, too.
        target: Whose they shall be.

    Returns:
        The tensors by their keys there, without a prefix. They share memory with the given ones where only the name
        changes.

    Raises:
        KeyError: If ``source`` or ``target`` is unknown.
        ValueError: If ``state_dict`` has no backbone of that layout.

    >>> import torch
    >>> list(convert_state_dict({"res2.0.conv1.weight": torch.zeros(1)}, target="native"))
    ['layer1.0.conv1.weight']
    """
    return get_layout(target).to_foreign(find_backbone(state_dict, source).native)


def get_layout(name: str) -> Layout:
    """Return a layout by its name or one of its libraries' names.

    Raises:
        KeyError: If there is none; the nearest is named.
    """
    name = ALIASES.get(name, name)
    if name not in LAYOUTS:
        raise UnknownKeyError(f"unknown layout {name!r}{nearest(name, [*LAYOUTS, *ALIASES])}")
    return LAYOUTS[name]


def find_backbone(tensors: Mapping[str, Tensor], layout: str | None = None) -> Backbone:
    """Find the backbone among tensors, and give it its native names.

    Args:
        tensors: By whatever key.
        layout: Whose they are; None to find out.

    Raises:
        KeyError: If ``layout`` is unknown.
        ValueError: If there is none.
    """
    layouts = list(LAYOUTS.values()) if layout is None else [get_layout(layout)]
    found = [(_fit(tensors, *candidate), candidate) for candidate in _candidates(tensors, layouts)]
    if not found:
        some = ", ".join(list(tensors)[:5]) or "none"
        raise ValueError(
            f"no {'known' if layout is None else layout} backbone is among the keys, the first of which are: {some}; "
            f"known layouts: {', '.join(LAYOUTS)}"
        )
    _, (best, prefix) = max(found, key=lambda item: item[0])  # of equals the first
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    native = best.to_native(inside)
    # A classifier stands beside a backbone that has a prefix, and in the same wrappings.
    wrappings = prefix.removesuffix(".").rpartition(".")
    beside = {name.removeprefix("".join(wrappings[:2])): name for name in tensors if not name.startswith(prefix)}
    outside = {beside[name]: ours for name, ours in best.native_names(beside).items()}
    native |= {ours: tensors[name] for name, ours in outside.items() if ours.startswith("fc.")}
    others = tuple(name for name, ours in outside.items() if not ours.startswith("fc."))
    return Backbone(best, prefix, native, others, tuple(sorted({other for _, (_, other) in found} - {prefix})))


def _candidates(names: Iterable[str], layouts: Iterable[Layout]) -> Iterator[tuple[Layout, str]]:
    """Yield every layout and prefix that has one of the anchors."""
    names = list(names)
    for layout in layouts:
        anchors = {table.to_foreign([anchor]).get(anchor, anchor) for table in layout.tables for anchor in _ANCHORS}
        endings = tuple(anchors or _ANCHORS)
        prefixes: dict[str, None] = {}  # in the order in which they come
        for name in names:
            if name.endswith(endings):
                for anchor in endings:
                    prefix = name.removesuffix(anchor)
                    if prefix != name and (not prefix or prefix.endswith(".")):
                        prefixes[prefix] = None
        yield from ((layout, prefix) for prefix in prefixes)


def _fit(names: Iterable[str], layout: Layout, prefix: str) -> tuple[int, bool]:
    """Rate how well a layout explains what stands behind a prefix: by how many names, and whether it is meant."""
    inside = dict.fromkeys(name.removeprefix(prefix) for name in names if name.startswith(prefix))
    native = layout.native_names(layout.tidy(inside)).values()  # type: ignore[arg-type]  # names alone matter here
    return sum(map(is_native, native)), _SECOND_CHOICE.search(prefix) is None
