"""Parameter groups for any optimizer: which parameters decay, and how fast each layer learns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from resbackbone.backbones import ResNet
from resbackbone.backbones.layer_depth import layer_depth
from resbackbone.layers.norm import is_norm
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
    """Sort the parameters of a net into groups.

    Args:
        net: A backbone, or a model with one or several in it. What lies outside of them is the head, even if it comes
            before them.
        lr: Learning rate of the head.
        layer_decay: What the rate is multiplied by from one depth to the next towards the images, above 0 and up to 1;
            depths are those of :func:`~resbackbone.backbones.layer_depth.layer_depth`. With 1 all learn at ``lr``.
        weight_decay: Weight decay of those parameters that have one.
        no_decay: Which do not: "norm", those of norm layers; "bias", those whose names end so; any other word, those
            whose names have it in them.
        with_frozen: Take parameters that do not train, too, for an optimizer under which they are to train later.

    Returns:
        One dict of ``name``, ``params``, ``lr`` and ``weight_decay`` per group, in the order of the net. Each parameter
        that trains is in one of them.

    Raises:
        TypeError, ValueError: If an argument does not fit the others or the net.

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
    below = _depths_below_head(net) if layer_decay != 1 else {}
    stem = max(below.values(), default=0)
    groups: dict[str, dict[str, Any]] = {}
    unmatched = set(no_decay) - {"norm", "bias"}
    for name, parameter, owner in _parameters(net):
        without_decay = {word for word in no_decay if _matches(word, name, owner)}
        unmatched -= without_decay
        if not (parameter.requires_grad or with_frozen):
            continue
        depths = below.get(parameter, 0)
        group: dict[str, Any] = {
            "name": f"depth {stem - depths}, " * bool(below) + ("no decay" if without_decay else "decay"),
            "params": [],
            "lr": lr * layer_decay**depths,
            "weight_decay": 0.0 if without_decay else weight_decay,
        }
        groups.setdefault(group["name"], group)["params"].append(parameter)
    if unmatched:
        raise ValueError(f"`no_decay` has {sorted(unmatched)[0]!r}, which is in no parameter's name; misspelt?")
    if not groups:
        raise ValueError(f"{type(net).__name__} has no parameter that trains; is everything frozen?")
    return list(groups.values())


def _depths_below_head(net: nn.Module) -> dict[nn.Parameter, int]:
    """How many depths below the head each parameter of a backbone lies."""
    below = {}
    for backbone in net.modules():
        if isinstance(backbone, ResNet):
            for name, parameter in backbone.named_parameters():
                depth, head = layer_depth(backbone, name)
                below[parameter] = head - depth
    if not below:
        raise ValueError(
            f"`layer_decay` must be 1 in a {type(net).__name__} with none of resbackbone's backbones in it, whose "
            "depths nobody knows"
        )
    return below


def _parameters(net: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Each parameter once, with its name and the layer that has it."""
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
        check_type(f"no_decay[{index}]", word, str, "'norm', 'bias' or a part of parameters' names")
