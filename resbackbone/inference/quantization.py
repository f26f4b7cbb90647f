"""Post-training static quantization: convolutions of bytes instead of floating-point numbers.

Activations are on one grid per tensor, weights on one per output channel. Source: Jacob et al., "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from resbackbone.data.pictures import find_images, read_image
from resbackbone.data.preprocessing import preprocessing_of
from resbackbone.inference.convolution import Convolution, FusedConv2d
from resbackbone.inference.copying import copy_for_inference
from resbackbone.inference.engines import Quantized
from resbackbone.inference.graph import fuse, fused_call, fused_index, operands, trace
from resbackbone.inference.optimize import PACK_BYTES, require_onednn
from resbackbone.layers.folded_convolution import output_shape
from resbackbone.utils.validation import warn_user


class Grid(NamedTuple):
    """The numbers that a byte can stand for: ``(byte - zero) * scale``."""

    scale: float
    zero: int

    @classmethod
    def over(cls, low: float, high: float) -> Grid:
        """Return the grid that spans a range, and has zero in it."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255 or 1.0
        return cls(scale, round(-low / scale))


_FLOATS = Grid(1.0, 0)  # what the operators want for a result in float32


Ranges = Mapping[str, tuple[float, float]]  # the smallest and the largest number of each tensor, by its name


def quantize(
    net: nn.Module, pictures: str | Path | Tensor | Iterable[Tensor] | Ranges, *, pack_bytes: int = PACK_BYTES
) -> Quantized:
    """Return a net for inference on CPUs whose convolutions compute with bytes.

    Norms, sums and ReLUs are part of the convolutions as in :func:`~resbackbone.inference.optimize`. What is no
    convolution computes in float32. Each tensor's range is that which it had for the pictures.

    Args:
        net: As for :func:`~resbackbone.inference.optimize`; it stays as it is.
        pictures: What to measure ranges on: a folder of pictures, normalized as
            :func:`~resbackbone.data.preprocessing.preprocessing_of` says, of which one that cannot be read is left out
            with a warning; or images, one or several tensors ``(N, in_channels, H, W)``. A hundred like those to come
            are plenty. Or the ``ranges`` of a net that was quantized before, to measure nothing.
        pack_bytes: Bytes that laid-out weights may take; 0 for none.

    Returns:
        A module: images ``(N, in_channels, H, W)`` to the same feature maps in float32, each near to the net's own. Its
        ``ranges`` are what was measured, and with its ``state_dict()`` all that restores it: docs/inference.md.

    Raises:
        ValueError: If there is no picture, ranges are not finite or of another net, ``net`` cannot be traced, or its
            weights are not on a CPU for which PyTorch has oneDNN.
        FileNotFoundError: If there is no such folder.
    """
    require_onednn(net)
    copied = copy_for_inference(net).float()
    traced = trace(copied)
    fused = fuse(traced, FusedConv2d, torch.float32)
    if isinstance(pictures, Mapping):
        ranges = _given_ranges(traced, pictures)
    else:
        images = _read(net, pictures) if isinstance(pictures, (str, Path)) else _as_batches(pictures)
        calibration = _Calibration(traced, [conv.forward for conv in fused])
        if not calibration.watch(images):
            raise ValueError("`pictures` is empty; ranges need at least one image to be measured on")
        ranges = calibration.ranges
    graph, convolutions = _lower(traced, fused, ranges)
    quantized = Quantized(copied, graph, convolutions, torch.float32, pack_bytes)
    quantized.ranges = {node.name: found for node, found in ranges.items()}
    return quantized


def _given_ranges(traced: fx.GraphModule, given: Mapping[Any, Any]) -> dict[fx.Node, tuple[float, float]]:
    """Return ranges that were measured before, by step."""
    nodes = {node.name: node for node in traced.graph.nodes}
    if unknown := [name for name in given if name not in nodes]:
        raise ValueError(
            f"`pictures` holds a range of {unknown[0]!r}, which is no tensor of this net: give the `ranges` of one of "
            "the same architecture, or pictures"
        )
    ranges = {}
    for name, found in given.items():
        numbers = tuple(found) if isinstance(found, (tuple, list)) else ()
        if len(numbers) != 2 or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
            raise ValueError(f"the range of {name!r} must be two finite numbers, got {found!r}")
        ranges[nodes[name]] = (float(numbers[0]), float(numbers[1]))
    return ranges


def _as_batches(images: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    for batch in [images] if isinstance(images, Tensor) else images:
        if not isinstance(batch, Tensor) or batch.dim() != 4:
            got = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"`pictures` must be a folder, or tensors of shape (N, in_channels, H, W), got {got}")
        yield batch


def _read(net: nn.Module, folder: str | Path) -> Iterable[Tensor]:
    preprocessing = preprocessing_of(net)
    paths, count = find_images([folder]), 0
    for path in paths:
        try:
            picture = read_image(path, channels=len(preprocessing.mean))
        except ValueError as error:
            warn_user(f"{error}; left out")
        else:
            count += 1
            yield preprocessing(picture)
    if not count:
        raise ValueError(f"none of the {len(paths)} pictures in {str(folder)!r} can be read")


class QuantizedConv2d(nn.Module):
    """A fused convolution of bytes.

    Args:
        conv: What it does.
        takes: The grid of what is convolved.
        adds: The grid of what is added.
        gives: The grid of the result; None for float32.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor

    def __init__(self, conv: FusedConv2d, takes: Grid, adds: Grid | None, gives: Grid | None) -> None:
        super().__init__()
        largest = conv.weight.abs().amax((1, 2, 3)).clamp_min(torch.finfo(torch.float32).tiny)
        scale = largest / 127
        self.register_buffer("weight", (conv.weight / scale[:, None, None, None]).round().to(torch.int8).contiguous())
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", torch.zeros(len(scale), dtype=torch.int32))
        self.register_buffer("bias", conv.bias.clone())
        padding, stride, dilation, groups = conv.geometry
        self.geometry = (stride, padding, dilation, groups)  # in the operators' order
        self.takes, self.adds, self.gives = takes, adds, gives
        self.relu, self.overwrite = conv.relu, conv.overwrite

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Convolve bytes ``(N, in_channels, H, W)``, and add bytes ``(N, out_channels, H', W')`` or what spreads."""
        return self._bind(x, other, None)(x, other)

    def specialize(self, x: Tensor, other: Tensor | None) -> Convolution:
        """Return what does the same to tensors of these shapes, with weights laid out for them."""
        return self._bind(x, other, list(x.shape))

    def _bind(self, x: Tensor, other: Tensor | None, shape: list[int] | None) -> Convolution:
        operators: Any = torch.ops.onednn
        weight = operators.qconv_prepack(self.weight, self.weight_scale, *self.takes, *self.geometry, shape)
        given = (*_FLOATS, torch.float32) if self.gives is None else (*self.gives, torch.uint8)
        weights = (weight, self.weight_scale, self.weight_zero)
        rest = (self.bias, *self.geometry, *given)
        relu = "relu" if self.relu else "none"
        takes, adds, overwrite = self.takes, self.adds, self.overwrite

        def convolve(x: Tensor, other: Tensor | None = None) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            out: Tensor
            if other is None or adds is None:
                out = operators.qconv_pointwise(x, *takes, *weights, *rest, relu, [None], "")
            else:  # the operator always adds in place
                total = other if overwrite else other.clone()
                total = total.contiguous(memory_format=torch.channels_last)
                out = operators.qconv2d_pointwise.binary(
                    x, *takes, *weights, total, *rest, *adds, "sum", 1.0, relu, [None], ""
                )
            return out

        def convolve_and_spread(x: Tensor, other: Tensor) -> Tensor:  # which no operator of bytes does
            assert self.adds is not None  # where there is a sum, both grids are known
            assert self.gives is not None
            x = x.contiguous(memory_format=torch.channels_last)
            floats = (self.bias, *self.geometry, *_FLOATS, torch.float32)
            out = operators.qconv_pointwise(x, *takes, *weights, *floats, "none", [None], "")
            out = out + _to_floats(other, *self.adds)
            return _to_bytes(out.relu_() if self.relu else out, *self.gives)

        stride, padding, dilation, _ = self.geometry
        spreads = other is not None and other.shape != output_shape(x, self.weight, padding, stride, dilation)
        return convolve_and_spread if spreads else convolve

    def extra_repr(self) -> str:
        """Show the sizes in ``repr``."""
        return f"{tuple(self.weight.shape)}, relu={self.relu}, overwrite={self.overwrite}"


class _Calibration(fx.Interpreter):
    """Measures the range of every tensor in a net."""

    def __init__(self, traced: fx.GraphModule, calls: Sequence[Convolution]) -> None:
        super().__init__(traced)
        self._calls = calls
        self.ranges: dict[fx.Node, tuple[float, float]] = {}

    @torch.no_grad()
    def watch(self, images: Iterable[Tensor]) -> int:
        """Run the net on images, and return on how many."""
        count = 0
        for image in images:
            with torch.autocast("cpu", enabled=False):
                self.run(image.float().contiguous(memory_format=torch.channels_last), self._calls)
            count += len(image)
        return count

    def run_node(self, n: fx.Node) -> Any:
        """Compute a step, and look at what it gives."""
        out = super().run_node(n)
        if isinstance(out, Tensor) and out.is_floating_point() and out.numel():
            low, high = (value.item() for value in out.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"a picture gives NaN or infinity at {n.name}; no grid of bytes can span that")
            known = self.ranges.get(n, (low, high))
            self.ranges[n] = (min(low, known[0]), max(high, known[1]))
        return out


def _lower(
    traced: fx.GraphModule, fused: Sequence[FusedConv2d], ranges: Mapping[fx.Node, tuple[float, float]]
) -> tuple[fx.GraphModule, list[QuantizedConv2d]]:
    """Build the graph whose convolutions compute with bytes, and the convolutions."""
    lowering = _Lowering(traced, fused, ranges)
    for node in traced.graph.nodes:
        lowering.add(node)
    lowering.graph.lint()
    return fx.GraphModule(traced, lowering.graph), lowering.convolutions


class _Lowering:
    """Copies a graph step by step, with each tensor as bytes or in float32, and the conversions between."""

    def __init__(
        self, traced: fx.GraphModule, fused: Sequence[FusedConv2d], ranges: Mapping[fx.Node, tuple[float, float]]
    ) -> None:
        self.graph = fx.Graph()
        self.convolutions: list[QuantizedConv2d] = []
        self._traced, self._fused = traced, fused
        self._ranges = ranges
        self._old_calls = next(node for node in traced.graph.nodes if node.target == "calls")
        self._bytes: dict[fx.Node, fx.Node] = {}
        self._floats: dict[fx.Node, fx.Node] = {}

    def add(self, node: fx.Node) -> None:
        """Copy a step."""
        index = fused_index(node)
        pool = self._max_pool(node)
        if index is not None:
            self._convolve(node, self._fused[index])
        elif pool is not None and (source := node.all_input_nodes[0]) in self._bytes:
            arguments = [_pair(size) for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
            self._bytes[node] = self.graph.call_function(
                torch.ops.quantized.max_pool2d.default, (self._bytes[source], *arguments, pool.ceil_mode)
            )
        elif node.target is not operator.getitem or node.args[0] is not self._old_calls:
            self._floats[node] = self.graph.node_copy(node, self._as_floats)

    def _convolve(self, node: fx.Node, conv: FusedConv2d) -> None:
        source, *others = operands(node)
        native = all(other in self._bytes for other in others)
        inputs = [self._as_bytes(operand) for operand in (source, *others)]
        grids = [self._grid(operand) for operand in (source, *others)]
        gives = self._grid(node) if others or any(map(self._takes_bytes, node.users)) else None
        module = QuantizedConv2d(conv, grids[0], grids[1] if others else None, gives)
        module.overwrite &= native
        call = fused_call(self.graph, self._floats[self._old_calls], len(self.convolutions), inputs)
        self.convolutions.append(module)
        (self._floats if gives is None else self._bytes)[node] = call

    def _takes_bytes(self, user: fx.Node) -> bool:
        return fused_index(user) is not None or self._max_pool(user) is not None

    def _as_bytes(self, node: fx.Node) -> fx.Node:
        if node not in self._bytes:
            self._bytes[node] = self.graph.call_function(_to_bytes, (self._floats[node], *self._grid(node)))
        return self._bytes[node]

    def _as_floats(self, node: fx.Node) -> fx.Node:
        if node not in self._floats:
            self._floats[node] = self.graph.call_function(_to_floats, (self._bytes[node], *self._grid(node)))
        return self._floats[node]

    def _grid(self, node: fx.Node) -> Grid:
        if self._max_pool(node) is not None:  # which changes no number
            return self._grid(node.all_input_nodes[0])
        if node not in self._ranges:
            raise ValueError(f"`pictures` holds no range of {node.name!r}: give the `ranges` of a net like this one")
        return Grid.over(*self._ranges[node])

    def _max_pool(self, node: fx.Node) -> nn.MaxPool2d | None:
        module = self._traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        return module if isinstance(module, nn.MaxPool2d) else None


def _pair(size: int | tuple[int, int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def _to_bytes(x: Tensor, scale: float, zero: int) -> Tensor:
    return torch.add(torch.tensor(zero + 0.5), x, alpha=1 / scale).clamp_(0, 255).to(torch.uint8)


def _to_floats(x: Tensor, scale: float, zero: int) -> Tensor:
    floats = x.to(torch.float32)
    return (floats.sub_(zero) if zero else floats).mul_(scale)
