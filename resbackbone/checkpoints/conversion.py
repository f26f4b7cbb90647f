"""Detection of the key layout of a state dict, and conversion between layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from resbackbone.checkpoints.layouts import LAYOUTS, Layout, Tensors, get_layout
from resbackbone.checkpoints.selection import (
    Candidate,
    copies_of,
    differ,
    find_candidates,
    is_mmengine,
    is_training_state,
    rank,
    unwrap,
    warn_of_copies,
    with_prefix,
)
from resbackbone.utils.validation import check_type, excerpt


@dataclass(frozen=True)
class FoundBackbone:
    """The backbone that was selected from the tensors of a checkpoint.

    Attributes:
        layout: Its key layout.
        prefix: The prefix of its keys, such as "backbone.".
        native: The tensors of the backbone and its classifier, by native key.
        others: All other keys: those of heads, necks, other backbones.
        other_prefixes: Prefixes of other backbones with other values.
        copies: Those of them in another role (averaged weights, teacher, ...), of which one may be meant.
    """

    layout: Layout
    prefix: str
    native: Tensors
    others: tuple[str, ...]
    other_prefixes: tuple[str, ...]
    copies: tuple[str, ...]


def detect_layout(state_dict: Mapping[str, Tensor]) -> str:
    """Detect the key layout of a state dict, from the keys alone.

    Args:
        state_dict: Tensors by key, with whatever prefix (``module.``, ``backbone.``, ...).

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
        state_dict: Tensors by key, with whatever prefix; not changed. Keys of neither the backbone nor its classifier
            are left out.
        source: Their key layout, as :func:`detect_layout` names it; None to detect it. "torchvision", "mmdet", "mmseg"
            and "mmcls" are known, too.
        target: The key layout to convert to.
        prefix: The prefix of the backbone's keys, for a state dict of several backbones; None selects the one that
            docs/weights.md describes, with a warning that names the others.

    Returns:
        The tensors by their new keys, without a prefix. They share memory with the given ones if only the key changes.

    Raises:
        KeyError: If ``source`` or ``target`` is unknown.
        ValueError: If ``state_dict`` has no backbone of that layout or prefix.

    >>> import torch
    >>> list(convert_state_dict({"res2.0.conv1.weight": torch.zeros(1)}, target="native"))
    ['layer1.0.conv1.weight']
    """
    layout = get_layout(target)
    found = find_backbone(state_dict, source, prefix)
    warn_of_copies("the state dict", found.prefix, found.copies)
    return layout.to_foreign(found.native)


def find_backbone(
    tensors: Mapping[str, Tensor], layout: str | None = None, prefix: str | None = None, *, from_mmengine: bool = False
) -> FoundBackbone:
    """Find the backbone among the tensors of a checkpoint, and convert it to native keys.

    Of several the one is selected that :func:`resbackbone.checkpoints.selection.rank` puts first.

    Args:
        tensors: By key, with whatever prefix.
        layout: Their key layout; None to detect it.
        prefix: The prefix of the backbone's keys, or some parts of it; None to detect it.
        from_mmengine: Whether mmengine saved the checkpoint, so that ``ema_state_dict`` holds the raw weights.

    Raises:
        KeyError: If ``layout`` is unknown.
        TypeError: If ``prefix`` is not a string.
        ValueError: If there is no backbone.
    """
    if prefix is not None:
        check_type("prefix", prefix, str, "the prefix of the backbone's keys, such as 'backbone.'")
    candidates = find_candidates(tensors, list(LAYOUTS.values()) if layout is None else [get_layout(layout)])
    if prefix is None:
        eligible = [one for one in candidates if not is_training_state(one.prefix)]
    else:
        eligible = with_prefix(prefix, candidates)
    if not eligible:
        raise ValueError(_not_found(tensors, layout, prefix))
    from_mmengine = from_mmengine or is_mmengine(tensors)
    best, *rest = rank(eligible, from_mmengine=from_mmengine)
    native = best.layout.to_native({bare: tensors[name] for bare, name in best.names.items()})
    siblings = _siblings(best, candidates, tensors)
    if not any(name.startswith("fc.") for name in native):
        native |= {ours: tensors[name] for name, ours in siblings.items() if ours.startswith("fc.")}
    mine = set(best.names.values())
    others = tuple(name for name in tensors if name not in mine and not siblings.get(name, "").startswith("fc."))
    rivals = [one for one in rest if differ(best, one, tensors)]
    other_prefixes = tuple(sorted(one.prefix for one in rivals))
    copies = copies_of(best, rivals, from_mmengine=from_mmengine)
    return FoundBackbone(best.layout, best.prefix, native, others, other_prefixes, copies)


def _siblings(best: Candidate, candidates: Iterable[Candidate], names: Iterable[str]) -> dict[str, str]:
    """Return the native names of the tensors beside a backbone that has a prefix, among them its classifier."""
    if not best.prefix:
        return {}
    parent = "".join(best.prefix.removesuffix(".").rpartition(".")[:2])
    taken = {name for one in candidates for name in one.names.values()}
    beside = {
        unwrap(name.removeprefix(parent)): name for name in names if name.startswith(parent) and name not in taken
    }
    return {beside[name]: ours for name, ours in best.layout.native_names(beside).items()}


def _not_found(names: Iterable[str], layout: str | None, prefix: str | None) -> str:
    """Return the error text for a checkpoint without the backbone: what was looked for, and what there is."""
    found = sorted(find_candidates(names, list(LAYOUTS.values())), key=lambda one: one.prefix)
    there = ", ".join(
        f"with prefix {excerpt(one.prefix, 100)!r} ({one.layout.name} keys)"
        if one.prefix
        else f"without a prefix ({one.layout.name} keys)"
        for one in found[:10]
    )
    what = "known" if layout is None else layout
    where = "" if prefix is None else f" with prefix {prefix!r}"
    if there:
        advice = ""
        if any(is_training_state(one.prefix) for one in found):
            advice = "; optimizer states and gradients are not taken for weights: give their `prefix` if they are"
        return f"no {what} backbone is among the keys{where}; there is one {there}{advice}"
    some = ", ".join(excerpt(name, 100) for name in list(names)[:5]) or "none"
    tops = list(dict.fromkeys(name.partition(".")[0] + "." for name in names if "." in name))
    start = (
        f"; their prefixes are: {', '.join(excerpt(top, 50) for top in tops[:10])}"
        if prefix is not None and tops
        else ""
    )
    known = ", ".join(LAYOUTS)
    return f"no {what} backbone is among the keys{where}; the first keys are: {some}{start}; known layouts: {known}"
