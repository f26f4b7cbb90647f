"""The modules that `optimize` and `quantize` return, called as the backbone is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from resbackbone.backbones.base import Backbone, check_images
from resbackbone.backbones.feature_info import FeatureInfo
from resbackbone.inference.cuda_graph import Recorder
from resbackbone.inference.prepacked_convs import Packable, Packs
from resbackbone.inference.shape_cache import ReturningSizes
from resbackbone.layers.memory_format import is_channels_last, to_contiguous
from resbackbone.layers.tracing import is_tracing, refuse_scripting
from resbackbone.utils import processor
from resbackbone.utils.validation import warn_user

CUDA_GRAPHS = 16  # sizes that are captured at once; each keeps its images and feature maps


class Optimized(nn.Module):
    """What they all have: the promises of the backbone, evaluation for ever, and the conversion of the input.

    Attributes:
        dtype: What is computed in.
        out_dtype: Of the feature maps; another one only where the processor has no instructions for it.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = self.out_dtype = dtype
        self.name = type(net).__name__
        self.in_channels: int | None = getattr(net, "in_channels", None)  # None if it is not a backbone alone
        self._required_channels = net.required_channels if isinstance(net, Backbone) else None
        self.feature_info: tuple[FeatureInfo, ...] = getattr(net, "feature_info", ())
        self.out_channels = getattr(net, "out_channels", None)
        self.out_strides = getattr(net, "out_strides", None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        """Compute the feature maps of images ``(N, in_channels, H, W)``, in the memory format of the images."""
        if is_tracing():
            pass  # whose sizes must not become part of what is recorded
        elif self._required_channels is not None:
            check_images(x, self.name, self._required_channels)
        elif not isinstance(x, Tensor):
            raise TypeError(
                f"an optimized {self.name} takes one tensor, got {type(x).__name__}; stack its images first"
            )
        contiguous = not is_channels_last(x)
        x = x.to(self.dtype, memory_format=torch.channels_last if x.dim() == 4 else torch.preserve_format)
        if not torch.is_autocast_enabled(x.device.type):
            return self._convert(self._run(x), contiguous=contiguous)
        with torch.autocast(x.device.type, enabled=False):  # the dtype is the one that was asked for
            return self._convert(self._run(x), contiguous=contiguous)

    def _convert(self, outs: Any, *, contiguous: bool) -> Any:
        """Bring what was computed into the dtype and the memory format that were asked for."""
        if self.out_dtype is not self.dtype:
            outs = tree_map_only(Tensor, lambda out: out.to(self.out_dtype) if out.is_floating_point() else out, outs)
        return to_contiguous(outs) if contiguous else outs

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        on_cpu = all(tensor.device.type == "cpu" for tensor in self.state_dict().values())
        if on_cpu and not processor.computes_natively(self.dtype):  # of a file from another machine
            slow = "and is several times slower in it than in float32; optimize the original anew, here"
            warn_user(f"{processor.reason(self.dtype)} {slow}")

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which asks here first."""
        refuse_scripting(self)

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation, whatever what it is part of does: what is folded cannot train."""
        return super().train(False)

    @property
    def packed_sizes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of images for which weights are laid out, that of longest ago first."""
        return ()

    def _run(self, x: Tensor) -> Any:
        raise NotImplementedError

    def _forget(self) -> None:
        """Drop what was made of the weights for some sizes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = fn(torch.empty(1, dtype=self.dtype))
        self._check_move(moved)
        self._forget()
        if moved.dtype is not self.dtype:  # but `out_dtype`, in which it does not compute
            return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _check_move(self, moved: Tensor) -> None:
        """Refuse what the weights shall become."""
        if moved.dtype not in (self.dtype, self.out_dtype):
            raise TypeError(
                f"this net was optimised for {self.out_dtype} and cannot become {moved.dtype}; "
                "optimize the original for that `dtype`"
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)


class Compiled(Optimized):
    """What ``torch.compile`` makes of a net.

    Args:
        net: The net, in its final dtype and layout.
        dtype: What is handed in and out.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(net, dtype)
        self.net = net
        self.net.compile()
        self.eval()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.net.compile()  # which is no part of a module's state

    def _run(self, x: Tensor) -> Any:
        return self.net(x)


class Folded(Optimized):
    """A graph that calls convolutions with what follows them, on any device.

    Args:
        net: What it is made of.
        graph: What computes, of images and of what it calls in place of each convolution.
        convolutions: These.
        dtype: What is handed in and out.
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


class Captured(Folded):
    """The same on a CUDA device, where a size that comes back is captured as a CUDA graph."""

    def __init__(
        self, net: nn.Module, graph: fx.GraphModule, convolutions: Sequence[nn.Module], dtype: torch.dtype
    ) -> None:
        super().__init__(net, graph, convolutions, dtype)
        self._forget()

    @property
    def packed_sizes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of images that are captured, that of longest ago first."""
        return tuple(self._graphs)

    def _run(self, x: Tensor) -> Any:
        run = super()._run
        graph = self._graphs.get(tuple(x.shape), lambda: self._recorder.record(run, x)) if x.is_cuda else None
        return run(x) if graph is None else graph(x)

    def _forget(self) -> None:
        self._graphs: ReturningSizes[Callable[[Tensor], Any]] = ReturningSizes(CUDA_GRAPHS)
        self._recorder = Recorder()


class Fused(Folded):
    """A graph that calls operators of oneDNN, whose ReLU makes zeros of NaN.

    Args:
        net: What it is made of.
        graph: What computes, of images and of what it calls in place of each convolution.
        convolutions: These.
        dtype: What is handed in and out.
        pack_bytes: Bytes that laid-out weights may take; 0 for none.

    Raises:
        ValueError: If weights are NaN or infinite.
    """

    def __init__(
        self,
        net: nn.Module,
        graph: fx.GraphModule,
        convolutions: Sequence[Packable],
        dtype: torch.dtype,
        pack_bytes: int,
    ) -> None:
        super().__init__(net, graph, convolutions, dtype)  # type: ignore[arg-type]
        if not all(_is_tame(tensor) for tensor in self.state_dict().values() if tensor.is_floating_point()):
            raise ValueError(
                f"{self.name} has weights or statistics that are NaN, infinite or above 1e19, or negative variances; "
                "mend them, or use optimize(net, backend='eager'), which computes what such numbers give"
            )
        self._capacity = pack_bytes // max(sum(conv.weight.nbytes for conv in convolutions), 1)
        self._forget()

    @property
    def packed_sizes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of images for which weights are laid out, that of longest ago first."""
        return tuple(dict.fromkeys(shape for shape, _ in self._packs))

    def _run(self, x: Tensor) -> Any:
        if is_tracing():  # what holds for this image alone, or no TorchScript has, must not be in what is recorded
            return self._run_traced(x)
        return self._run_fast(x) if _is_tame(x) else self._run_safely(x)

    def _run_fast(self, x: Tensor) -> Any:
        convolutions: Any = tuple(self.convolutions)
        # Laid out for another number of threads, weights would be laid out anew in each call.
        packs = self._packs.get((tuple(x.shape), torch.get_num_threads()), lambda: Packs(convolutions))
        return self.graph(x, convolutions if packs is None else packs.calls)

    def _run_safely(self, x: Tensor) -> Any:
        """Compute images that are not tame."""
        return self.graph(x, [conv.plainly for conv in self.convolutions])

    def _run_traced(self, x: Tensor) -> Any:
        return self._run_safely(x)

    def _forget(self) -> None:
        self._packs: ReturningSizes[Packs] = ReturningSizes(self._capacity)

    def _check_move(self, moved: Tensor) -> None:
        super()._check_move(moved)
        if moved.device.type != "cpu":
            raise TypeError(
                f"this net was optimised for oneDNN, which computes on CPUs, and cannot move to {moved.device}; "
                "optimize the original there"
            )


class Quantized(Fused):
    """A graph that calls operators of bytes, which can be neither NaN nor infinite.

    Attributes:
        ranges: The smallest and the largest number that each tensor had while they were measured, by its name.
    """

    ranges: dict[str, tuple[float, float]]

    def _run_traced(self, x: Tensor) -> Any:
        raise TypeError(
            "torch.jit.trace cannot record a quantized net, whose operators TorchScript lacks; trace the original, or "
            "save the quantized one as docs/inference.md says"
        )

    def _run_safely(self, x: Tensor) -> Any:
        spoilt = ~x.isfinite().flatten(1).all(1)
        return tree_map_only(
            Tensor, lambda out: out.index_fill_(0, spoilt.nonzero()[:, 0], torch.nan), self._run_fast(x)
        )


def _is_tame(x: Tensor) -> bool:
    """Whether there is no NaN, no infinity and no number so large, above 1e19, that layers may well make one of it."""
    return math.isfinite(torch.linalg.vector_norm(x).item())  # its squares are finite
