"""Inference engines: the modules that `optimize` and `quantize` return, called as the original net is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from resbackbone.backbones.base import Backbone, check_images
from resbackbone.backbones.feature_info import FeatureInfo
from resbackbone.inference.cuda_graph import CudaGraphPool, ForwardPass
from resbackbone.inference.prepacked_convs import PrepackableConv, PrepackedConvs
from resbackbone.inference.shape_cache import ShapeCache
from resbackbone.layers.memory_format import is_channels_last, to_contiguous
from resbackbone.layers.tracing import is_tracing, refuse_scripting
from resbackbone.utils import processor
from resbackbone.utils.validation import warn_user

NUM_CUDA_GRAPHS = 16  # shapes captured at a time; each graph keeps its images and feature maps in memory
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_for_inference(net: ModuleT) -> ModuleT:
    """Return a copy of a net in eval mode, with parameters that require no gradients."""
    copied = copy.deepcopy(net)
    copied.eval()  # returns None in a subclass with mmdet's `train`
    return copied.requires_grad_(False)


class Engine(nn.Module):
    """Base class: the backbone's output description, permanent eval mode, conversion of inputs and outputs.

    Args:
        net: The net that was optimized.
        dtype: Dtype of the computation.

    Attributes:
        dtype: Dtype of the computation.
        out_dtype: Dtype of the feature maps; another one only where the processor has no instructions for it.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = self.out_dtype = dtype
        self.name = type(net).__name__
        self._required_channels = net.required_channels if isinstance(net, Backbone) else None
        # Other models may describe their outputs by the same names, as torchvision's detectors expect of a backbone.
        self.in_channels: int | None = getattr(net, "in_channels", None)
        self.feature_info: tuple[FeatureInfo, ...] = getattr(net, "feature_info", ())
        self.out_channels = getattr(net, "out_channels", None)
        self.out_strides = getattr(net, "out_strides", None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        """Compute the feature maps of images ``(N, in_channels, H, W)``, in the memory format of the images."""
        if is_tracing():
            pass  # a check would record the sizes of these images
        elif self._required_channels is not None:
            check_images(x, self.name, self._required_channels)
        elif not isinstance(x, Tensor):
            raise TypeError(
                f"an optimized {self.name} accepts one tensor, got {type(x).__name__}; stack its images first"
            )
        contiguous = not is_channels_last(x)
        x = x.to(self.dtype, memory_format=torch.channels_last if x.dim() == 4 else torch.preserve_format)
        if not torch.is_autocast_enabled(x.device.type):
            return self._convert(self._run(x), contiguous=contiguous)
        with torch.autocast(x.device.type, enabled=False):  # the engine's dtype takes precedence
            return self._convert(self._run(x), contiguous=contiguous)

    def _convert(self, outs: Any, *, contiguous: bool) -> Any:
        """Convert outputs to ``out_dtype``, and to the contiguous format if asked for."""
        if self.out_dtype is not self.dtype:
            outs = tree_map_only(Tensor, lambda out: out.to(self.out_dtype) if out.is_floating_point() else out, outs)
        return to_contiguous(outs) if contiguous else outs

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        on_cpu = all(tensor.device.type == "cpu" for tensor in self.state_dict().values())
        if on_cpu and not processor.computes_natively(self.dtype):  # pickled on another machine
            slow = "and is several times slower in it than in float32; optimize the original again on this machine"
            warn_user(f"{processor.reason(self.dtype)} {slow}")

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which calls this hook first."""
        refuse_scripting(self)

    def train(self, mode: bool = True) -> Any:
        """Stay in eval mode, also as part of a model in train mode: folded norms cannot train."""
        return super().train(False)

    @property
    def cached_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Image shapes with prepacked weights or a captured CUDA graph, from the least to the most recently used."""
        return ()

    def _run(self, x: Tensor) -> Any:
        raise NotImplementedError

    def _clear_cache(self) -> None:
        """Drop everything that was derived from the weights for single shapes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = fn(torch.empty(1, dtype=self.dtype))
        self._check_move(moved)
        self._clear_cache()
        if moved.dtype is not self.dtype:  # a conversion to `out_dtype` leaves the dtype of the computation
            return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _check_move(self, moved: Tensor) -> None:
        """Raise unless the engine can be converted to the dtype and device of a tensor."""
        if moved.dtype not in (self.dtype, self.out_dtype):
            raise TypeError(
                f"this net was optimized for {self.out_dtype} and cannot be converted to {moved.dtype}; "
                "optimize the original for that `dtype`"
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._clear_cache()
        super()._load_from_state_dict(*args, **kwargs)


class CompiledEngine(Engine):
    """A net through ``torch.compile``.

    Args:
        net: The net, in its final dtype and memory format.
        dtype: Dtype of the net.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(net, dtype)
        self.net = net
        self.net.compile()
        self.eval()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.net.compile()  # pickles do not contain compiled code

    def _run(self, x: Tensor) -> Any:
        return self.net(x)


class EagerEngine(Engine):
    """A graph with fused convolutions, of PyTorch operators, on any device.

    Args:
        net: The net that the graph was traced from.
        graph: Computes the outputs from images and a sequence with a callable for each fused convolution.
        convolutions: The fused convolutions.
        dtype: Dtype of the computation.
    """

    def __init__(
        self, net: nn.Module, graph: fx.GraphModule, convolutions: Sequence[nn.Module], dtype: torch.dtype
    ) -> None:
        super().__init__(net, dtype)
        self.graph = graph
        self.convolutions = nn.ModuleList(convolutions)
        self.eval()

    def _run(self, x: Tensor) -> Any:
        return self.graph(x, tuple(self.convolutions))


class CudaGraphEngine(EagerEngine):
    """The same, with repeated shapes captured as CUDA graphs while it is on a CUDA device."""

    def __init__(
        self, net: nn.Module, graph: fx.GraphModule, convolutions: Sequence[nn.Module], dtype: torch.dtype
    ) -> None:
        super().__init__(net, graph, convolutions, dtype)
        self._clear_cache()

    @property
    def cached_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of images with a captured CUDA graph, from the least to the most recently used."""
        return tuple(self._graphs)

    def _run(self, x: Tensor) -> Any:
        run = super()._run
        graph = self._graphs.get(tuple(x.shape), lambda: self._pool.capture(run, x)) if x.is_cuda else None
        return run(x) if graph is None else graph(x)

    def _clear_cache(self) -> None:
        self._graphs: ShapeCache[tuple[int, ...], ForwardPass] = ShapeCache(NUM_CUDA_GRAPHS)
        self._pool = CudaGraphPool()


class OneDNNEngine(EagerEngine):
    """A graph with fused convolutions of oneDNN, prepacked for repeated shapes, on CPUs.

    oneDNN's ReLU turns NaN into 0, so images with NaN or very large numbers are computed by PyTorch operators.

    Args:
        net: The net that the graph was traced from.
        graph: Computes the outputs from images and a sequence with a callable for each fused convolution.
        convolutions: The fused convolutions.
        dtype: Dtype of the computation.
        prepack_bytes: Bytes that prepacked weights may take; 0 for none.

    Raises:
        ValueError: If weights are NaN or infinite.
    """

    def __init__(
        self,
        net: nn.Module,
        graph: fx.GraphModule,
        convolutions: Sequence[PrepackableConv],
        dtype: torch.dtype,
        prepack_bytes: int,
    ) -> None:
        super().__init__(net, graph, convolutions, dtype)  # type: ignore[arg-type]
        if not all(_has_finite_norm(tensor) for tensor in self.state_dict().values() if tensor.is_floating_point()):
            raise ValueError(
                f"{self.name} has weights or statistics that are NaN, infinite or above 1e19, or negative variances; "
                "repair them, or use optimize(net, backend='eager'), which propagates them"
            )
        self._capacity = prepack_bytes // max(sum(conv.weight.nbytes for conv in convolutions), 1)
        self._clear_cache()

    @property
    def cached_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of images with prepacked weights, from the least to the most recently used."""
        return tuple(dict.fromkeys(shape for shape, _ in self._prepacked))

    def _run(self, x: Tensor) -> Any:
        if is_tracing():  # a trace must not contain what depends on these images, or operators TorchScript lacks
            return self._run_traced(x)
        return self._run_fast(x) if _has_finite_norm(x) else self._run_nonfinite(x)

    def _run_fast(self, x: Tensor) -> Any:
        convolutions: Any = tuple(self.convolutions)
        # Weights prepacked for another number of threads would be reordered again in each call.
        key = (tuple(x.shape), torch.get_num_threads())
        prepacked = self._prepacked.get(key, lambda: PrepackedConvs(convolutions))
        return self.graph(x, convolutions if prepacked is None else prepacked.calls)

    def _run_nonfinite(self, x: Tensor) -> Any:
        """Compute images that hold NaN, infinity or very large numbers."""
        return self.graph(x, [conv.forward_eager for conv in self.convolutions])

    def _run_traced(self, x: Tensor) -> Any:
        return self._run_nonfinite(x)

    def _clear_cache(self) -> None:
        self._prepacked: ShapeCache[tuple[tuple[int, ...], int], PrepackedConvs] = ShapeCache(self._capacity)

    def _check_move(self, moved: Tensor) -> None:
        super()._check_move(moved)
        if moved.device.type != "cpu":
            raise TypeError(
                f"this net was optimized for oneDNN, which computes on CPUs, and cannot move to {moved.device}; "
                "optimize the original there"
            )


class QuantizedEngine(OneDNNEngine):
    """A graph with int8 convolutions, in which numbers can be neither NaN nor infinite.

    Attributes:
        ranges: Smallest and largest value of each tensor during calibration, by name.
    """

    ranges: dict[str, tuple[float, float]]

    def _run_traced(self, x: Tensor) -> Any:
        raise TypeError(
            "torch.jit.trace cannot record a quantized net, whose operators TorchScript lacks; trace the original, or "
            "save the quantized one as docs/inference.md says"
        )

    def _run_nonfinite(self, x: Tensor) -> Any:
        nonfinite = ~x.isfinite().flatten(1).all(1)
        return tree_map_only(
            Tensor, lambda out: out.index_fill_(0, nonfinite.nonzero()[:, 0], torch.nan), self._run_fast(x)
        )


def _has_finite_norm(x: Tensor) -> bool:
    """Return whether the L2 norm is finite: no NaN, no infinity, nothing above 1e19 that may become infinite inside."""
    return math.isfinite(torch.linalg.vector_norm(x).item())
