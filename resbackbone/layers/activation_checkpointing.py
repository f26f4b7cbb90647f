"""Activation checkpointing: recompute all activations in the backward pass, or only those that are cheap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from resbackbone.layers.conv_norm import ConvNormModule, is_frozen
from resbackbone.layers.norm import is_norm
from resbackbone.layers.tracing import is_tracing
from resbackbone.utils.validation import check_type

WithCp = bool | Literal["norms"]

# Operators with kept outputs: convolutions, and the stem's pooling, which is as slow as several norms.
_KEPT = {
    "aten::convolution",
    "aten::max_pool2d_with_indices",
    "mkldnn::_convolution_pointwise",
    "torchvision::deform_conv2d",
}
_Kept = list[list[tuple[Tensor, int]]]  # each tensor with its version, the number of in-place changes


def check_with_cp(with_cp: object) -> None:
    """Raise TypeError unless ``with_cp`` is True, False or "norms"."""
    if not (isinstance(with_cp, str) and with_cp == "norms"):
        check_type("with_cp", with_cp, bool, "True, False or 'norms'")


def needs_backward(x: Any, modules: Sequence[nn.Module]) -> bool:
    """Return whether a backward pass may follow a run of ``modules`` on one or several tensors."""
    tensors = x if isinstance(x, (list, tuple)) else [x]
    if not torch.is_grad_enabled() or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return False
    parameters = (parameter for module in modules for parameter in module.parameters())
    return any(tensor.requires_grad for tensor in tensors) or any(p.requires_grad for p in parameters)


def recompute_norms(function: Callable[[Tensor], Tensor], x: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """Run ``function(x)``, and of its activations keep only ``x`` and the outputs of convolutions and max pooling.

    The backward pass recomputes the activations of norms, ReLUs and sums, to the same bits. ``torch.compile`` chooses
    itself what it keeps: under it, without a backward pass, or if all norms are folded, this is ``function(x)``.

    Args:
        function: The function.
        x: Its input.
        modules: The layers that it runs.
    """
    runs_plain = torch.compiler.is_compiling() or is_tracing() or not needs_backward(x, modules)
    if runs_plain or not _has_norms(modules):
        return function(x)
    kept: _Kept = []
    out: Tensor = _checkpoint(function, x, _RecordOutputs(kept), _Recomputation(modules, kept))
    return out


def _has_norms(modules: Sequence[nn.Module]) -> bool:
    layers = [layer for module in modules for layer in module.modules()]
    folding = any(isinstance(layer, ConvNormModule) and layer.folds_norms for layer in layers)
    return any(is_norm(layer) and not (folding and is_frozen(layer)) for layer in layers)


def recompute_in_backward(function: Callable[[Any], Any], x: Any, modules: Sequence[nn.Module]) -> Any:
    """Run ``function(x)`` without keeping its activations; the backward pass runs it again, to the same bits.

    Running statistics are updated in the first run only. (With ``torch.utils.checkpoint`` alone, they are twice.)

    Args:
        function: The function.
        x: Its input.
        modules: The layers that it runs.
    """
    return _checkpoint(function, x, nullcontext(), _Recomputation(modules))


def _checkpoint(function: Any, x: Any, first: AbstractContextManager[Any], again: AbstractContextManager[Any]) -> Any:
    # The compiler updates statistics once by itself, and accepts no contexts.
    options: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": lambda: (first, again)}
    return checkpoint(function, x, use_reentrant=False, **options)


@cache
def _is_kept(operator: torch._ops.OpOverload[..., Any]) -> bool:
    return operator._schema.name in _KEPT


class _RecordOutputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the outputs of the operators in ``_KEPT``."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_kept(func):
            # Detached, to avoid a reference cycle. The guard keeps the version counter, which a tensor otherwise loses
            # here, below autograd, as in torch's own selective checkpointing.
            with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
                detached = [tensor.detach() for tensor in _as_tuple(out)]
            self.kept.append([(tensor, tensor._version) for tensor in detached])
        return out


class _ReuseOutputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Returns the recorded outputs in place of computing them, unless they were overwritten since."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = iter(kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_kept(func):
            kept = next(self.kept)
            if all(tensor._version == version for tensor, version in kept):
                outs = tuple(tensor.detach() for tensor, _ in kept)
                return outs if len(outs) > 1 else outs[0]
        return func(*args, **(kwargs or {}))


def _as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out


class _Recomputation(AbstractContextManager[None]):
    """The context of the second run, which may happen more than once if the graph is retained."""

    def __init__(self, modules: Sequence[nn.Module], kept: _Kept | None = None) -> None:
        self.modules = modules
        self.kept = kept

    def __enter__(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(_discard_statistics(self.modules))
        if self.kept is not None:
            self.stack.enter_context(_ReuseOutputs(self.kept))

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)


@contextmanager
def _discard_statistics(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let norms in training mode update copies of their running statistics, which are then discarded."""
    norms = [m for module in modules for m in module.modules() if isinstance(m, _NormBase) and m.training]
    originals = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in originals:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in originals:
            setattr(norm, name, buffer)
