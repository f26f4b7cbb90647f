"""Select one backbone of a checkpoint that has several: raw and averaged weights, student and teacher, ..."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resbackbone.checkpoints.layouts import Layout, is_native
from resbackbone.utils.validation import excerpt, warn_user

# Native keys of which nearly every net of the family has one: what stands before it is the prefix of a backbone.
_ANCHORS = (
    "layer1.0.conv1.weight",
    "layer1.0.conv2.weight",
    "layer1.0.conv2.conv.weight",
    "layer1.0.conv1.paths.0.conv.weight",
    "layer1.0.conv2.paths.0.conv.weight",
)
# Attributes of torch.compile, activation checkpointing, FSDP, DataParallel and DeepSpeed for the wrapped module.
_WRAPPERS = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_forward_module",
    "module",
)
_WRAPPED = re.compile(rf"(?<![^.])({'|'.join(_WRAPPERS)})\.")
# Words in module names by which to tell the copy of a backbone that its project evaluates.
_EVALUATED = {"ema", "shadow", "swa", "averaged", "average", "avg", "polyak", "teacher"}
_TRAINED = {"student"}
_MOMENTUM = {"momentum", "target", "key"}
_MOMENTUM_LETTERS = {"k", "m"}  # MoCo's `encoder_k`, ALBEF's `visual_encoder_m`
_LIGHTNING_RAW = "current_model_state"  # beside `state_dict`, into which its callback writes the averaged weights
_MMENGINE_RAW = "ema_state_dict"  # mmengine's EMAHook swaps on saving, so this holds the raw weights
_MMENGINE_STEPS = "ema_state_dict.steps"  # a counter that only mmengine's averaged models have at this place
# Names of optimizer states and gradients, whose tensors have the names and shapes of weights.
_OPTIMIZERS = {"optim", "optims", "optimizer", "optimizers"}
_OPTIMIZER_STATE = re.compile(r"opts?(_(state|states|dict|state_dict))?")
_TRAINING_STATE = re.compile(
    r"(max_)?exp_avg(_sq|_diff|_slow|_fast)?|exp_inf|(momentum|grad)_(buffer|avg)|square_avg|(square_)?acc_delta|"
    r"(acc_|accumulated_)?(grad|gradient|velocity|velocities)s?"
)
_MAX_CANDIDATES = 100  # each is compared with every other one
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True)
class Candidate:
    """A backbone among the tensors of a checkpoint.

    Attributes:
        layout: The layout that has most of its keys.
        prefix: The prefix of its keys.
        names: The full keys, by the keys without prefix and wrappers.
        native: Its native keys, without counters and the classifier.
    """

    layout: Layout
    prefix: str
    names: Mapping[str, str]
    native: frozenset[str]


def unwrap(name: str) -> str:
    """Remove the parts of a key that wrappers add.

    >>> unwrap("layer1._orig_mod.0._checkpoint_wrapped_module.conv1.weight")
    'layer1.0.conv1.weight'
    """
    return name if _WRAPPED.search(name) is None else ".".join(filter(_is_no_wrapper, name.split(".")))


def _is_no_wrapper(part: str) -> bool:
    return part not in _WRAPPERS


def find_candidates(names: Iterable[str], layouts: Sequence[Layout]) -> list[Candidate]:
    """Find every backbone, each with the layout that fits best, of equals the first.

    Raises:
        ValueError: If there are more than 100.
    """
    bare = {name: unwrap(name) for name in names}
    prefixes: dict[str, list[Layout]] = defaultdict(list)
    for layout in layouts:
        for prefix in _prefixes(bare, layout):
            prefixes[prefix].append(layout)
    if len(prefixes) > _MAX_CANDIDATES:
        some = ", ".join(repr(excerpt(prefix, 50)) for prefix in list(prefixes)[:3])
        raise ValueError(
            f"{len(prefixes):,} backbones are among the keys, with prefixes {some}, ...; at most {_MAX_CANDIDATES} are "
            "read: save the weights of one"
        )
    inside = _group(bare, prefixes)
    found = []
    for prefix, fitting in prefixes.items():
        native, layout = _best_fit(inside[prefix], fitting)
        shared = (name for name in native if not name.endswith("num_batches_tracked") and not name.startswith("fc."))
        found.append(Candidate(layout, prefix, inside[prefix], frozenset(shared)))
    return found


def _best_fit(bare: Mapping[str, str], layouts: Sequence[Layout]) -> tuple[frozenset[str], Layout]:
    """Return the native keys by the layout that converts most keys, of equals the first, and that layout."""
    fits = []
    for layout in layouts:
        fits.append((_native_names(bare, layout), layout))
        if len(fits[-1][0]) == len(bare):  # all of them: for most files the search ends at the native layout
            break
    return max(fits, key=lambda fit: len(fit[0]))


def _group(names: Iterable[str], prefixes: Iterable[str]) -> dict[str, dict[str, str]]:
    """Group keys by the longest prefix of each; the keys of a group are without prefix and wrappers."""
    inside: dict[str, dict[str, str]] = {prefix: {} for prefix in prefixes}
    longest_first = sorted(inside, key=len, reverse=True)
    wrapped = []
    for name in names:
        prefix = next((prefix for prefix in longest_first if name.startswith(prefix)), None)
        if prefix is not None:
            behind = name.removeprefix(prefix)
            inside[prefix][behind] = name
            if unwrap(behind) != behind:
                wrapped.append((prefix, behind))
    for prefix, behind in wrapped:
        bare = unwrap(behind)
        if bare not in inside[prefix]:  # else both are there, and the report lists this one as unexpected
            inside[prefix][bare] = inside[prefix].pop(behind)
    return inside


def _prefixes(names: Mapping[str, str], layout: Layout) -> dict[str, None]:
    """Return the prefixes of the anchors among ``names``, which maps keys to unwrapped keys, in order."""
    tables = (*layout.tables, *layout.old)
    anchors = {table.to_foreign([anchor]).get(anchor, anchor) for table in tables for anchor in _ANCHORS}
    endings = tuple(anchors or _ANCHORS)
    prefixes: dict[str, None] = {}
    for name, bare in names.items():
        for anchor in endings if bare.endswith(endings) else ():
            before = bare.removesuffix(anchor)
            if before != bare and (not before or before.endswith(".")):
                prefixes[_cut(name, anchor.count(".") + 1)] = None
    return prefixes


def _cut(name: str, parts: int) -> str:
    """Remove the last parts of a key; wrappers are removed, too, and not counted."""
    kept = name.split(".")
    while parts:
        parts -= kept.pop() not in _WRAPPERS
    return "".join(f"{part}." for part in kept)


def _native_names(bare: Iterable[str], layout: Layout) -> frozenset[str]:
    cleaned = layout.clean(dict.fromkeys(bare))  # type: ignore[arg-type]  # only names matter here
    return frozenset(filter(is_native, layout.native_names(cleaned).values()))


def rank(candidates: Sequence[Candidate], *, from_mmengine: bool = False) -> list[Candidate]:
    """Sort backbones, the one to load first; order of the keys, counters and heads have no influence.

    1. A copy without running statistics or a stem, which another copy has (averages of parameters only), comes last.
    2. Momentum and target encoders come after trained ones, students after their teachers and backbones without a role.
    3. Averaged weights and teachers come before all others.
    4. Of equals the one with more tensors comes first, then the one with the shorter prefix.

    Args:
        candidates: The backbones.
        from_mmengine: Whether mmengine saved the checkpoint, so that ``ema_state_dict`` holds the raw weights.
    """

    def key(candidate: Candidate) -> tuple[object, ...]:
        incomplete = any(_is_incomplete(candidate.native, other.native) for other in candidates)
        rating = role(candidate.prefix, from_mmengine=from_mmengine)
        return incomplete, rating, -len(candidate.native), len(candidate.prefix), candidate.prefix

    return sorted(candidates, key=key)


def is_mmengine(names: Iterable[str]) -> bool:
    """Whether the keys alone tell that mmengine saved a checkpoint, and swapped raw and averaged weights."""
    return _MMENGINE_STEPS in names


def is_optimizer(key: object) -> bool:
    """Whether a key is a trainer's name for the state of an optimizer.

    >>> [is_optimizer(key) for key in ("optimizer_state_dict", "optimizerG", "opt_state", "optimized_model")]
    [True, True, True, False]
    """
    words = _words(key) if isinstance(key, str) and len(key) < 100 else []
    return bool(_OPTIMIZERS.intersection(words) or _OPTIMIZER_STATE.fullmatch("_".join(words)))


def is_training_state(prefix: str) -> bool:
    """Whether tensors with this prefix are optimizer states or gradients, which have the keys of the weights.

    >>> [is_training_state(prefix) for prefix in ("optim.exp_avg.", "grads.module.", "model.", "state_dict.avg.")]
    [True, True, False, False]
    """
    parts = prefix.split(".")
    return any(is_optimizer(part) or _TRAINING_STATE.fullmatch("_".join(_words(part))) for part in parts)


def _words(part: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(part)]


def copies_of(best: Candidate, others: Iterable[Candidate], *, from_mmengine: bool) -> tuple[str, ...]:
    """Return the prefixes of the backbones in another role, of which the user may have meant one.

    A backbone in the same role, such as an ``img_backbone`` beside a ``backbone``, is another part of one model; and
    the ``ema_state_dict`` of mmengine's files is certainly not meant.
    """
    mine = role(best.prefix)
    found = (other.prefix for other in others if role(other.prefix) != mine)
    return tuple(sorted(prefix for prefix in found if not (from_mmengine and _MMENGINE_RAW in prefix.split("."))))


def role(prefix: str, *, from_mmengine: bool = False) -> tuple[int, int, int]:
    """Rate the role that a prefix names, lower for preferred ones.

    Returns:
        The numbers of words for momentum encoders and students in it, and minus that for averages and teachers.
    """
    momentum = trained = evaluated = 0
    for part in prefix.split("."):
        words = _words(part)
        if part == _LIGHTNING_RAW or (from_mmengine and part == _MMENGINE_RAW):
            trained += 1
        elif _MOMENTUM.intersection(words) or (len(words) > 1 and _MOMENTUM_LETTERS & {words[0], words[-1]}):
            momentum += 1
        elif _TRAINED.intersection(words):
            trained += 1
        elif _EVALUATED.intersection(words):
            evaluated += 1
    return momentum, trained, -evaluated


def _is_incomplete(names: frozenset[str], others: frozenset[str]) -> bool:
    """Whether a backbone is a copy of another without its stem or some tensors of its layers, not with fewer blocks."""
    if not names < others:
        return False
    modules = {name.rpartition(".")[0] for name in names}
    absent = others - names
    return any(not name.startswith("layer") or name.rpartition(".")[0] in modules for name in absent)


def differ(one: Candidate, other: Candidate, tensors: Mapping[str, Tensor]) -> bool:
    """Whether two backbones differ in their values, so that it matters which is loaded."""
    if one.layout is not other.layout or one.native != other.native:
        return True
    return any(
        key in other.names and not _same(tensors[name], tensors[other.names[key]]) for key, name in one.names.items()
    )


def _same(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype or left.layout != right.layout:
        return False
    if left.layout != torch.strided or left.is_meta or left.is_quantized:
        return left is right
    return torch.equal(left, right)


def with_prefix(prefix: str, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the backbone with this prefix, or else those whose prefix contains it."""
    whole = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
    exact = [candidate for candidate in candidates if candidate.prefix == whole]
    if exact or not whole:
        return exact
    return [one for one in candidates if any(f".{whole}" in f".{text}" for text in (one.prefix, unwrap(one.prefix)))]


def warn_of_copies(what: str, prefix: str, copies: Sequence[str]) -> None:
    """Warn that a checkpoint holds copies of a backbone in other roles, and how to load them."""
    if copies:
        choices = " or ".join(f"prefix={other!r}" for other in copies[:10])
        choices += f" or one of {len(copies) - 10} more" if len(copies) > 10 else ""
        warn_user(
            f"{what} has {len(copies) + 1} copies of these weights: the one with prefix {prefix!r} is loaded; for "
            f"another one give {choices}",
        )
