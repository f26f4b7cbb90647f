"""Choose one backbone of a checkpoint that has several: raw and averaged weights, student and teacher, ..."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resbackbone.checkpoints.layouts import Layout, is_native
from resbackbone.checkpoints.readers.placeholders import excerpt
from resbackbone.utils.validation import warn_user

# Tensors that nearly every net of the family has: where one of them is found, a backbone begins.
_ANCHORS = (
    "layer1.0.conv1.weight",
    "layer1.0.conv2.weight",
    "layer1.0.conv2.conv.weight",
    "layer1.0.conv1.paths.0.conv.weight",
    "layer1.0.conv2.paths.0.conv.weight",
)
# The names under which torch.compile, activation checkpointing, FSDP, DataParallel and DeepSpeed hold what they wrap.
_WRAPPERS = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_forward_module",
    "module",
)
_WRAPPED = re.compile(rf"(?<![^.])({'|'.join(_WRAPPERS)})\.")
# Words in the names of modules that say which of two copies of a backbone is the one that its project evaluates.
_EVALUATED = {"ema", "shadow", "swa", "averaged", "average", "avg", "polyak", "teacher"}
_TRAINED = {"student"}
_MOMENTUM = {"momentum", "target", "key"}
_MOMENTUM_LETTERS = {"k", "m"}  # MoCo's `encoder_k`, ALBEF's `visual_encoder_m`
_LIGHTNING_RAW = "current_model_state"  # beside `state_dict`, where its callback puts the averaged weights
_MMENGINE_RAW = "ema_state_dict"  # mmengine's hook swaps when it saves, so this holds the raw weights
_MMENGINE_MARK = "ema_state_dict.steps"  # a counter of its averaged models; others' averages have a `module.`, too
# Words in the names of what optimizers hold, which has the names and shapes of weights; and of gradients.
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
        layout: The layout that explains most of its names.
        prefix: What stands before its names.
        names: The names as they stand in the checkpoint, by what they are behind the prefix and without wrappers.
        native: Its native names, without counters and the classifier.
    """

    layout: Layout
    prefix: str
    names: Mapping[str, str]
    native: frozenset[str]


def unwrap(name: str) -> str:
    """Leave out of a name the parts that wrappers add.

    >>> unwrap("layer1._orig_mod.0._checkpoint_wrapped_module.conv1.weight")
    'layer1.0.conv1.weight'
    """
    return name if _WRAPPED.search(name) is None else ".".join(filter(_is_no_wrapper, name.split(".")))


def _is_no_wrapper(part: str) -> bool:
    return part not in _WRAPPERS


def find_candidates(names: Iterable[str], layouts: Sequence[Layout]) -> list[Candidate]:
    """Find every backbone, each with the layout that fits it best, of equals the first.

    Raises:
        ValueError: If there are more than any checkpoint has.
    """
    bare = {name: unwrap(name) for name in names}
    prefixes: dict[str, list[Layout]] = defaultdict(list)
    for layout in layouts:
        for prefix in _prefixes(bare, layout):
            prefixes[prefix].append(layout)
    if len(prefixes) > _MAX_CANDIDATES:
        some = ", ".join(repr(excerpt(prefix, 50)) for prefix in list(prefixes)[:3])
        raise ValueError(
            f"{len(prefixes):,} backbones are among the keys, below {some}, ...; at most {_MAX_CANDIDATES} are read: "
            "save the weights of one alone"
        )
    inside = _group(bare, prefixes)
    found = []
    for prefix, fitting in prefixes.items():
        native, layout = _best_fit(inside[prefix], fitting)
        shared = (name for name in native if not name.endswith("num_batches_tracked") and not name.startswith("fc."))
        found.append(Candidate(layout, prefix, inside[prefix], frozenset(shared)))
    return found


def _best_fit(bare: Mapping[str, str], layouts: Sequence[Layout]) -> tuple[frozenset[str], Layout]:
    """Return the native names by the layout that explains most names, of equals the first, and that layout."""
    explained = []
    for layout in layouts:
        explained.append((_native_names(bare, layout), layout))
        if len(explained[-1][0]) == len(bare):  # all of them, which takes most files no further than the native layout
            break
    return max(explained, key=lambda item: len(item[0]))


def _group(names: Iterable[str], prefixes: Iterable[str]) -> dict[str, dict[str, str]]:
    """Give each name to the longest prefix that it has, by what it is behind that and without wrappers."""
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
        if bare not in inside[prefix]:  # else both are there, and the report will show this one as unexpected
            inside[prefix][bare] = inside[prefix].pop(behind)
    return inside


def _prefixes(names: Mapping[str, str], layout: Layout) -> dict[str, None]:
    """Return what stands before each of the anchors, in the order in which they come, of names and bare names."""
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
    """Cut off so many of the last parts of a name, not counting wrappers."""
    kept = name.split(".")
    while parts:
        parts -= kept.pop() not in _WRAPPERS
    return "".join(f"{part}." for part in kept)


def _native_names(bare: Iterable[str], layout: Layout) -> frozenset[str]:
    tidied = layout.tidy(dict.fromkeys(bare))  # type: ignore[arg-type]  # names alone matter here
    return frozenset(filter(is_native, layout.native_names(tidied).values()))


def choose(candidates: Sequence[Candidate], *, swapped: bool = False) -> list[Candidate]:
    """Put first the backbone that is meant, by rules that neither order nor counters nor heads influence.

    1. A copy without running statistics or a stem, which another copy has (averages of parameters alone), comes last.
    2. Momentum and target encoders come behind what is trained, students behind their teachers and whatever has no
       role.
    3. Averaged weights and teachers come before all others.
    4. Of equals the one with more tensors is meant, then the one with the shorter prefix.

    Args:
        candidates: The backbones.
        swapped: Whether the file is mmengine's, where ``ema_state_dict`` holds the raw weights.
    """

    def rank(candidate: Candidate) -> tuple[object, ...]:
        lacking = any(_lacks(candidate.native, other.native) for other in candidates)
        size = len(candidate.native)
        return lacking, role(candidate.prefix, swapped=swapped), -size, len(candidate.prefix), candidate.prefix

    return sorted(candidates, key=rank)


def is_swapped(names: Iterable[str]) -> bool:
    """Whether the names alone tell that a checkpoint is mmengine's, which swaps raw and averaged weights."""
    return _MMENGINE_MARK in names


def is_optimizer(key: object) -> bool:
    """Whether a key is what trainers call the state of an optimizer.

    >>> [is_optimizer(key) for key in ("optimizer_state_dict", "optimizerG", "opt_state", "optimized_model")]
    [True, True, True, False]
    """
    words = _words(key) if isinstance(key, str) and len(key) < 100 else []
    return bool(_OPTIMIZERS.intersection(words) or _OPTIMIZER_STATE.fullmatch("_".join(words)))


def is_training_state(prefix: str) -> bool:
    """Whether what has this prefix is an optimizer's state or gradients, under the names of the weights.

    >>> [is_training_state(prefix) for prefix in ("optim.exp_avg.", "grads.module.", "model.", "state_dict.avg.")]
    [True, True, False, False]
    """
    parts = prefix.split(".")
    return any(is_optimizer(part) or _TRAINING_STATE.fullmatch("_".join(_words(part))) for part in parts)


def _words(part: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(part)]


def copies_of(best: Candidate, others: Iterable[Candidate], *, swapped: bool) -> tuple[str, ...]:
    """Return the prefixes of those in another role, which one may have meant instead.

    What has the same role, such as an ``img_backbone`` beside a ``backbone``, is another part of one model; and in
    mmengine's files there is no doubt.
    """
    mine = role(best.prefix)
    found = (other.prefix for other in others if role(other.prefix) != mine)
    return tuple(sorted(prefix for prefix in found if not (swapped and _MMENGINE_RAW in prefix.split("."))))


def role(prefix: str, *, swapped: bool = False) -> tuple[int, int, int]:
    """Rate a prefix: momentum encoders in it, students in it, and less for each word of averages and teachers."""
    momentum = trained = evaluated = 0
    for part in prefix.split("."):
        words = _words(part)
        if part == _LIGHTNING_RAW or (swapped and part == _MMENGINE_RAW):
            trained += 1
        elif _MOMENTUM.intersection(words) or (len(words) > 1 and _MOMENTUM_LETTERS & {words[0], words[-1]}):
            momentum += 1
        elif _TRAINED.intersection(words):
            trained += 1
        elif _EVALUATED.intersection(words):
            evaluated += 1
    return momentum, trained, -evaluated


def _lacks(names: frozenset[str], others: frozenset[str]) -> bool:
    """Whether one is a copy of the other without its stem or some tensors of its layers, not just of fewer blocks."""
    if not names < others:
        return False
    modules = {name.rpartition(".")[0] for name in names}
    absent = others - names
    return any(not name.startswith("layer") or name.rpartition(".")[0] in modules for name in absent)


def differ(one: Candidate, other: Candidate, tensors: Mapping[str, Tensor]) -> bool:
    """Whether two backbones differ in their values, so that it matters which is taken."""
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


def below(prefix: str, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the backbone with this prefix, or else those that have it among the parts of theirs."""
    whole = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
    exact = [candidate for candidate in candidates if candidate.prefix == whole]
    if exact or not whole:
        return exact
    return [one for one in candidates if any(f".{whole}" in f".{text}" for text in (one.prefix, unwrap(one.prefix)))]


def warn_of_copies(what: str, prefix: str, copies: Sequence[str]) -> None:
    """Warn that a checkpoint holds copies of a backbone in other roles, and how to get them."""
    if copies:
        choices = " or ".join(f"prefix={other!r}" for other in copies[:10])
        choices += f" or one of {len(copies) - 10} more" if len(copies) > 10 else ""
        warn_user(
            f"{what} has {len(copies) + 1} copies of these weights: the one below {prefix!r} is taken; for another one "
            f"give {choices}",
        )
