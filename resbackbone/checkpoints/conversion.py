"""Detection of the key layout of a state dict, and conversion between layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from resbackbone.checkpoints.layouts import ALIASES, LAYOUTS, Layout, Tensors
from resbackbone.checkpoints.readers.placeholders import excerpt
from resbackbone.checkpoints.selection import (
    Candidate,
    below,
    choose,
    copies_of,
    differ,
    find_candidates,
    is_swapped,
    is_training_state,
    unwrap,
    warn_of_copies,
)
from resbackbone.utils.validation import UnknownKeyError, check_type, nearest


@dataclass(frozen=True)
class FoundBackbone:
    """A backbone that was found among tensors.

    Attributes:
        layout: How it is named.
        prefix: What stands before its names, such as "backbone.".
        native: Its tensors, and its classifier's, by their native names.
        others: The names of all other tensors, which are those of heads, necks and the like.
        prefixes: Where further backbones were found, of other values.
        copies: Which of these have another role, so that one of them may be meant.
    """

    layout: Layout
    prefix: str
    native: Tensors
    others: tuple[str, ...]
    prefixes: tuple[str, ...]
    copies: tuple[str, ...]


def detect_layout(state_dict: Mapping[str, Tensor]) -> str:
    """Detect the key layout of a state dict, from the keys alone.

    Args:
        state_dict: Tensors by key, whatever stands before the backbone's own keys (``module.``, ``backbone.``, ...).

    Returns:
        A key of ``LAYOUTS``: "native" (also torchvision's ResNets, mmdet's and mmseg's), "timm" (where it differs from
        native), "timm-resnetv2", "timm-regnet", "torchvision-regnet", "pycls", "mmpretrain" (where it differs),
        "detectron2", "caffe2", "huggingface", "paddle", "rtdetr", "mmaction2", "cifar", "sequential" or "bit".

    Raises:
        ValueError: If no layout fits.
    """
    return find_backbone(state_dict).layout.name


def convert_state_dict(
    state_dict: Mapping[str, Tensor], source: str | None = None, target: str = "native", *, prefix: str | None = None
) -> dict[str, Tensor]:
    """Convert a backbone's state dict to the key layout of another library.

    Args:
        state_dict: Tensors by key, with whatever prefix; what is neither the backbone's nor its classifier's is left
            out. It is not changed.
        source: Their key layout, as :func:`detect_layout` names it; None to detect it. "torchvision", "mmdet", "mmseg"
            and "mmcls" are known, too.
        target: The key layout to convert to.
        prefix: What stands before the backbone's keys, where there are several backbones; None for the one that
            docs/weights.md says, with a warning that names the others.

    Returns:
        The tensors by their keys there, without a prefix. They share memory with the given ones where only the name
        changes.

    Raises:
        KeyError: If ``source`` or ``target`` is unknown.
        ValueError: If ``state_dict`` has no backbone of that layout or below that prefix.

    >>> import torch
    >>> list(convert_state_dict({"res2.0.conv1.weight": torch.zeros(1)}, target="native"))
    ['layer1.0.conv1.weight']
    """
    layout = get_layout(target)
    found = find_backbone(state_dict, source, prefix)
    warn_of_copies("the state dict", found.prefix, found.copies)
    return layout.to_foreign(found.native)


def get_layout(name: str) -> Layout:
    """Return a layout by its name or one of its libraries' names.

    Raises:
        KeyError: If there is none; the nearest is named.
    """
    name = ALIASES.get(name, name)
    if name not in LAYOUTS:
        raise UnknownKeyError(f"unknown layout {name!r}{nearest(name, [*LAYOUTS, *ALIASES])}")
    return LAYOUTS[name]


def find_backbone(
    tensors: Mapping[str, Tensor], layout: str | None = None, prefix: str | None = None, *, swapped: bool = False
) -> FoundBackbone:
    """Find the backbone among tensors, and give it its native names.

    Of several the one is taken that :func:`resbackbone.checkpoints.selection.choose` puts first.

    Args:
        tensors: By whatever key.
        layout: Their key layout; None to detect it.
        prefix: What stands before the backbone's names, or some parts of that; None to find out.
        swapped: Whether they come from a file of mmengine's, whose ``ema_state_dict`` holds the raw weights.

    Raises:
        KeyError: If ``layout`` is unknown.
        TypeError: If ``prefix`` is no text.
        ValueError: If there is none.
    """
    if prefix is not None:
        check_type("prefix", prefix, str, "what stands before the backbone's keys, such as 'backbone.'")
    candidates = find_candidates(tensors, list(LAYOUTS.values()) if layout is None else [get_layout(layout)])
    if prefix is None:
        asked = [one for one in candidates if not is_training_state(one.prefix)]
    else:
        asked = below(prefix, candidates)
    if not asked:
        raise ValueError(_none_found(tensors, layout, prefix))
    swapped = swapped or is_swapped(tensors)
    best, *rest = choose(asked, swapped=swapped)
    native = best.layout.to_native({bare: tensors[name] for bare, name in best.names.items()})
    outside = _beside(best, candidates, tensors)
    if not any(name.startswith("fc.") for name in native):
        native |= {ours: tensors[name] for name, ours in outside.items() if ours.startswith("fc.")}
    mine = set(best.names.values())
    others = tuple(name for name in tensors if name not in mine and not outside.get(name, "").startswith("fc."))
    rivals = [one for one in rest if differ(best, one, tensors)]
    prefixes = tuple(sorted(one.prefix for one in rivals))
    return FoundBackbone(best.layout, best.prefix, native, others, prefixes, copies_of(best, rivals, swapped=swapped))


def _beside(best: Candidate, candidates: Iterable[Candidate], names: Iterable[str]) -> dict[str, str]:
    """Give native names to what stands beside a backbone that has a prefix, in the same wrappings: its classifier."""
    if not best.prefix:
        return {}
    parent = "".join(best.prefix.removesuffix(".").rpartition(".")[:2])
    taken = {name for one in candidates for name in one.names.values()}
    beside = {
        unwrap(name.removeprefix(parent)): name for name in names if name.startswith(parent) and name not in taken
    }
    return {beside[name]: ours for name, ours in best.layout.native_names(beside).items()}


def _none_found(names: Iterable[str], layout: str | None, prefix: str | None) -> str:
    """Say what was looked for in vain, and what is there."""
    found = sorted(find_candidates(names, list(LAYOUTS.values())), key=lambda one: one.prefix)
    there = ", ".join(
        f"below {excerpt(one.prefix, 100)!r} ({one.layout.name} keys)"
        if one.prefix
        else f"without a prefix ({one.layout.name} keys)"
        for one in found[:10]
    )
    what = "known" if layout is None else layout
    where = "" if prefix is None else f" below prefix {prefix!r}"
    if there:
        state = any(is_training_state(one.prefix) for one in found)
        advice = (
            "; the states of optimizers and gradients are no weights: give their `prefix` if these are" if state else ""
        )
        return f"no {what} backbone is{where} among the keys; there is one {there}{advice}"
    some = ", ".join(excerpt(name, 100) for name in list(names)[:5]) or "none"
    tops = list(dict.fromkeys(name.partition(".")[0] + "." for name in names if "." in name))
    start = (
        f"; their prefixes are: {', '.join(excerpt(top, 50) for top in tops[:10])}"
        if prefix is not None and tops
        else ""
    )
    known = ", ".join(LAYOUTS)
    return f"no {what} backbone is{where} among the keys, the first of which are: {some}{start}; known layouts: {known}"
