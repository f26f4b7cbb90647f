"""Load third-party checkpoints into backbones: all tensors or none, with a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from resbackbone.backbones.pretrained import PretrainedModule
from resbackbone.blocks.base import ResidualBlock
from resbackbone.checkpoints.adapt import Adapted, adapt
from resbackbone.checkpoints.conversion import FoundBackbone, find_backbone
from resbackbone.checkpoints.hub.catalog import Weights
from resbackbone.checkpoints.hub.sources import locate
from resbackbone.checkpoints.layouts import Tensors
from resbackbone.checkpoints.readers.files import check_weights, not_loaded, read_file
from resbackbone.checkpoints.readers.placeholders import ADVICE, excerpt
from resbackbone.checkpoints.report import LoadReport
from resbackbone.checkpoints.selection import is_optimizer, is_swapped, is_training_state, role, unwrap, warn_of_copies
from resbackbone.data.preprocessing import CAFFE, DETECTRON, INCEPTION, TORCHVISION, UNIT_RANGE, Preprocessing
from resbackbone.layers.plugins import plugin_name
from resbackbone.utils.logs import log_info
from resbackbone.utils.validation import check_choice

# What a trainer saves beside weights and optimizers, which is not read; mmengine's names and Lightning's.
_NO_WEIGHTS = {"message_hub", "param_schedulers", "lr_scheduler", "scaler"}
_WRAPPING = "state_dict."  # of mmengine's checkpoints
_MAX_NAME = 1000  # characters in the name of a tensor
_COUNTER = "num_batches_tracked"  # old files lack it, frozen norms do not have it, and it influences nothing


class CheckpointTensors(NamedTuple):
    """What was read of a checkpoint.

    Attributes:
        tensors: Every tensor, by the names of all the mappings that lead to it, with dots between.
        known: What the catalog says of it; None if it does not have it.
        not_loaded: What else is in it that is not loaded: the class, and where it is.
        swapped: Whether it is mmengine's, whose ``ema_state_dict`` holds the raw weights.
        classes: The names of the classes that mmengine's trainings note; None without such a note.
    """

    tensors: Tensors
    known: Weights | None
    not_loaded: tuple[str, ...]
    swapped: bool
    classes: tuple[str, ...] | None


def load_checkpoint(
    net: nn.Module,
    source: str | Path,
    *,
    strict: Literal["backbone", "all"] | bool = "backbone",
    layout: str | None = None,
    prefix: str | None = None,
    expects: Literal["checkpoint", "torchvision"] = "checkpoint",
) -> LoadReport:
    """Load weights of whatever origin, all of them or none.

    Afterwards ``net.preprocessing`` says what the weights expect of an image. It is None where nobody says that: for
    weights trained on other than 3 channels or 1, or adapted to another number of channels.

    Args:
        net: The backbone. It changes only if the whole load succeeds.
        source: A local ``.pth``, ``.pt``, ``.bin``, ``.pkl``, ``.npz`` or ``.safetensors`` file, the index of shards, a
            folder that transformers' ``save_pretrained`` has written, a name of
            :func:`~resbackbone.checkpoints.list_weights`, a URL, or ``torchvision://``, ``open-mmlab://`` or
            ``mmcls://`` and a name. Nothing in it is executed.
        strict: "backbone" (or True): every tensor of the backbone must be there, and none that another backbone would
            have besides; heads are ignored and counted. "all": there must be no heads either, a classifier apart.
            False: what fits is loaded, and the report tells the rest.
        layout: The key layout; None to detect it.
        prefix: What stands before the backbone's keys, where a file has several; "" for nothing. None for the one that
            docs/weights.md says, with a warning that names the others.
        expects: "checkpoint" leaves the first convolution as it was trained; "torchvision" makes it take RGB images
            divided by torchvision's deviations, also where it was trained on BGR or undivided ones.

    Returns:
        What was loaded, ignored and changed.

    Raises:
        FileNotFoundError: If there is no such file.
        KeyError: If the name or ``layout`` is unknown.
        OSError: If a download fails.
        ValueError: If the file is damaged or holds anything but weights, or does not fit, which the error lists.
    """
    check_choice("strict", strict, ("backbone", "all", True, False))
    check_choice("expects", expects, ("checkpoint", "torchvision"))
    content = read_tensors(source)
    found = find_backbone(content.tensors, layout, prefix, swapped=content.swapped)
    expected = _trained_with(content.tensors) if content.known is None else content.known.preprocessing
    expected = expected or _usual_preprocessing(found, getattr(net, "style", "pytorch"))
    adapted = adapt(found.native, net, expected, absorb=expects == "torchvision")
    warn_of_copies(repr(str(source)), found.prefix, found.copies)
    notes = [f"the backbone below {found.prefix!r}"] if found.prefix else []
    notes += [f"not the one below {prefix!r}" for prefix in found.prefixes]
    report = _compare(
        net, adapted, found.others, source=str(source), layout=found.layout.name, notes=(*notes, *adapted.notes)
    )
    report = replace(report, not_loaded=content.not_loaded)
    if wrong := problems(report, strict):
        raise ValueError(
            f"{str(source)!r} does not fit {type(net).__name__}, nothing was changed: {report.summary()}: "
            + _first(wrong)
            + _advice(report)
        )
    weights = {key: adapted.tensors[key] for key in report.loaded}
    check_weights(weights)
    _fill(net, weights)
    net.preprocessing = adapted.expected  # type: ignore[assignment]
    log_info(f"{type(net).__name__}: {report.source}: {report.summary()}")
    return report


def _first(wrong: Iterable[str]) -> str:
    """Show the first of what does not fit."""
    return ", ".join(excerpt(text, 200) for text in list(wrong)[:5])


def _advice(report: LoadReport) -> str:
    """What the user can do about the commonest reasons for which nothing fits."""
    if any(".parametrizations." in name for name in report.unexpected):
        return "; weights are parametrized: call torch.nn.utils.parametrize.remove_parametrizations before saving"
    if {name.partition(".downsample.")[0] for name in report.unexpected} == {"layer1.0"}:
        return "; build the net with `project_first_block=True`"
    return ""


def load_pretrained(net: nn.Module, source: str | Path, *, prefix: str | None = None) -> None:
    """Load weights as an ``init_cfg`` of type "Pretrained" does: of a backbone in any key layout, else by own names.

    Args:
        net: A backbone, a module with a ``load_weights`` method, or any other module.
        source: As for :func:`load_checkpoint`, which says what is raised, too.
        prefix: As for :func:`load_checkpoint`.
    """
    if isinstance(net, PretrainedModule):
        load_checkpoint(net, source, prefix=prefix)
    elif prefix is None and hasattr(net, "load_weights"):
        net.load_weights(source)  # type: ignore[operator]
    else:
        load_module(net, source, prefix=prefix)


def load_module(net: nn.Module, source: str | Path, *, prefix: str | None = None) -> LoadReport:
    """Load the weights of a module that is no backbone, such as a neck, under its own names: all of them or none.

    Args:
        net: The module.
        source: As for :func:`load_checkpoint`.
        prefix: What stands before the module's names in the file; None to find out.

    Returns:
        What was loaded.

    Raises:
        FileNotFoundError, KeyError, OSError: As for :func:`load_checkpoint`.
        ValueError: If the file is damaged or holds anything but weights, several prefixes fit, or a tensor is missing,
            of another shape, or one that the module does not have.
    """
    content = read_tensors(source)
    own = net.state_dict()
    tensors = {unwrap(key): tensor for key, tensor in content.tensors.items()}
    swapped = content.swapped or is_swapped(content.tensors)
    below = _own_prefix(tensors, own, str(source), swapped=swapped) if prefix is None else unwrap(prefix)
    parts = {key: f".{key}".partition(f".{below}") for key in tensors}
    found = {rest.lstrip("."): tensors[key] for key, (_, matched, rest) in parts.items() if matched}
    missing = [key for key in own if key not in found and not key.endswith(_COUNTER)]
    alike = [key for key in own if key in found and _alike(found[key], own[key])]
    report = LoadReport(
        source=str(source),
        layout="own",
        loaded=tuple(alike),
        missing=tuple(missing),
        unexpected=tuple(key for key in found if key not in own),
        mismatched=tuple(
            f"{key} {_describe(found[key])} for {_describe(own[key])}"
            for key in own
            if key in found and key not in alike
        ),
        adapted=(f"below {below!r}",) if below else (),
        not_loaded=content.not_loaded,
    )
    if wrong := problems(report) or ([] if alike else ["nothing fits"]):
        raise ValueError(
            f"{str(source)!r} does not fit {type(net).__name__}, nothing was changed: {report.summary()}: "
            + _first(wrong)
        )
    weights = {key: found[key] for key in alike}
    check_weights(weights)
    _fill(net, weights)
    log_info(f"{type(net).__name__}: {report.source}: {report.summary()}")
    return report


def _own_prefix(tensors: Tensors, own: Mapping[str, Tensor], source: str, *, swapped: bool) -> str:
    """Return what stands before a module's own names; where no prefix has all of them, the one that has the most.

    Of copies in different roles the one is taken whose backbone would be.
    """
    first = next((key for key in own if not key.endswith(_COUNTER)), "")
    prefixes = [key[: len(key) - len(first)] for key in tensors if f".{key}".endswith(f".{first}")]
    needed = [key for key in own if not key.endswith(_COUNTER)]
    prefixes = [prefix for prefix in prefixes if not is_training_state(prefix)]
    whole = [prefix for prefix in prefixes if all(f"{prefix}{key}" in tensors for key in needed)]
    roles = {prefix: role(prefix, swapped=swapped) for prefix in whole}
    if len(set(roles.values())) > 1:
        whole = [prefix for prefix in whole if roles[prefix] == min(roles.values())]
        others = sorted(roles.keys() - set(whole))
        warn_of_copies(repr(source), whole[0], [] if swapped else others)
    if len(whole) > 1 and (plain := [prefix for prefix in whole if prefix in ("", _WRAPPING)]):
        return plain[0]
    if len(whole) > 1:
        places = " and ".join(repr(excerpt(prefix, 100)) for prefix in whole[:10])
        more = f" and {len(whole) - 10} more" if len(whole) > 10 else ""
        raise ValueError(f"{source!r} has these weights below {places}{more}; choose by `prefix`")
    counts = {prefix: sum(f"{prefix}{key}" in tensors for key in needed) for prefix in prefixes}
    return whole[0] if whole else max(counts, key=lambda prefix: counts[prefix], default="")


def _trained_with(tensors: Tensors) -> Preprocessing | None:
    """What a checkpoint of our own training says that its weights expect."""
    for name, channels in tensors.items():
        stem = name.removesuffix("channels")
        if name.endswith("data_preprocessor.channels") and {f"{stem}mean", f"{stem}std"} <= tensors.keys():
            mean, std = (tuple(tensors[f"{stem}{key}"].flatten().tolist()) for key in ("mean", "std"))
            if len(mean) not in (1, 3):
                return None  # no pictures; `adapt` says so of the weights, too
            return Preprocessing(mean, std, "RGB" if channels.tolist() == sorted(channels.tolist()) else "BGR")
    return None


def _usual_preprocessing(found: FoundBackbone, style: str) -> Preprocessing:
    """What weights of that layout for a net of that style most often expect, where nobody says."""
    layout = found.layout.name
    if layout == "caffe2":
        return DETECTRON
    if layout == "bit":
        return INCEPTION
    if layout in ("rtdetr", "huggingface") and "stem.0.weight" in found.native and _has_decoder(found.others):
        return UNIT_RANGE
    return CAFFE if layout == "detectron2" or style == "caffe" else TORCHVISION


def _has_decoder(names: Iterable[str]) -> bool:
    """Whether weights come out of a whole RT-DETR, which was trained on other images than its backbone before."""
    return any("decoder" in name.split(".") for name in names)


def read_tensors(source: str | Path) -> CheckpointTensors:
    """Read a checkpoint's tensors, and what the catalog says of it.

    Args:
        source: As for :func:`load_checkpoint`, which says what is raised, too.
    """
    path, known = locate(source)
    content = read_file(path, skipped=_is_skipped)
    try:
        tensors = dict(_flatten(content))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} {error}") from error
    left = not_loaded(content)
    if left and not tensors:
        raise ValueError(f"{str(path)!r} has no tensors by name, and of what it has was not loaded {left[0]}; {ADVICE}")
    swapped = "ema_state_dict" in content and "meta" in content
    return CheckpointTensors(tensors, known, left, swapped, class_names(content))


def read_content(source: str | Path) -> dict[str, Any]:
    """Read a checkpoint's tensors and plain values as its file nests them, without the optimizer's state.

    Args:
        source: As for :func:`load_checkpoint`, which says what is raised, too.
    """
    return read_file(locate(source)[0], skipped=_is_skipped)


def class_names(checkpoint: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of the classes that a checkpoint of mmengine's kind notes; None if it notes none."""
    names: Any = checkpoint
    for key in ("meta", "dataset_meta", "classes"):
        names = names.get(key) if isinstance(names, Mapping) else None
    well_formed = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return tuple(names) if well_formed else None


def _is_skipped(key: object) -> bool:
    return key in _NO_WEIGHTS or is_optimizer(key)


def _flatten(content: Mapping[Any, Any], keys: tuple[str, ...] = (), length: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with the keys that lead to it; a file's wrappings are prefixes like any other.

    Keys are joined only at a tensor and after their length was checked: small files can repeat a long key without end.

    Raises:
        ValueError: If a name is longer than names of tensors are.
    """
    for position, (key, value) in enumerate(content.items()):
        if not isinstance(value, (Tensor, Mapping)):
            continue
        text = _key_text(key, position)
        below = length + len(text) + 1
        if isinstance(value, Mapping):
            yield from _flatten(value, (*keys, text), below)
        elif below > _MAX_NAME:
            start = excerpt(keys[0] if keys else text, 40)
            raise ValueError(
                f"has a tensor with a name of {below:,} characters, which begins with {start!r}; "
                f"names of at most {_MAX_NAME:,} are read"
            )
        else:
            yield ".".join((*keys, text)), value


def _key_text(key: object, position: int) -> str:
    """What a mapping's key adds to the names below it; for what is neither text nor a number, where it stands."""
    if isinstance(key, str):
        return key
    return str(key) if isinstance(key, int) and abs(key) < 2**63 else f"{type(key).__name__} {position}"


def _compare(
    net: nn.Module, adapted: Adapted, others: tuple[str, ...], *, source: str, layout: str, notes: tuple[str, ...]
) -> LoadReport:
    own, tensors = net.state_dict(), adapted.tensors
    dispensable = _dispensable(net)
    absent = [key for key in own if key not in tensors]
    extra = [key for key in tensors if key not in own]
    # What lies in no part that the net has is a head's, a later stage's, or another stem's, whose own lack is an error.
    parts = {name for name, _ in net.named_children()}
    unexpected = [key for key in extra if key.partition(".")[0] in parts and not key.endswith(_COUNTER)]
    mismatched = {
        key: f"{key} {_describe(tensors[key])} for {_describe(own[key])}"
        for key in own
        if key in tensors and not _alike(tensors[key], own[key])
    }
    return LoadReport(
        source=source,
        layout=layout,
        loaded=tuple(key for key in own if key in tensors and key not in mismatched),
        missing=tuple(key for key in absent if key not in dispensable),
        kept=tuple(key for key in absent if key in dispensable),
        unexpected=tuple(unexpected),
        ignored=(*(key for key in extra if key not in unexpected), *others),
        mismatched=tuple(mismatched.values()),
        adapted=notes,
    )


def _dispensable(net: nn.Module) -> set[str]:
    """The keys that a checkpoint need not have: counters, the user's plugins, what begins as if it were not there."""
    cfgs = [plugin["cfg"] for plugin in getattr(net, "plugins", None) or ()]
    plugins = [plugin_name(cfg, cfg.get("postfix", "")) for cfg in cfgs]
    neutral = tuple(
        f"{name}.{child}".lstrip(".")
        for name, module in net.named_modules()
        for child in (*getattr(module, "optional_keys", ()), *(plugins if isinstance(module, ResidualBlock) else ()))
    )
    return {key for key in net.state_dict() if key.endswith(_COUNTER) or key.startswith(neutral)}


def _alike(tensor: Tensor, own: Tensor) -> bool:
    return tensor.shape == own.shape and tensor.is_floating_point() == own.is_floating_point()


def _describe(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" of {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"


def problems(report: LoadReport, strict: str | bool = "backbone") -> list[str]:
    """List what of a report forbids to load it under ``strict``; see :func:`load_checkpoint`."""
    if strict is False:
        return [] if report.loaded else ["nothing fits"]
    heads = report.ignored if strict == "all" else ()
    heads = tuple(key for key in heads if not key.startswith("fc."))
    return [*report.mismatched, *report.missing, *report.unexpected, *heads]


def _fill(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write the weights into the net; one on the meta device gets memory of its own for them."""
    meta = [key for key, tensor in net.state_dict().items() if tensor.is_meta]
    if left := [key for key in meta if key not in weights]:
        raise ValueError(f"{left[0]!r} and {len(left) - 1} more are on the meta device and not in the checkpoint")
    if meta:
        weights = {key: tensor.clone() for key, tensor in weights.items()}
    net.load_state_dict(weights, strict=False, assign=bool(meta))
