"""Optimizer parameter groups: weight decay per parameter and layer-wise learning rate decay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from resbackbone.backbones import ResNet
from resbackbone.layers.norm import is_norm
from resbackbone.training.layer_depth import layer_depth
from resbackbone.utils.validation import check_sequence, check_type


def param_groups(
    net: nn.Module,
    lr: float,
    layer_decay: float = 1.0,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = ("norm", "bias"),
    *,
    with_frozen: bool = False,
) -> list[dict[str, Any]]:
    """Split the parameters of a model into groups by learning rate and weight decay.

    Args:
        net: A backbone, or a model that contains one or several. Parameters outside of backbones belong to the head.
        lr: Learning rate of the head.
        layer_decay: Factor of the learning rate from one depth to the next, from the head down to the stem, above 0
            and up to 1. Depths are those of :func:`~resbackbone.training.layer_depth`. With 1 every parameter has
            ``lr``.
        weight_decay: Weight decay, except for the parameters that ``no_decay`` selects.
        no_decay: Parameters without weight decay: "norm" selects those of norm layers, "bias" those with names ending
            in it, and any other word those with names containing it.
        with_frozen: Also include parameters with ``requires_grad=False``, for an optimizer that trains them later.

    Returns:
        One dict of ``name``, ``params``, ``lr`` and ``weight_decay`` per group, in the order of the parameters. Every
        parameter is in exactly one group.

    Raises:
        TypeError, ValueError: If an argument is invalid or does not fit the model.

    Source: Howard and Ruder, Universal Language Model Fine-tuning for Text Classification, arXiv:1801.06146, section
    3.2; norms and biases without weight decay as in Goyal et al., arXiv:1706.02677, section 5.1.

    >>> from resbackbone import build_backbone
    >>> net = build_backbone("resnet18", frozen_stages=2)
    >>> for group in param_groups(net, lr=0.1, layer_decay=0.5, weight_decay=1e-4):
    ...     print(group["name"], len(group["params"]), group["lr"], group["weight_decay"])
    depth 3, decay 5 0.025 0.0001
    depth 3, no decay 10 0.025 0.0
    depth 4, decay 5 0.05 0.0001
    depth 4, no decay 10 0.05 0.0
    """
    _check(lr, layer_decay, weight_decay, no_decay)
    depths_below_head = _depths_below_head(net) if layer_decay != 1 else {}
    num_depths = max(depths_below_head.values(), default=0)
    groups: dict[str, dict[str, Any]] = {}
    unmatched = set(no_decay) - {"norm", "bias"}
    for name, parameter, owner in _parameters(net):
        without_decay = {word for word in no_decay if _matches(word, name, owner)}
        unmatched -= without_decay
        if not (parameter.requires_grad or with_frozen):
            continue
        depths = depths_below_head.get(parameter, 0)
        group: dict[str, Any] = {
            "name": f"depth {num_depths - depths}, " * bool(depths_below_head)
            + ("no decay" if without_decay else "decay"),
            "params": [],
            "lr": lr * layer_decay**depths,
            "weight_decay": 0.0 if without_decay else weight_decay,
        }
        groups.setdefault(group["name"], group)["params"].append(parameter)
    if unmatched:
        raise ValueError(f"`no_decay` has {sorted(unmatched)[0]!r}, which is in no parameter name; check the spelling")
    if not groups:
        raise ValueError(f"{type(net).__name__} has no trainable parameter; is everything frozen?")
    return list(groups.values())


def _depths_below_head(net: nn.Module) -> dict[nn.Parameter, int]:
    """Return the number of depths between each backbone parameter and the head."""
    below = {}
    for backbone in net.modules():
        if isinstance(backbone, ResNet):
            for name, parameter in backbone.named_parameters():
                depth, head = layer_depth(backbone, name)
                below[parameter] = head - depth
    if not below:
        raise ValueError(
            f"`layer_decay` must be 1 for a {type(net).__name__} without a backbone of resbackbone, as only those have "
            "known depths"
        )
    return below


def _parameters(net: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield each parameter once, with its name and the layer that owns it."""
    seen = set()
    for prefix, layer in net.named_modules():
        for name, parameter in layer.named_parameters(prefix, recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield name, parameter, layer


def _matches(word: str, name: str, layer: nn.Module) -> bool:
    if word == "norm":
        return is_norm(layer)
    return name.endswith("bias") if word == "bias" else word in name


def _check(lr: object, layer_decay: object, weight_decay: object, no_decay: object) -> None:
    for argument, value in (("lr", lr), ("layer_decay", layer_decay), ("weight_decay", weight_decay)):
        check_type(argument, value, (int, float), "a number")
        assert isinstance(value, (int, float))
        if not (0 <= value < math.inf) or (argument == "layer_decay" and not 0 < value <= 1):
            allowed = "above 0 and at most 1" if argument == "layer_decay" else "finite and not negative"
            raise ValueError(f"`{argument}` must be {allowed}, got {value}")
    for index, word in enumerate(check_sequence("no_decay", no_decay)):
        check_type(f"no_decay[{index}]", word, str, "'norm', 'bias' or a part of parameter names")
