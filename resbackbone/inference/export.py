"""Export a net to a file that runs without this library, after comparing the file's outputs with the net's."""

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
from resbackbone.inference.engines import copy_for_inference
from resbackbone.inference.export_formats import EXPORT_FORMATS, AxisNames, ExportFormat
from resbackbone.inference.levels import HeadlessModel, first_backbone, infer_levels
from resbackbone.inference.progress import report_progress, silence_libraries
from resbackbone.utils import processor
from resbackbone.utils.atomic_write import atomic_write
from resbackbone.utils.logs import log_info
from resbackbone.utils.validation import check_choice, check_ints, check_type, warn_user

if TYPE_CHECKING:  # takes a second to import
    from torch.export import ExportedProgram

AXIS_NAMES = {0: "batch", 2: "height", 3: "width"}
# Shapes of the images that a net is traced with, and that the file is checked on: the batch, then height and width as a
# multiple of the largest stride plus a remainder. The last map has two pixels or more. The sides of the traced image,
# halved and rounded up, stay odd down to the last map: if a pooling has no remainder there, Inductor assumes none ever.
TRACED_SHAPE = (2, (3, 1), (2, 1))
CHECKED_SHAPES = ((1, (2, 0), (3, 0)), (3, (3, 5), (2, 11)))
MIN_STRIDE = 32  # assumed where the largest stride is smaller


@dataclass(frozen=True)
class ExportResult:
    """What :func:`export` wrote.

    Attributes:
        path: The file.
        levels: Its outputs, in order.
        differences: For each level by name, the largest difference from the net in float32 in the check, relative to
            the level's largest value.
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
) -> ExportResult:
    """Export a net, in eval mode on a CPU, to a file that accepts batches and images of any size.

    The file is first written under a temporary name and run, on batches and sizes that the net was not traced with.
    Only if every level agrees with the net's is it moved to its path.

    Args:
        net: A backbone; or a model that contains one and returns feature maps, as a tensor, or a tuple, list or dict of
            tensors, such as ``nn.Sequential(net, fpn)``; or a detector or segmentor, of which ``backbone`` and ``neck``
            are exported, without heads. It is not changed.
        path: The file: ``.onnx``, or ``.pt2`` for the other formats. An earlier file is replaced.
        to: "onnx"; "torch-export", for ``torch.export.load``; or "aoti", compiled ahead of time for this machine's kind
            of processor, for ``torch._inductor.aoti_load_package``.
        dtype: Dtype of the file's input, computation and outputs.
        size: Fixed height and width in pixels, with a dynamic batch size; None for dynamic sizes.
        levels: Name, channels and stride of each output; None for the backbone's ``feature_info``, or levels inferred
            from the outputs, with the keys of a dict as names, or p2 for stride 4, p3 for stride 8 and so on.
        metadata: Entries to add to the file's metadata of dtype, levels and preprocessing; JSON serializable.
        report: Called with a line as each step begins, and every 15 seconds of a long one; logs at level INFO by
            default.

    Returns:
        The path, the levels, and how far they are from the net's.

    Raises:
        ImportError: If a package that the format needs is not installed.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is invalid, the net cannot be exported, or the file computes something else.
        OSError: If the file cannot be written, FileNotFoundError if its folder does not exist.
    """
    check_choice("to", to, tuple(EXPORT_FORMATS))
    export_format = EXPORT_FORMATS[to]
    check_choice("dtype", dtype, export_format.dtypes)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    path = Path(path)
    _check_path(path, export_format)
    _check_packages(export_format)
    if to == "aoti" and not processor.computes_natively(torch_dtype):
        warn_user(
            f"{processor.reason(torch_dtype)}: the compiled file, which is for processors like it, will be "
            "several times slower than in float32; pass dtype='float32'"
        )
    backbone = first_backbone(net)
    if levels is not None:
        levels = _check_levels(levels)
    file_metadata = _file_metadata(backbone, dtype, metadata or {})
    _check_weight_bytes(net, torch_dtype, export_format)
    headless = HeadlessModel(net)
    inferred = infer_levels(net, headless)
    levels = _match_levels(inferred, levels)
    file_metadata["levels"] = [
        {"name": level.name, "channels": level.channels, "stride": level.stride} for level in levels
    ]

    exact = copy_for_inference(net if isinstance(net, Backbone) else headless).cpu().float()
    model = copy.deepcopy(exact).to(torch_dtype)
    traced_shape, *checked_shapes = _shapes(backbone.in_channels, size, max(level.stride for level in inferred))
    axes = AXIS_NAMES if size is None else {0: AXIS_NAMES[0]}
    with torch.no_grad(), atomic_write(path) as temporary:
        name = type(net).__name__
        failed = f"{name} cannot be exported to {to}"
        with report_progress(f"tracing {name}", report):
            examples = [_compute(exact, model, shape, levels) for shape in checked_shapes]
            with _library_errors(failed):
                images = examples[0].images.new_zeros(traced_shape)
                program = _trace(export_format.prepare(model), images, axes)
        writing = export_format.writing.format(path.name)
        with report_progress(writing, report), _library_errors(failed, export_format.hint):
            export_format.write(program, temporary, [level.name for level in levels], axes, file_metadata)
        with report_progress(f"checking {path.name}", report):
            differences = _check_file(export_format, temporary, examples, levels)
    return ExportResult(path, levels, differences)


class _Example(NamedTuple):
    """Images, the net's outputs for them, and the outputs of the net in float32."""

    images: Tensor
    outs: tuple[Tensor, ...]
    exact: tuple[Tensor, ...]


def _check_path(path: Path, export_format: ExportFormat) -> None:
    if path.suffix != export_format.suffix:
        raise ValueError(f"`path` must end in {export_format.suffix!r} for this format, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(path.parent)!r} to write {path.name} into")


def _check_packages(export_format: ExportFormat) -> None:
    missing = [name for name in export_format.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"exporting to {export_format.suffix} files needs {', '.join(missing)}; pip install 'resbackbone[export]'"
        )


def _check_levels(levels: Sequence[FeatureInfo]) -> tuple[FeatureInfo, ...]:
    for index, level in enumerate(levels):
        check_type(f"levels[{index}]", level, FeatureInfo, "a FeatureInfo")
    names = [level.name for level in levels]
    if len(set(names)) < len(names):
        raise ValueError(f"each of `levels` must have a name of its own, got {', '.join(names)}")
    return tuple(levels)


def _check_weight_bytes(net: nn.Module, dtype: torch.dtype, export_format: ExportFormat) -> None:
    needed = sum(tensor.numel() for tensor in net.state_dict().values()) * dtype.itemsize
    if needed >= export_format.max_bytes:
        raise ValueError(
            f"{export_format.suffix} files hold at most {export_format.max_bytes / 2**30:.3g} GiB, the weights of "
            f"{type(net).__name__} take {needed / 2**30:.3g} GiB; choose a smaller `dtype` or another format"
        )


def _match_levels(inferred: tuple[FeatureInfo, ...], levels: tuple[FeatureInfo, ...] | None) -> tuple[FeatureInfo, ...]:
    """Return the user's levels if there are any, checked against the inferred ones."""
    if levels is None:
        return inferred
    if len(levels) != len(inferred):
        raise ValueError(f"`levels` must be as many as the net's outputs, got {len(levels)} for {len(inferred)}")
    for index, (level, actual) in enumerate(zip(levels, inferred, strict=True)):
        if level.channels != actual.channels:
            raise ValueError(
                f"`levels[{index}]` must have the {actual.channels} channels of the net's output, got {level.channels}"
            )
    return levels


def _shapes(channels: int, size: tuple[int, int] | None, stride: int) -> list[tuple[int, ...]]:
    """Return the shape of the images that the net is traced with, and those that the file is checked on."""
    if size is not None:
        height, width = check_ints("size", size, low=1, length=2, why="height, width")
        return [(batch, channels, height, width) for batch, *_ in (TRACED_SHAPE, *CHECKED_SHAPES)]
    stride = max(stride, MIN_STRIDE)
    return [
        (batch, channels, *(count * stride + remainder for count, remainder in sides))
        for batch, *sides in (TRACED_SHAPE, *CHECKED_SHAPES)
    ]


def _file_metadata(backbone: Backbone, dtype: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file's metadata, without its levels."""
    try:
        preprocessing = preprocessing_of(backbone)
    except ValueError:  # unknown for inputs that are no pictures
        preprocessing = None
    file_metadata = {
        "type": type(backbone).__name__,
        "dtype": dtype,
        "preprocessing": None if preprocessing is None else asdict(preprocessing),
        **metadata,
    }
    json.dumps(file_metadata)  # raises here and not after minutes
    return file_metadata


def _compute(exact: nn.Module, model: nn.Module, shape: Sequence[int], levels: Sequence[FeatureInfo]) -> _Example:
    """Compute outputs that the file must reproduce.

    Raises:
        ValueError: If outputs are infinite or NaN, which cannot be compared.
    """
    images = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    exact_outs = exact(images)
    images = images.to(next(model.parameters()).dtype)
    outs = model(images)
    for level, out in zip(levels, outs, strict=True):
        if not out.isfinite().all():
            raise ValueError(
                f"in {out.dtype} {level.name} is infinite or NaN; choose another `dtype`, or other weights"
            )
    return _Example(images, tuple(outs), tuple(exact_outs))


def _trace(model: nn.Module, images: Tensor, axes: AxisNames) -> ExportedProgram:
    dynamic = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    return torch.export.export(model, (images,), dynamic_shapes=(dynamic,))


def _check_file(
    export_format: ExportFormat, path: Path, examples: Sequence[_Example], levels: Sequence[FeatureInfo]
) -> dict[str, float]:
    """Return the relative difference of each level of the file from the net in float32.

    Raises:
        ValueError: If it is above the tolerance, or the file does not run.
    """
    worst = dict.fromkeys([level.name for level in levels], 0.0)
    with _library_errors("the exported file does not run, and was not kept"):
        run = export_format.load(path)
    for images, expected, exact in examples:
        with _library_errors(f"the exported file does not run on images {tuple(images.shape)}, and was not kept"):
            outs = run(images)
        for name, out, net_out, exact_out in zip(worst, outs, expected, exact, strict=True):
            if (out.shape, out.dtype) != (net_out.shape, net_out.dtype):
                raise ValueError(
                    f"the exported file was not kept: {name} of images {tuple(images.shape)} is {tuple(out.shape)} "
                    f"{out.dtype} in the file, {tuple(net_out.shape)} {net_out.dtype} in the net"
                )
            # In half precision the net itself differs as much from float32, and the file rounds elsewhere.
            allowed = max(export_format.tolerance, 2 * _difference(net_out, exact_out))
            difference = _difference(out, exact_out)
            if not difference <= allowed:  # also if it is NaN
                raise ValueError(
                    f"the exported file was not kept: {name} of images {tuple(images.shape)} is {difference:.1e} of "
                    f"its largest value away from the net's, where {allowed:.1e} is allowed"
                )
            worst[name] = max(worst[name], difference)
    return worst


def _difference(out: Tensor, exact: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest absolute value."""
    largest = exact.abs().max().clamp_min(torch.finfo(exact.dtype).tiny)
    return ((out.float() - exact).abs().max() / largest).item()


@contextmanager
def _library_errors(message: str, hint: str = "") -> Iterator[None]:
    """Convert the exceptions of another library into a ValueError of one line, and suppress its warnings.

    Raises:
        ValueError: In place of any exception except an OSError.
    """
    try:
        with silence_libraries():
            yield
    except OSError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{message}: {textwrap.shorten(reason, 300)}{hint}") from error
