"""Load checkpoints into modules: all tensors or none, with a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from resbackbone.backbones.pretrained import PretrainedModule
from resbackbone.blocks.base import ResidualBlock
from resbackbone.checkpoints.adapt import adapt, usual_preprocessing
from resbackbone.checkpoints.conversion import find_backbone
from resbackbone.checkpoints.layouts import Tensors
from resbackbone.checkpoints.report import LoadReport
from resbackbone.checkpoints.selection import is_mmengine, is_training_state, role, unwrap, warn_of_copies
from resbackbone.checkpoints.tensors import check_weights, read_tensors
from resbackbone.layers.plugins import plugin_name
from resbackbone.utils.logs import log_info
from resbackbone.utils.validation import check_choice, excerpt

_MMENGINE_PREFIX = "state_dict."  # of the weights in mmengine's checkpoints
_COUNTER = "num_batches_tracked"  # missing in old files and frozen norms, and without influence on outputs


def load_checkpoint(
    net: nn.Module,
    source: str | Path,
    *,
    strict: Literal["backbone", "all"] | bool = "backbone",
    layout: str | None = None,
    prefix: str | None = None,
    normalization: Literal["checkpoint", "torchvision"] = "checkpoint",
) -> LoadReport:
    """Load a third-party checkpoint into a backbone: all of its tensors or none.

    Afterwards ``net.preprocessing`` says what the weights expect of an image. It is None where that is unknown: for
    weights trained on other than 3 channels or 1, or adapted to another number of channels.

    Args:
        net: The backbone. It changes only if the whole load succeeds.
        source: A local ``.pth``, ``.pt``, ``.bin``, ``.pkl``, ``.npz`` or ``.safetensors`` file, the index of shards, a
            folder written by transformers' ``save_pretrained``, a name of
            :func:`~resbackbone.checkpoints.list_weights`, a URL, or ``torchvision://``, ``open-mmlab://`` or
            ``mmcls://`` and a name. No code in it is run.
        strict: "backbone" (or True): every tensor of the backbone must be in the checkpoint, and no other tensor of the
            same parts; heads are ignored and counted. "all": no heads are allowed either, except a classifier. False:
            what fits is loaded, and the report lists the rest.
        layout: The key layout; None to detect it.
        prefix: The prefix of the backbone's keys, for a checkpoint of several backbones; "" for no prefix. None selects
            the one that docs/weights.md describes, with a warning that names the others.
        normalization: "checkpoint" keeps the first convolution as it was trained; "torchvision" folds order and std of
            the channels into it, so that it accepts RGB images divided by torchvision's std.

    Returns:
        What was loaded, ignored and changed.

    Raises:
        FileNotFoundError: If there is no such file.
        KeyError: If the name or ``layout`` is unknown.
        OSError: If a download fails.
        ValueError: If the file is damaged or holds anything but weights, or does not fit, which the error lists.
    """
    check_choice("strict", strict, ("backbone", "all", True, False))
    check_choice("normalization", normalization, ("checkpoint", "torchvision"))
    content = read_tensors(source)
    found = find_backbone(content.tensors, layout, prefix, from_mmengine=content.from_mmengine)
    preprocessing = content.preprocessing or usual_preprocessing(found, getattr(net, "style", "pytorch"))
    adapted = adapt(found.native, net, preprocessing, normalization)
    warn_of_copies(repr(str(source)), found.prefix, found.copies)
    notes = [f"backbone with prefix {found.prefix!r}"] if found.prefix else []
    notes += [f"not the backbone with prefix {other!r}" for other in found.other_prefixes]
    report = _compare(net, adapted.tensors, found.others)
    report = replace(
        report,
        source=str(source),
        layout=found.layout.name,
        adapted=(*notes, *adapted.notes),
        not_loaded=content.not_loaded,
    )
    _fill(net, adapted.tensors, report, strict)
    net.preprocessing = adapted.preprocessing  # type: ignore[assignment]
    return report


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
    """Load a checkpoint into a module that is not a backbone, such as a neck: all of its tensors or none.

    Args:
        net: The module.
        source: As for :func:`load_checkpoint`.
        prefix: The prefix of the module's keys in the checkpoint; None to detect it.

    Returns:
        What was loaded.

    Raises:
        FileNotFoundError, KeyError, OSError: As for :func:`load_checkpoint`.
        ValueError: If the file is damaged or holds anything but weights, several prefixes fit, or a tensor is missing,
            unexpected or of another shape.
    """
    content = read_tensors(source)
    tensors = {unwrap(key): tensor for key, tensor in content.tensors.items()}
    if prefix is None:
        from_mmengine = content.from_mmengine or is_mmengine(content.tensors)
        prefix = _detect_prefix(tensors, net.state_dict(), str(source), from_mmengine=from_mmengine)
    else:
        prefix = unwrap(prefix)
    parts = {key: f".{key}".partition(f".{prefix}") for key in tensors}
    found = {rest.lstrip("."): tensors[key] for key, (_, matched, rest) in parts.items() if matched}
    own = net.state_dict()
    mismatched = _mismatched(found, own)
    report = LoadReport(
        source=str(source),
        layout="own",
        loaded=tuple(key for key in own if key in found and key not in mismatched),
        missing=tuple(key for key in own if key not in found and not key.endswith(_COUNTER)),
        unexpected=tuple(key for key in found if key not in own),
        mismatched=tuple(mismatched.values()),
        adapted=(f"prefix {prefix!r}",) if prefix else (),
        not_loaded=content.not_loaded,
    )
    _fill(net, found, report)
    return report


def _fill(
    net: nn.Module, tensors: Tensors, report: LoadReport, strict: Literal["backbone", "all"] | bool = "backbone"
) -> None:
    """Copy the tensors that a report lists as loaded into a module, unless the report has problems.

    Raises:
        ValueError: If it has, or if a tensor is not usable as weights.
    """
    if wrong := report.problems(strict):
        raise ValueError(
            f"{report.source!r} does not fit {type(net).__name__}, nothing was changed: {report.summary()}: "
            + ", ".join(excerpt(text, 200) for text in wrong[:5])
            + _advice(report)
        )
    weights = {key: tensors[key] for key in report.loaded}
    check_weights(weights)
    meta = [key for key, tensor in net.state_dict().items() if tensor.is_meta]
    if left := [key for key in meta if key not in weights]:
        raise ValueError(f"{left[0]!r} and {len(left) - 1} more are on the meta device and not in the checkpoint")
    if meta:  # the model gets memory of its own
        weights = {key: tensor.clone() for key, tensor in weights.items()}
    net.load_state_dict(weights, strict=False, assign=bool(meta))
    log_info(f"{type(net).__name__}: {report.source}: {report.summary()}")


def _advice(report: LoadReport) -> str:
    """Return what to do about the commonest reasons for which nothing fits."""
    if any(".parametrizations." in name for name in report.unexpected):
        return "; weights are parametrized: call torch.nn.utils.parametrize.remove_parametrizations before saving"
    if {name.partition(".downsample.")[0] for name in report.unexpected} == {"layer1.0"}:
        return "; build the net with `project_first_block=True`"
    return ""


def _detect_prefix(tensors: Tensors, own: Mapping[str, Tensor], source: str, *, from_mmengine: bool) -> str:
    """Return the prefix of a module's keys; if no prefix has all of them, the one that has most.

    Of copies in different roles (averaged weights, say) the one is selected whose backbone would be.
    """
    needed = [key for key in own if not key.endswith(_COUNTER)]
    first = next(iter(needed), "")
    prefixes = [key[: len(key) - len(first)] for key in tensors if f".{key}".endswith(f".{first}")]
    prefixes = [prefix for prefix in prefixes if not is_training_state(prefix)]
    whole = [prefix for prefix in prefixes if all(f"{prefix}{key}" in tensors for key in needed)]
    roles = {prefix: role(prefix, from_mmengine=from_mmengine) for prefix in whole}
    if len(set(roles.values())) > 1:
        whole = [prefix for prefix in whole if roles[prefix] == min(roles.values())]
        others = sorted(roles.keys() - set(whole))
        warn_of_copies(repr(source), whole[0], [] if from_mmengine else others)
    if len(whole) > 1 and (plain := [prefix for prefix in whole if prefix in ("", _MMENGINE_PREFIX)]):
        return plain[0]
    if len(whole) > 1:
        places = " and ".join(repr(excerpt(prefix, 100)) for prefix in whole[:10])
        more = f" and {len(whole) - 10} more" if len(whole) > 10 else ""
        raise ValueError(f"{source!r} has these weights with the prefixes {places}{more}; choose one by `prefix`")
    counts = {prefix: sum(f"{prefix}{key}" in tensors for key in needed) for prefix in prefixes}
    return whole[0] if whole else max(counts, key=lambda prefix: counts[prefix], default="")


def _compare(net: nn.Module, tensors: Tensors, others: tuple[str, ...]) -> LoadReport:
    """Compare weights with the state dict of a backbone; ``others`` are the other keys of the checkpoint."""
    own = net.state_dict()
    optional = _optional_keys(net)
    absent = [key for key in own if key not in tensors]
    extra = [key for key in tensors if key not in own]
    # Keys of parts that the net does not have belong to a head, a later stage or another stem; without that stem, keys
    # of the net's own are missing, which is an error.
    parts = {name for name, _ in net.named_children()}
    unexpected = [key for key in extra if key.partition(".")[0] in parts and not key.endswith(_COUNTER)]
    mismatched = _mismatched(tensors, own)
    return LoadReport(
        loaded=tuple(key for key in own if key in tensors and key not in mismatched),
        missing=tuple(key for key in absent if key not in optional),
        kept=tuple(key for key in absent if key in optional),
        unexpected=tuple(unexpected),
        ignored=(*(key for key in extra if key not in unexpected), *others),
        mismatched=tuple(mismatched.values()),
    )


def _optional_keys(net: nn.Module) -> set[str]:
    """Return the keys that a checkpoint need not have: counters, the user's plugins, layers initialized as identity."""
    cfgs = [plugin["cfg"] for plugin in getattr(net, "plugins", None) or ()]
    plugins = [plugin_name(cfg, cfg.get("postfix", "")) for cfg in cfgs]
    starts = tuple(
        f"{name}.{child}".lstrip(".")
        for name, module in net.named_modules()
        for child in (*getattr(module, "optional_keys", ()), *(plugins if isinstance(module, ResidualBlock) else ()))
    )
    return {key for key in net.state_dict() if key.endswith(_COUNTER) or key.startswith(starts)}


def _mismatched(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the keys whose shapes differ, or of which one is floating point, with both shapes."""
    return {
        key: f"{key} {_describe(tensors[key])} for {_describe(wanted)}"
        for key, wanted in own.items()
        if key in tensors
        and (tensors[key].shape, tensors[key].is_floating_point()) != (wanted.shape, wanted.is_floating_point())
    }


def _describe(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" of {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"
