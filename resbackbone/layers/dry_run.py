"""Dry runs: the constructor of a net checks all its layers before memory is allocated for any of them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from resbackbone.registry import construct
from resbackbone.utils.validation import UnknownKeyError

# Packages with layers that can be built and run on the meta device without side effects.
WITHOUT_SIDE_EFFECTS = (
    *("resbackbone", "torch", "mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain", "torchvision", "timm"),
)
# "Cannot copy out of meta tensor", "two devices, cpu and meta", "implementation for device meta:0 not found"
_META_DEVICE = re.compile(r"\bmeta\b.*\b{0}|\b{0}.*\bmeta\b".format("(tensor|device|backend|kernel)s?\\b"), re.I | re.S)
_current: ContextVar[DryRun | None] = ContextVar("dry_run", default=None)


class DryRun:
    """State of a dry run.

    Attributes:
        num_weights: Number of weights of all convolutions and plugins so far.
        placeholder: Layer in place of every convolution.
    """

    def __init__(self) -> None:
        self.num_weights = 0
        self.placeholder = nn.Identity()
        self._results: dict[tuple[Any, ...], Any] = {}

    def once(self, key: tuple[Any, ...], check: Callable[[], Any]) -> Any:
        """Return ``check()``, called only the first time for a key; its values are compared by ``repr``."""
        text = tuple(value if isinstance(value, (type, int)) else repr(value) for value in key)
        if text not in self._results:
            self._results[text] = check()
        return self._results[text]


@contextmanager
def dry_run() -> Iterator[DryRun]:
    """Make constructors in this context check their arguments on the meta device, without allocating memory."""
    run = DryRun()
    token = _current.set(run)
    try:
        with torch.device("meta"):
            yield run
    finally:
        _current.reset(token)


def current_dry_run() -> DryRun | None:
    """Return the current dry run, or None outside of :func:`dry_run`."""
    return _current.get()


def try_layer(
    layer_class: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    what: str,
    shape: tuple[int, ...],
    expected: tuple[int, ...],
    *,
    device: str = "meta",
) -> nn.Module:
    """Build a third-party layer in a dry run, and check the shape of its output.

    Args:
        layer_class: The class.
        args: Positional arguments of its constructor.
        kwargs: Keyword arguments of its constructor.
        what: Description of the layer for errors, such as "`norm_cfg` of type 'LN'".
        shape: Shape of the input.
        expected: Expected shape of the output.
        device: "meta", where layers that need real memory are skipped; or "cpu", where values are checked, too.

    Returns:
        The layer in eval mode. ``nn.Identity`` if it is skipped, as are all classes outside
        :data:`WITHOUT_SIDE_EFFECTS`: the constructors of users' classes are called once only.

    Raises:
        KeyError, TypeError, ValueError: If the constructor raises, the layer does not run, the shape differs, or finite
            inputs give infinite values or NaN.
    """
    if layer_class.__module__.partition(".")[0] not in WITHOUT_SIDE_EFFECTS:
        return nn.Identity()
    try:
        layer: nn.Module = construct(layer_class, *args, **kwargs)
    except Exception as error:  # third-party constructors may raise anything
        if is_about_meta(error):
            return nn.Identity()
        if isinstance(error, UnknownKeyError):  # from a nested config
            raise UnknownKeyError(f"{what} cannot be built: {error}") from error
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{what} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(layer, nn.Module):
        raise TypeError(f"{what} must be a layer, got {layer!r} of type {type(layer).__name__}")
    _check_output(layer.eval(), shape, expected, what, device)
    return layer


def _check_output(layer: nn.Module, shape: tuple[int, ...], expected: tuple[int, ...], what: str, device: str) -> None:
    try:
        with torch.no_grad():
            out = layer(torch.linspace(-2, 2, math.prod(shape), device=device).view(shape))
    except Exception as error:  # third-party layers may raise anything
        if device == "meta" and is_about_meta(error):
            return
        raise ValueError(f"{what} does not run on {_format(shape)}: {type(error).__name__}: {error}") from error
    if not isinstance(out, Tensor) or tuple(out.shape) != expected:
        got = _format(tuple(out.shape)) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{what} must map {_format(shape)} to {_format(expected)}, got {got}")
    if device != "meta" and not out.isfinite().all():
        raise ValueError(f"{what} maps finite numbers to infinite ones or NaN")


def check_layer_initializes(layer: nn.Module, what: str) -> None:
    """Raise ValueError if ``init_weights()`` of a third-party layer on the meta device fails."""
    from mmengine.model import BaseModule

    method: Any = getattr(type(layer), "init_weights", None)
    # mmengine's own method works; an `init_cfg` may name a checkpoint, which is not loaded in a dry run.
    if method in (None, BaseModule.init_weights) or any(getattr(part, "init_cfg", None) for part in layer.modules()):
        return
    try:
        method(layer)
    except Exception as error:  # third-party layers may raise anything
        if not is_about_meta(error):
            raise ValueError(f"{what} cannot be initialized: {type(error).__name__}: {error}") from error


def is_about_meta(error: Exception) -> bool:
    """Return whether an error only says that a tensor on the meta device has no values."""
    words = str(error)
    return bool(_META_DEVICE.search(words)) or (isinstance(error, NotImplementedError) and "meta" in words.lower())


def check_memory(num_weights: int, sizes: Mapping[str, Any]) -> None:
    """Raise ValueError unless weights fit into this machine's memory.

    Args:
        num_weights: Number of weights, of four bytes each.
        sizes: The arguments that determine it, for the error.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        memory = 2**40
    if 4 * num_weights > memory:
        named = ", ".join(f"`{name}`={size}" for name, size in sizes.items())
        raise ValueError(
            f"the weights would take {4 * num_weights / 2**30:,.0f} GiB, of {memory / 2**30:,.0f} GiB of memory here; "
            f"they follow from {named}"
        )


def _format(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
