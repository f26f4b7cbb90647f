"""Post-training static quantization of a net to int8.

Activations are quantized per tensor to uint8, weights per output channel to int8. Source: Jacob et al., "Quantization
and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from resbackbone.data.pictures import find_pictures, read_picture
from resbackbone.data.preprocessing import preprocessing_of
from resbackbone.inference.engines import QuantizedEngine, copy_for_inference
from resbackbone.inference.fused_conv import ConvCall, OneDNNConv2d
from resbackbone.inference.graph import call_fused, fuse, fused_index, fused_operands, trace
from resbackbone.inference.optimize import PREPACK_BYTES, require_onednn
from resbackbone.inference.quantized_conv import QuantizedConv2d, QuantParams, dequantize_tensor, quantize_tensor
from resbackbone.utils.validation import warn_user

ValueRange = tuple[float, float]  # smallest and largest value of a tensor


def quantize(
    net: nn.Module,
    calibration: str | Path | Tensor | Iterable[Tensor] | Mapping[str, ValueRange],
    *,
    prepack_bytes: int = PREPACK_BYTES,
) -> QuantizedEngine:
    """Return a copy of a net for inference on CPUs, with convolutions in int8.

    Batch norms, additions and ReLUs are fused as in :func:`~resbackbone.inference.optimize`. Everything that is no
    convolution computes in float32. The value range of each tensor is measured on calibration images.

    Args:
        net: As for :func:`~resbackbone.inference.optimize`; it is not changed.
        calibration: Calibration images: a folder of pictures, normalized by
            :func:`~resbackbone.data.preprocessing.preprocessing_of` (unreadable pictures are skipped with a warning),
            or one or several tensors ``(N, in_channels, H, W)``. A hundred images like those at inference are plenty.
            Or the ``ranges`` of a net that was quantized before, instead of measuring.
        prepack_bytes: Bytes that weights prepacked for repeated sizes may take; 0 for none.

    Returns:
        A module: images ``(N, in_channels, H, W)`` to approximately the same feature maps, in float32. Its ``ranges``
        are the measured value ranges; these and its ``state_dict()`` suffice to restore it: docs/inference.md.

    Raises:
        ValueError: If there is no picture, ranges are not finite or of another net, ``net`` cannot be traced, or its
            weights are not on a CPU for which PyTorch has oneDNN.
        FileNotFoundError: If there is no such folder.
    """
    require_onednn(net)
    copied = copy_for_inference(net).float()
    traced = trace(copied)
    fused = fuse(traced, OneDNNConv2d, torch.float32)
    if isinstance(calibration, Mapping):
        ranges = _ranges_by_node(traced, calibration)
    else:
        is_folder = isinstance(calibration, (str, Path))
        images = _read_pictures(net, calibration) if is_folder else _check_batches(calibration)  # type: ignore[arg-type]
        calibrator = _Calibrator(traced, [conv.forward for conv in fused])
        if not calibrator.measure(images):
            raise ValueError("`calibration` is empty; ranges need at least one image to be measured on")
        ranges = calibrator.ranges
    graph, convolutions = _lower(traced, fused, ranges)
    quantized = QuantizedEngine(copied, graph, convolutions, torch.float32, prepack_bytes)
    quantized.ranges = {node.name: measured for node, measured in ranges.items()}
    return quantized


def _ranges_by_node(traced: fx.GraphModule, ranges: Mapping[Any, Any]) -> dict[fx.Node, ValueRange]:
    """Check ranges that were measured before, and return them by node."""
    nodes = {node.name: node for node in traced.graph.nodes}
    if unknown := [name for name in ranges if name not in nodes]:
        raise ValueError(
            f"`calibration` holds a range of {unknown[0]!r}, which is no tensor of this net: pass the `ranges` of one "
            "of the same architecture, or images"
        )
    checked = {}
    for name, value in ranges.items():
        bounds = tuple(value) if isinstance(value, (tuple, list)) else ()
        if len(bounds) != 2 or not all(isinstance(bound, (int, float)) and math.isfinite(bound) for bound in bounds):
            raise ValueError(f"the range of {name!r} must be two finite numbers, got {value!r}")
        checked[nodes[name]] = (float(bounds[0]), float(bounds[1]))
    return checked


def _check_batches(images: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    for batch in [images] if isinstance(images, Tensor) else images:
        if not isinstance(batch, Tensor) or batch.dim() != 4:
            got = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"`calibration` must be a folder, or tensors of shape (N, in_channels, H, W), got {got}")
        yield batch


def _read_pictures(net: nn.Module, folder: str | Path) -> Iterable[Tensor]:
    preprocessing = preprocessing_of(net)
    paths, count = find_pictures([folder]), 0
    for path in paths:
        try:
            picture = read_picture(path, channels=len(preprocessing.mean))
        except ValueError as error:
            warn_user(f"{error}; skipped")
        else:
            count += 1
            yield preprocessing(picture)
    if not count:
        raise ValueError(f"none of the {len(paths)} pictures in {str(folder)!r} can be read")


class _Calibrator(fx.Interpreter):
    """Runs a traced net on images, and measures the value range of every tensor."""

    def __init__(self, traced: fx.GraphModule, calls: Sequence[ConvCall]) -> None:
        super().__init__(traced)
        self._calls = calls
        self.ranges: dict[fx.Node, ValueRange] = {}

    @torch.no_grad()
    def measure(self, images: Iterable[Tensor]) -> int:
        """Run the net on batches of images, and return the number of images."""
        count = 0
        for batch in images:
            with torch.autocast("cpu", enabled=False):
                self.run(batch.float().contiguous(memory_format=torch.channels_last), self._calls)
            count += len(batch)
        return count

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and extend the range of its output."""
        out = super().run_node(n)
        if isinstance(out, Tensor) and out.is_floating_point() and out.numel():
            low, high = (value.item() for value in out.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"a calibration image gives NaN or infinity at {n.name}, which has no range for uint8")
            known = self.ranges.get(n, (low, high))
            self.ranges[n] = (min(low, known[0]), max(high, known[1]))
        return out


def _lower(
    traced: fx.GraphModule, fused: Sequence[OneDNNConv2d], ranges: Mapping[fx.Node, ValueRange]
) -> tuple[fx.GraphModule, list[QuantizedConv2d]]:
    """Return the graph with quantized convolutions, and the convolutions."""
    lowering = _Lowering(traced, fused, ranges)
    for node in traced.graph.nodes:
        lowering.add(node)
    lowering.graph.lint()
    return fx.GraphModule(traced, lowering.graph), lowering.convolutions


class _Lowering:
    """Copies a graph node by node, with each tensor in uint8 or float32, and the conversions that this needs."""

    def __init__(
        self, traced: fx.GraphModule, fused: Sequence[OneDNNConv2d], ranges: Mapping[fx.Node, ValueRange]
    ) -> None:
        self.graph = fx.Graph()
        self.convolutions: list[QuantizedConv2d] = []
        self._traced, self._fused = traced, fused
        self._ranges = ranges
        self._calls = next(node for node in traced.graph.nodes if node.target == "calls")
        self._uint8: dict[fx.Node, fx.Node] = {}  # nodes of the new graph by those of the old one
        self._float32: dict[fx.Node, fx.Node] = {}

    def add(self, node: fx.Node) -> None:
        """Copy a node."""
        index = fused_index(node)
        pool = self._max_pool(node)
        if index is not None:
            self._convolve(node, self._fused[index])
        elif pool is not None and (source := node.all_input_nodes[0]) in self._uint8:
            arguments = [_pair(size) for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
            self._uint8[node] = self.graph.call_function(
                torch.ops.quantized.max_pool2d.default, (self._uint8[source], *arguments, pool.ceil_mode)
            )
        elif node.target is not operator.getitem or node.args[0] is not self._calls:
            self._float32[node] = self.graph.node_copy(node, self._as_float32)

    def _convolve(self, node: fx.Node, conv: OneDNNConv2d) -> None:
        operands = fused_operands(node)
        others = operands[1:]
        overwritable = all(other in self._uint8 for other in others)
        inputs = [self._as_uint8(operand) for operand in operands]
        params = [self._params(operand) for operand in operands]
        quantizes = bool(others) or any(map(self._accepts_uint8, node.users))
        output_params = self._params(node) if quantizes else None
        module = QuantizedConv2d(conv, params[0], params[1] if others else None, output_params)
        module.overwrite &= overwritable
        call = call_fused(self.graph, self._float32[self._calls], len(self.convolutions), inputs)
        self.convolutions.append(module)
        (self._uint8 if quantizes else self._float32)[node] = call

    def _accepts_uint8(self, user: fx.Node) -> bool:
        return fused_index(user) is not None or self._max_pool(user) is not None

    def _as_uint8(self, node: fx.Node) -> fx.Node:
        if node not in self._uint8:
            arguments = (self._float32[node], *self._params(node))
            self._uint8[node] = self.graph.call_function(quantize_tensor, arguments)
        return self._uint8[node]

    def _as_float32(self, node: fx.Node) -> fx.Node:
        if node not in self._float32:
            arguments = (self._uint8[node], *self._params(node))
            self._float32[node] = self.graph.call_function(dequantize_tensor, arguments)
        return self._float32[node]

    def _params(self, node: fx.Node) -> QuantParams:
        if self._max_pool(node) is not None:  # max pooling keeps the quantization of its input
            return self._params(node.all_input_nodes[0])
        if node not in self._ranges:
            raise ValueError(f"`calibration` holds no range of {node.name!r}: pass the `ranges` of a net like this one")
        return QuantParams.from_range(*self._ranges[node])

    def _max_pool(self, node: fx.Node) -> nn.MaxPool2d | None:
        module = self._traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        return module if isinstance(module, nn.MaxPool2d) else None


def _pair(size: int | tuple[int, int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
