"""Normalisation layers built from a config, and the batch norm whose statistics never move."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from resbackbone.checks import check_int
from resbackbone.layers.module import Config
from resbackbone.registry import MODELS, construct, find_type, of_kind, split_type

for _name, _norm in {
    "BN": nn.BatchNorm2d,
    "BN2d": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": nn.GroupNorm,
    "IN": nn.InstanceNorm2d,
    "IN2d": nn.InstanceNorm2d,
}.items():
    MODELS.register_module(_name, module=_norm)

# The first that fits names the layer; instance norm before batch norm, which some versions derive it from.
_ABBREVIATIONS: tuple[tuple[type, str], ...] = (
    (_InstanceNorm, "in"),
    (_BatchNorm, "bn"),
    (nn.GroupNorm, "gn"),
    (nn.LayerNorm, "ln"),
)


@of_kind("norm")
@MODELS.register_module("FrozenBN")
class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and a fixed affine map: four buffers, nothing to train.

    In eval mode a :class:`torch.nn.BatchNorm2d` with the same values gives the same bits. Its state dict loads here
    (``num_batches_tracked`` is passed over).

    Args:
        num_features: Channels.
        eps: Added to the variance before the root.

    Source: Detectron2's ``FrozenBatchNorm2d``; He et al., Mask R-CNN, arXiv:1703.06870, section 3.1.
    """

    _abbr_ = "bn"
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, num_features, H, W)`` to the same shape."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Show the channels and eps in ``repr``."""
        return f"{self.num_features}, eps={self.eps}"


def build_norm_layer(cfg: Config, num_features: int, postfix: int | str = "") -> tuple[str, nn.Module]:
    """Build a norm and the attribute name that OpenMMLab gives it.

    Args:
        cfg: A dict with the registered ``type`` ("BN", "SyncBN", "GN", "IN", "FrozenBN", your own), optionally
            ``requires_grad`` (False keeps the affine parameters from training), and arguments of that type's own;
            ``eps`` is 1e-5 unless given.
        num_features: Channels.
        postfix: What follows the abbreviation in the name.

    Returns:
        The name, such as ``"bn1"``, ``"gn1"`` or ``"in1"``, and the layer.

    Raises:
        TypeError: If ``cfg`` is no dict.
        KeyError: If it has no ``type`` or an unknown one.
        ValueError: If a group norm has no ``num_groups``, or they do not divide the channels.
    """
    type_, arguments = split_type(cfg, "norm_cfg")
    arguments.setdefault("eps", 1e-5)
    requires_grad = arguments.pop("requires_grad", True)
    norm_class = find_type(type_, "norm")
    if norm_class is nn.GroupNorm:
        if "num_groups" not in arguments:
            raise ValueError(f"`norm_cfg` of type 'GN' needs `num_groups`, such as 32; got {dict(cfg)!r}")
        num_groups = arguments["num_groups"]
        check_int("norm_cfg['num_groups']", num_groups, low=1)
        if num_features % num_groups:
            raise ValueError(
                f"`norm_cfg` asks for {num_groups} groups, which do not divide the {num_features} channels of a layer; "
                f"choose a common divisor of all widths, got {dict(cfg)!r}"
            )
        norm = norm_class(num_channels=num_features, **arguments)
    else:
        norm = construct(norm_class, num_features, **arguments)
    for parameter in norm.parameters():
        parameter.requires_grad = requires_grad
    return _abbreviation(norm_class) + str(postfix), norm


def is_norm(layer: nn.Module) -> bool:
    """Return whether a layer is a norm, by its class: one of torch's, derived from one, or called one."""
    bases = tuple(base for base, _ in _ABBREVIATIONS)
    return isinstance(layer, bases) or re.search(r"norm(\dd)?$", type(layer).__name__, re.IGNORECASE) is not None


def _abbreviation(norm_class: type) -> str:
    if hasattr(norm_class, "_abbr_"):
        return str(norm_class._abbr_)
    for base, abbreviation in _ABBREVIATIONS:
        if issubclass(norm_class, base):
            return abbreviation
    name = norm_class.__name__.lower()
    for word, abbreviation in (("batch", "bn"), ("group", "gn"), ("layer", "ln"), ("instance", "in")):
        if word in name:
            return abbreviation
    return "norm_layer"
