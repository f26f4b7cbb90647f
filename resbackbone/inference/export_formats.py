"""The kinds of files that a net is exported to: what each needs, what writes it and what runs it."""

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

INPUT = "images"  # its name in an ONNX file
METADATA = "metadata.json"  # the extra file of torch.export's archive

Facts = Mapping[str, Any]  # what a file says about itself; as JSON has it
Axes = Mapping[int, str]  # the names of those axes of the images that may vary
Run = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class ExportFormat:
    """One kind of file.

    Attributes:
        suffix: Of the file's name.
        packages: What must be installed.
        dtypes: What can be computed in.
        tolerance: How far a level may be from the net's in float32, relative to the level's largest number.
        prepare: Returns what is recorded in place of a net.
        write: Writes a recorded net, its outputs' names, the names of the axes that vary and the facts.
        load: Opens a file, and returns what maps images ``(N, C, H, W)`` to the levels.
        max_bytes: What the weights must stay below.
        hint: What to add where writing fails.
        writing: What is said while the file, ``{}``, is written.
    """

    suffix: str
    packages: tuple[str, ...]
    dtypes: tuple[str, ...]
    tolerance: float
    prepare: Callable[[nn.Module], nn.Module]
    write: Callable[[ExportedProgram, Path, Sequence[str], Axes, Facts], None]
    load: Callable[[Path], Run]
    max_bytes: float = math.inf
    hint: str = ""
    writing: str = "writing {}"


def _as_it_is(net: nn.Module) -> nn.Module:
    return net


def _with_wide_pads(net: nn.Module) -> nn.Module:
    """Return a copy whose padding layers are such that onnxruntime leaves them where they are."""
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ConstantPad2d):
                setattr(module, name, _WidePad(child))
    return net


class _WidePad(nn.Module):
    """Pads by one pixel more than wanted, and cuts that off.

    onnxruntime (1.31, by its ``Pad_Fusion``) lets a max pooling do the padding before it, but with minus infinity
    whatever the value was. With the cut between them it does not.
    """

    def __init__(self, pad: nn.ConstantPad2d) -> None:
        super().__init__()
        self.padding = tuple(side + 1 for side in pad.padding)
        self.value = pad.value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding, value=self.value)[..., 1:-1, 1:-1]


def _texts(facts: Facts) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def _write_onnx(program: ExportedProgram, path: Path, names: Sequence[str], axes: Axes, facts: Facts) -> None:
    translated = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=[INPUT], output_names=names, dynamic_shapes=(axes,)
    )
    assert translated is not None
    for node in translated.model.graph.all_nodes():
        node.metadata_props.clear()  # where in whose source file it comes from
    translated.model.metadata_props.update(_texts(facts))
    translated.save(path)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {INPUT: images.numpy()})]


def _write_torch(program: ExportedProgram, path: Path, names: Sequence[str], axes: Axes, facts: Facts) -> None:
    archive = io.BytesIO()  # PyTorch's own writer aborts the process where a disk is full
    torch.export.save(program, archive, extra_files={METADATA: json.dumps(facts)})
    path.write_bytes(archive.getbuffer())


def _load_torch(path: Path) -> Run:
    run: Run = torch.export.load(path).module()
    return run


def _write_aoti(program: ExportedProgram, path: Path, names: Sequence[str], axes: Axes, facts: Facts) -> None:
    with tempfile.TemporaryDirectory() as folder:  # its writer, too, aborts the process where a disk is full
        package = Path(folder, "package.pt2")
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(package), inductor_configs={"aot_inductor.metadata": _texts(facts)}
        )
        path.write_bytes(package.read_bytes())


def _load_aoti(path: Path) -> Run:
    run: Run = torch._inductor.aoti_load_package(str(path))
    return run


_ALL_DTYPES = ("float32", "float16", "bfloat16")
# Another library's kernels, and those that a compiler makes, add up in another order: a difference in the last bit,
# which a hundred layers may multiply by a thousand. torch.export keeps the operators themselves.
FORMATS = {
    "onnx": ExportFormat(
        ".onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        ("float32", "float16"),  # in bfloat16 onnxruntime has no convolution on CPUs
        1e-4,
        _with_wide_pads,
        _write_onnx,
        _load_onnx,
        max_bytes=2**31,  # of protocol buffers
    ),
    "torch-export": ExportFormat(".pt2", (), _ALL_DTYPES, 1e-5, _as_it_is, _write_torch, _load_torch),
    "aoti": ExportFormat(
        ".pt2",
        (),
        _ALL_DTYPES,
        1e-4,
        _as_it_is,
        _write_aoti,
        _load_aoti,
        hint="; it needs a C++ compiler: g++ or clang++, or what the variable CXX names",
        writing="compiling {}, which takes minutes for a whole net",
    ),
}
