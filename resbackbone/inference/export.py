"""Export a net to a file that runs without this library; its outputs are compared with the net's first."""

from __future__ import annotations

import copy
import importlib.util
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from resbackbone.backbones.base import Backbone
from resbackbone.backbones.feature_info import FeatureInfo
from resbackbone.data.preprocessing import preprocessing_of
from resbackbone.inference.copying import copy_for_inference
from resbackbone.inference.export_formats import FORMATS, Axes, ExportFormat
from resbackbone.inference.levels import FeatureMaps, backbone_of, read_levels
from resbackbone.inference.progress import quiet_libraries, step
from resbackbone.utils import processor
from resbackbone.utils.atomic_write import atomic_write
from resbackbone.utils.logs import log_info
from resbackbone.utils.validation import check_choice, check_ints, check_type, warn_user

if TYPE_CHECKING:  # takes a second to import
    from torch.export import ExportedProgram

AXES = {0: "batch", 2: "height", 3: "width"}
# Batch, and height and width in the largest stride and pixels beyond, that a net is recorded with, and that the file is
# checked on: the last map has two pixels or more. Halved and rounded up, the first stay odd down to the last map: of a
# pooling that nothing is left over of, Inductor believes that nothing ever will be.
RECORDED = (2, (3, 1), (2, 1))
CHECKED = ((1, (2, 0), (3, 0)), (3, (3, 5), (2, 11)))
LEAST_STRIDE = 32  # where the largest is smaller, as if it were this


@dataclass(frozen=True)
class Exported:
    """What :func:`export` made.

    Attributes:
        path: The file.
        levels: Its outputs, in order.
        differences: By the level's name, the largest difference from the net in float32 that the check found, relative
            to the level's largest number.
    """

    path: Path
    levels: tuple[FeatureInfo, ...]
    differences: Mapping[str, float]


def export(
    net: nn.Module,
    path: str | Path,
    to: Literal["onnx", "torch-export", "aoti"] = "onnx",
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    size: tuple[int, int] | None = None,
    levels: Sequence[FeatureInfo] | None = None,
    metadata: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = log_info,
) -> Exported:
    """Write a net, as it computes in evaluation on a CPU, to a file that takes batches and images of any size.

    The file is first written under another name and run there, on batches and sizes that the net was not recorded
    with. Only if every level is what the net computes does it appear under its own name, whole.

    Args:
        net: A backbone, or a model that has one and returns feature maps, as a tensor, or a tuple, list or dict of
            them, such as ``nn.Sequential(net, fpn)``; or a detector or segmentor, of which ``backbone`` and ``neck``
            are exported, without heads. It stays as it is.
        path: The file: ``.onnx``, or ``.pt2`` for the others. An earlier one is replaced.
        to: "onnx"; "torch-export", which ``torch.export.load`` reads; or "aoti", compiled for this machine's kind of
            processor, which ``torch._inductor.aoti_load_package`` reads.
        dtype: Of the file's input, computation and outputs.
        size: Height and width in pixels, to fix them; the batch varies still.
        levels: Name, channels and stride of each output. Unless given, they are the backbone's ``feature_info``, or
            read off the outputs: called as the keys of a dict, or p2 for stride 4, p3 for stride 8 and so on.
        metadata: What the file shall say about itself beside dtype, levels and preprocessing, as JSON has it.
        report: Called with a line as each step begins, and every 15 seconds of a longer one; writes to the log, with
            level INFO, unless given.

    Returns:
        Where the file is, and how far it is from the net.

    Raises:
        ImportError: If a package that the format needs is not installed.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument does not fit, the net cannot be exported so, or the file computes something else.
        OSError: If the file cannot be written, FileNotFoundError if its folder does not exist.
    """
    check_choice("to", to, tuple(FORMATS))
    form = FORMATS[to]
    check_choice("dtype", dtype, form.dtypes)
    path = Path(path)
    _check_path(path, form)
    _check_packages(form)
    if to == "aoti" and not processor.computes_natively(getattr(torch, dtype)):
        warn_user(
            f"{processor.reason(getattr(torch, dtype))}: the compiled file, which is for processors like it, will be "
            "several times slower than in float32; pass dtype='float32'"
        )
    backbone = backbone_of(net)
    if levels is not None:
        levels = _check_levels(levels)
    facts = _facts(backbone, dtype, metadata or {})
    _check_bytes(net, getattr(torch, dtype), form)
    maps = FeatureMaps(net)
    found = read_levels(net, maps)
    levels = _agreed_levels(found, levels)
    facts["levels"] = [{"name": level.name, "channels": level.channels, "stride": level.stride} for level in levels]

    whole = net if isinstance(net, Backbone) else maps  # a backbone's tensors keep their names
    exact = copy_for_inference(whole).cpu().float()
    model = copy.deepcopy(exact).to(getattr(torch, dtype))
    recorded, *checked = _shapes(backbone.in_channels, size, max(level.stride for level in found))
    axes = AXES if size is None else {0: AXES[0]}
    with torch.no_grad(), atomic_write(path) as temporary:
        name = type(net).__name__
        cannot = f"{name} cannot be exported to {to}"
        with step(f"recording {name}", report):
            examples = [_compute(exact, model, shape, levels) for shape in checked]
            with _in_words(cannot):
                program = _record(form.prepare(model), examples[0].images.new_zeros(recorded), axes)
        with step(form.writing.format(path.name), report), _in_words(cannot, form.hint):
            form.write(program, temporary, [level.name for level in levels], axes, facts)
        with step(f"checking {path.name}", report):
            differences = _check(form, temporary, examples, levels)
    return Exported(path, levels, differences)


class _Example(NamedTuple):
    """Images, what the net makes of them, and what it does in float32."""

    images: Tensor
    outs: tuple[Tensor, ...]
    exact: tuple[Tensor, ...]


def _check_path(path: Path, form: ExportFormat) -> None:
    if path.suffix != form.suffix:
        raise ValueError(f"`path` must end in {form.suffix!r} for this format, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(path.parent)!r} to write {path.name} into")


def _check_packages(form: ExportFormat) -> None:
    missing = [name for name in form.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"exporting to {form.suffix} files needs {', '.join(missing)}; pip install 'resbackbone[export]'"
        )


def _check_levels(levels: Sequence[FeatureInfo]) -> tuple[FeatureInfo, ...]:
    for index, level in enumerate(levels):
        check_type(f"levels[{index}]", level, FeatureInfo, "a FeatureInfo")
    names = [level.name for level in levels]
    if len(set(names)) < len(names):
        raise ValueError(f"each of `levels` must have a name of its own, got {', '.join(names)}")
    return tuple(levels)


def _check_bytes(net: nn.Module, dtype: torch.dtype, form: ExportFormat) -> None:
    needed = sum(tensor.numel() for tensor in net.state_dict().values()) * dtype.itemsize
    if needed >= form.max_bytes:
        raise ValueError(
            f"{form.suffix} files hold at most {form.max_bytes / 2**30:.3g} GiB, the weights of {type(net).__name__} "
            f"take {needed / 2**30:.3g} GiB; take a smaller `dtype` or another format"
        )


def _agreed_levels(found: tuple[FeatureInfo, ...], levels: tuple[FeatureInfo, ...] | None) -> tuple[FeatureInfo, ...]:
    """Return the levels as the user calls them, if the user does."""
    if levels is None:
        return found
    if len(levels) != len(found):
        raise ValueError(f"`levels` must be as many as the net's outputs, got {len(levels)} for {len(found)}")
    for index, (level, actual) in enumerate(zip(levels, found, strict=True)):
        if level.channels != actual.channels:
            raise ValueError(
                f"`levels[{index}]` must have the {actual.channels} channels of the net's output, got {level.channels}"
            )
    return levels


def _shapes(channels: int, size: tuple[int, int] | None, stride: int) -> list[tuple[int, ...]]:
    """The shape of the images that the net is recorded with, and those of the ones that the file is checked on."""
    if size is not None:
        height, width = check_ints("size", size, low=1, length=2, why="height, width")
        return [(batch, channels, height, width) for batch, *_ in (RECORDED, *CHECKED)]
    stride = max(stride, LEAST_STRIDE)
    return [
        (batch, channels, *(count * stride + beyond for count, beyond in sides))
        for batch, *sides in (RECORDED, *CHECKED)
    ]


def _facts(backbone: Backbone, dtype: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says about itself, beside its levels."""
    try:
        preprocessing = preprocessing_of(backbone)
    except ValueError:  # of tensors that are no pictures nobody says it
        preprocessing = None
    facts = {
        "type": type(backbone).__name__,
        "dtype": dtype,
        "preprocessing": None if preprocessing is None else asdict(preprocessing),
        **metadata,
    }
    json.dumps(facts)  # raises here and not after minutes
    return facts


def _compute(exact: nn.Module, model: nn.Module, shape: Sequence[int], levels: Sequence[FeatureInfo]) -> _Example:
    """Compute what the file must reproduce.

    Raises:
        ValueError: If the net computes numbers that nothing can be compared with.
    """
    images = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    wanted = exact(images)
    images = images.to(next(model.parameters()).dtype)
    outs = model(images)
    for level, out in zip(levels, outs, strict=True):
        if not out.isfinite().all():
            raise ValueError(f"in {out.dtype} {level.name} is infinite or NaN; take another `dtype`, or other weights")
    return _Example(images, tuple(outs), tuple(wanted))


def _record(model: nn.Module, images: Tensor, axes: Axes) -> ExportedProgram:
    varying = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    return torch.export.export(model, (images,), dynamic_shapes=(varying,))


def _check(
    form: ExportFormat, path: Path, examples: Sequence[_Example], levels: Sequence[FeatureInfo]
) -> dict[str, float]:
    """Return how far each level of the file is from the net.

    Raises:
        ValueError: If that is too far, or the file does not run.
    """
    worst = dict.fromkeys([level.name for level in levels], 0.0)
    with _in_words("the exported file does not run, and was not kept"):
        run = form.load(path)
    for images, own, exact in examples:
        with _in_words(f"the exported file does not run on images {tuple(images.shape)}, and was not kept"):
            outs = run(images)
        for name, out, other, wanted in zip(worst, outs, own, exact, strict=True):
            if (out.shape, out.dtype) != (other.shape, other.dtype):
                raise ValueError(
                    f"the exported file was not kept: {name} of images {tuple(images.shape)} is {tuple(out.shape)} "
                    f"{out.dtype} there, {tuple(other.shape)} {other.dtype} in the net"
                )
            # In half precision the net itself is as far from float32, and the file rounds elsewhere.
            allowed = max(form.tolerance, 2 * _difference(other, wanted))
            difference = _difference(out, wanted)
            if not difference <= allowed:  # nor if it is NaN
                raise ValueError(
                    f"the exported file was not kept: {name} of images {tuple(images.shape)} is {difference:.1e} of "
                    f"its largest number away from the net's, where {allowed:.1e} is allowed"
                )
            worst[name] = max(worst[name], difference)
    return worst


def _difference(out: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    largest = wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny)
    return ((out.float() - wanted).abs().max() / largest).item()


@contextmanager
def _in_words(what: str, hint: str = "") -> Iterator[None]:
    """Say in one line what another library raises, of whatever kind, and leave out its warnings, about itself.

    Raises:
        ValueError: In place of anything but an OSError.
    """
    try:
        with quiet_libraries():
            yield
    except OSError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{what}: {textwrap.shorten(reason, 300)}{hint}") from error
