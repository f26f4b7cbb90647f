"""Wrappers that make mmcv's compiled operators, many of which ignore strides, accept non-contiguous tensors."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import wraps
from importlib.machinery import ExtensionFileLoader
from typing import Any

import torch
from torch import Tensor

_NAME = re.compile(r"(\w+): ")  # an argument in the signature that pybind11 puts into the docstring
# Names of read-only arguments of mmcv's operators; all others are compared after the call, since it may write to them.
_READ = {
    *("input", "input1", "input2", "features", "value", "points", "rois", "boxes", "weight", "offset", "mask", "masks"),
    *("grad_output", "gradOutput", "grad_out", "top_grad", "sampling_locations", "attention_weights", "best_bboxes"),
}


def guard_operators() -> bool:
    """Make the compiled operators of the installed mmcv accept tensors in any memory format. Idempotent.

    Returns:
        Whether there are compiled operators; mmcv-lite has none, and a module in pure Python is not changed.
    """
    try:
        module = importlib.import_module("mmcv._ext")
    except ImportError:
        return False
    if not isinstance(getattr(module.__spec__, "loader", None), ExtensionFileLoader):
        return False
    for name, operator in list(vars(module).items()):
        if callable(operator) and not name.startswith("_") and not hasattr(operator, "__wrapped__"):
            setattr(module, name, _guarded(operator))
    return True


def _guarded(operator: Callable[..., Any]) -> Callable[..., Any]:
    names = _NAME.findall((operator.__doc__ or "").partition("\n")[0])

    @wraps(operator)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        positional = zip(names, args, strict=False) if len(args) <= len(names) else enumerate(args)
        named = [*positional, *kwargs.items()]
        others = [(name, arg) for name, arg in named if isinstance(arg, Tensor) and not arg.is_contiguous()]
        if not others:
            return operator(*args, **kwargs)
        copies = {id(arg): arg.contiguous() for _, arg in others}
        result = operator(
            *(copies.get(id(arg), arg) for arg in args),
            **{name: copies.get(id(arg), arg) for name, arg in kwargs.items()},
        )
        with torch.no_grad():
            for name, arg in others:
                if name not in _READ and not torch.equal(arg, copies[id(arg)]):
                    arg.copy_(copies[id(arg)])  # an output or a workspace
        return result

    return guarded
