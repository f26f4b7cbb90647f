"""Dry runs of constructors: check all layers at their real widths before memory is allocated for any of them."""

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

# What has no side effects when it is made and run on the meta device.
TRIED = ("resbackbone", "torch", "mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain", "torchvision", "timm")
# "Cannot copy out of meta tensor", "two devices, cpu and meta", "implementation for device meta:0 not found"
_META_DEVICE = re.compile(r"\bmeta\b.*\b{0}|\b{0}.*\bmeta\b".format("(tensor|device|backend|kernel)s?\\b"), re.I | re.S)
_current: ContextVar[DryRun | None] = ContextVar("dry_run", default=None)


class DryRun:
    """What a dry run has seen so far.

    Attributes:
        num_weights: Numbers in the weights of all convolutions.
    """

    def __init__(self) -> None:
        self.num_weights = 0
        self.placeholder = nn.Identity()  # stands for every convolution
        self._tried: dict[tuple[Any, ...], Any] = {}

    def once(self, key: tuple[Any, ...], trial: Callable[[], Any]) -> Any:
        """Return ``trial()``, which is run the first time only for these values; they are compared by their text."""
        text = tuple(value if isinstance(value, (type, int)) else repr(value) for value in key)
        if text not in self._tried:
            self._tried[text] = trial()
        return self._tried[text]


@contextmanager
def dry_run() -> Iterator[DryRun]:
    """Let constructors that run in this context check what they are given, and build nothing that takes memory."""
    run = DryRun()
    token = _current.set(run)
    try:
        with torch.device("meta"):
            yield run
    finally:
        _current.reset(token)


def current_dry_run() -> DryRun | None:
    """Return the dry run that goes on, or None where layers are built."""
    return _current.get()


def check_layer_runs(
    layer: nn.Module, shape: tuple[int, ...], expected: tuple[int, ...], what: str, *, device: str = "meta"
) -> None:
    """Raise unless a layer maps a tensor of one shape to one of another.

    Args:
        layer: The layer, of any class.
        shape: Of the input.
        expected: Of the output.
        what: The layer in words that name the argument, such as "`norm_cfg` of type 'LN'".
        device: Where the layer is.

    Raises:
        ValueError: If it does not run, or the shape is another; or if it maps finite numbers to others, where the
            device has numbers. A layer that cannot run on the meta device is let pass there.
    """
    try:
        with torch.no_grad():
            out = layer(torch.linspace(-2, 2, math.prod(shape), device=device).view(shape))
    except Exception as error:  # whatever a layer of somebody's raises
        if device == "meta" and is_about_meta(error):
            return
        raise ValueError(f"{what} does not run on {_words(shape)}: {type(error).__name__}: {error}") from error
    if not isinstance(out, Tensor) or tuple(out.shape) != expected:
        got = _words(tuple(out.shape)) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{what} must map {_words(shape)} to {_words(expected)}, got {got}")
    if device != "meta" and not out.isfinite().all():
        raise ValueError(f"{what} maps finite numbers to infinite ones or NaN")


def check_layer_initializes(layer: nn.Module, what: str) -> None:
    """Raise ValueError unless a foreign layer on the meta device can be initialized once more, as its host will do."""
    method: Any = getattr(type(layer), "init_weights", None)
    if (
        method is None
        or method.__module__.startswith("mmengine.")
        or any(vars(m).get("init_cfg") for m in layer.modules())
    ):
        return  # mmengine's works, and an `init_cfg` may name a checkpoint
    try:
        method(layer)
    except Exception as error:  # whatever a layer of somebody's raises
        if not is_about_meta(error):
            raise ValueError(f"{what} cannot be initialized: {type(error).__name__}: {error}") from error


def is_about_meta(error: Exception) -> bool:
    """Return whether an error says no more than that a tensor on the meta device has no numbers."""
    words = str(error)
    return bool(_META_DEVICE.search(words)) or (isinstance(error, NotImplementedError) and "meta" in words.lower())


def is_tried(layer_class: type) -> bool:
    """Return whether a dry run makes a layer of this class; one of a user's own has its constructor run once."""
    return layer_class.__module__.partition(".")[0] in TRIED


def make_foreign(layer_class: Any, arguments: Mapping[str, Any], what: str) -> nn.Module | None:
    """Make a layer of a class that is not ours but of :data:`TRIED`, in a dry run.

    Returns:
        The layer, on the meta device; None if it cannot be made without memory.

    Raises:
        KeyError, TypeError, ValueError: If its constructor raises.
    """
    try:
        layer: nn.Module = construct(layer_class, **arguments)
    except Exception as error:  # whatever a constructor of somebody's raises
        if is_about_meta(error):
            return None
        if isinstance(error, UnknownKeyError):  # of a config inside it, in our words
            raise UnknownKeyError(f"{what} cannot be built: {error}") from error
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{what} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(layer, nn.Module):
        raise TypeError(f"{what} must be a layer, got {layer!r} of type {type(layer).__name__}")
    return layer


def _words(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def check_memory(num_weights: int, sizes: Mapping[str, Any]) -> None:
    """Raise ValueError unless weights fit into this machine's memory.

    Args:
        num_weights: How many numbers they are, of four bytes.
        sizes: The arguments that set their number, for the error.
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
