"""File formats of exported nets: their requirements, how to write and how to run each."""

from __future__ import annotations

import copy
import io
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:  # takes a second to import
    from torch.export import ExportedProgram

INPUT_NAME = "images"  # in an ONNX file
METADATA_FILE = "metadata.json"  # in torch.export's archive

Metadata = Mapping[str, Any]  # JSON serializable
AxisNames = Mapping[int, str]  # of the dynamic axes of the images
LoadedModel = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class ExportFormat:
    """A file format.

    Attributes:
        suffix: Suffix of the file name.
        packages: Packages that must be installed.
        dtypes: Dtypes that files can compute in.
        tolerance: Largest difference of a level from the net's in float32, relative to the level's largest value.
        prepare: Returns the net to trace in place of a net.
        write: Writes a traced net to a file, with the names of its outputs and dynamic axes, and metadata.
        load: Opens a file; returns a callable from images ``(N, C, H, W)`` to the levels.
        max_bytes: Exclusive limit of the weights' size.
        hint: Appended to the error message if writing fails.
        writing: Progress line while the file ``{}`` is written.
    """

    suffix: str
    packages: tuple[str, ...]
    dtypes: tuple[str, ...]
    tolerance: float
    prepare: Callable[[nn.Module], nn.Module]
    write: Callable[[ExportedProgram, Path, Sequence[str], AxisNames, Metadata], None]
    load: Callable[[Path], LoadedModel]
    max_bytes: float = math.inf
    hint: str = ""
    writing: str = "writing {}"


def _unchanged(net: nn.Module) -> nn.Module:
    return net


def _with_unfused_padding(net: nn.Module) -> nn.Module:
    """Return a copy with padding layers that onnxruntime does not fuse with the pooling behind."""
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ConstantPad2d):
                setattr(module, name, _UnfusedPad(child))
    return net


class _UnfusedPad(nn.Module):
    """Constant padding by one pixel too many, which is then cut off.

    onnxruntime 1.31 (``Pad_Fusion``) fuses padding into the max pooling behind it, which pads by minus infinity
    whatever the value was. The cut between them prevents that.
    """

    def __init__(self, pad: nn.ConstantPad2d) -> None:
        super().__init__()
        self.padding = tuple(side + 1 for side in pad.padding)
        self.value = pad.value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding, value=self.value)[..., 1:-1, 1:-1]


def _to_strings(metadata: Metadata) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def _write_onnx(
    program: ExportedProgram, path: Path, names: Sequence[str], axes: AxisNames, metadata: Metadata
) -> None:
    onnx_program = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=[INPUT_NAME], output_names=names, dynamic_shapes=(axes,)
    )
    assert onnx_program is not None
    for node in onnx_program.model.graph.all_nodes():
        node.metadata_props.clear()  # source file and line of each operator
    onnx_program.model.metadata_props.update(_to_strings(metadata))
    onnx_program.save(path)


def _load_onnx(path: Path) -> LoadedModel:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {INPUT_NAME: images.numpy()})]


def _write_torch(
    program: ExportedProgram, path: Path, names: Sequence[str], axes: AxisNames, metadata: Metadata
) -> None:
    archive = io.BytesIO()  # PyTorch's own writer aborts the process where a disk is full
    torch.export.save(program, archive, extra_files={METADATA_FILE: json.dumps(metadata)})
    path.write_bytes(archive.getbuffer())


def _load_torch(path: Path) -> LoadedModel:
    run: LoadedModel = torch.export.load(path).module()
    return run


def _write_aoti(
    program: ExportedProgram, path: Path, names: Sequence[str], axes: AxisNames, metadata: Metadata
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # its writer also aborts the process where a disk is full
        package = Path(folder, "package.pt2")
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(package), inductor_configs={"aot_inductor.metadata": _to_strings(metadata)}
        )
        path.write_bytes(package.read_bytes())


def _load_aoti(path: Path) -> LoadedModel:
    run: LoadedModel = torch._inductor.aoti_load_package(str(path))
    return run


_ALL_DTYPES = ("float32", "float16", "bfloat16")
# Kernels of another library or a compiler sum in another order: a difference in the last bit, which a hundred layers
# may amplify a thousand times. torch.export keeps PyTorch's operators.
EXPORT_FORMATS = {
    "onnx": ExportFormat(
        ".onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        ("float32", "float16"),  # onnxruntime has no bfloat16 convolution on CPUs
        1e-4,
        _with_unfused_padding,
        _write_onnx,
        _load_onnx,
        max_bytes=2**31,  # limit of protocol buffers
    ),
    "torch-export": ExportFormat(".pt2", (), _ALL_DTYPES, 1e-5, _unchanged, _write_torch, _load_torch),
    "aoti": ExportFormat(
        ".pt2",
        (),
        _ALL_DTYPES,
        1e-4,
        _unchanged,
        _write_aoti,
        _load_aoti,
        hint="; it needs a C++ compiler: g++, clang++ or the one that the environment variable CXX names",
        writing="compiling {}, which takes minutes for a whole net",
    ),
}
