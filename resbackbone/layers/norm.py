"""Normalization layers built from a config, and the batch norm whose statistics never move."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from resbackbone.layers.arguments import (
    CHECKED_NORMS,
    GIVEN_TO_NORMS,
    check_entries,
    check_eps,
    check_norm_entries,
    layer_type,
)
from resbackbone.layers.dry_run import check_layer_runs, current_dry_run, is_tried, make_foreign
from resbackbone.layers.module import Config
from resbackbone.registry import MODELS, construct, register_kind
from resbackbone.utils.validation import check_flag, check_int

for _name, _norm in {
    "BN": nn.BatchNorm2d,
    "BN2d": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": nn.GroupNorm,
    "IN": nn.InstanceNorm2d,
    "IN2d": nn.InstanceNorm2d,
}.items():
    MODELS.register_module(_name, module=_norm)

# Norms of feature maps, which need no trial.
_KNOWN = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)

# The first that fits names the layer; instance norm before batch norm, which some versions derive it from.
_ABBREVIATIONS: tuple[tuple[type, str], ...] = (
    (_InstanceNorm, "in"),
    (_BatchNorm, "bn"),
    (nn.GroupNorm, "gn"),
    (nn.LayerNorm, "ln"),
)


@register_kind("norm")
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
        self.eps = check_eps("eps", eps, in_eval=True)
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
    run = current_dry_run()
    build = partial(_build, cfg, num_features)
    name, norm = build() if run is None else run.once((cfg, num_features), build)
    return f"{name}{postfix}", norm


def _build(cfg: Config, num_features: int) -> tuple[str, nn.Module]:
    """Build a norm, and say what its name begins with."""
    norm_class, arguments = check_norm_cfg(cfg, "norm_cfg", in_eval=True)  # else whoever knows has refused it
    requires_grad = arguments.pop("requires_grad", True)
    if issubclass(norm_class, nn.GroupNorm):
        _check_groups(cfg, arguments, num_features)
        norm: nn.Module = norm_class(num_channels=num_features, **arguments)
    elif current_dry_run() is None or norm_class in _KNOWN:
        norm = construct(norm_class, num_features, **arguments)
    else:
        norm = _try_foreign(norm_class, num_features, arguments)
    for parameter in norm.parameters():
        parameter.requires_grad = requires_grad
    return _abbreviation(norm_class), norm


def check_norm_cfg(cfg: Any, argument: str, *, in_eval: bool = False) -> tuple[type[Any], dict[str, Any]]:
    """Check what can be said of a norm's config before its channels are known.

    Args:
        cfg: As for :func:`build_norm_layer`.
        argument: The argument that it is, for the errors.
        in_eval: Whether batch norms of it stay in eval mode, as under ``norm_eval``; only then their ``eps`` may be 0.

    Returns:
        The norm's class and its arguments, with ``requires_grad``, if that is there.

    Raises:
        TypeError, KeyError, ValueError: If it is no norm's config, or an entry does not fit.
    """
    norm_class, arguments = layer_type(cfg, argument, "norm")
    arguments.setdefault("eps", 1e-5)
    check_flag(f"{argument}['requires_grad']", arguments.get("requires_grad", True))
    entries = [key for key in arguments if key not in ("requires_grad", "eps")]
    check_entries(argument, norm_class, entries, GIVEN_TO_NORMS)
    if issubclass(norm_class, CHECKED_NORMS):
        reads_statistics = issubclass(norm_class, _BatchNorm) and arguments.get("track_running_stats", True) is True
        frozen = issubclass(norm_class, FrozenBatchNorm2d) or (in_eval and reads_statistics)
        arguments = check_norm_entries(argument, arguments, in_eval=frozen)
    if issubclass(norm_class, nn.GroupNorm):
        if "num_groups" not in arguments:
            raise ValueError(f"`{argument}` of type 'GN' needs `num_groups`, such as 32; got {dict(cfg)!r}")
        arguments["num_groups"] = check_int(f"{argument}['num_groups']", arguments["num_groups"], low=1)
    return norm_class, arguments


def _check_groups(cfg: Config, arguments: Config, num_features: int) -> None:
    num_groups = arguments["num_groups"]
    if num_features % num_groups:
        raise ValueError(
            f"`norm_cfg` asks for {num_groups} groups, which do not divide the {num_features} channels of a layer; "
            f"choose a common divisor of all widths, got {dict(cfg)!r}"
        )


def _try_foreign(norm_class: Any, num_features: int, arguments: Config) -> nn.Module:
    """Make a norm that was written for whatever, in a dry run, and see that it takes feature maps."""
    if not is_tried(norm_class):
        return nn.Identity()
    what = f"`norm_cfg` of type {norm_class.__name__}"
    norm = make_foreign(partial(norm_class, num_features), arguments, what)
    if norm is None:
        return nn.Identity()
    shape = (2, num_features, 5, num_features + 7)  # no side is as long as there are channels
    check_layer_runs(norm.eval(), shape, shape, what)
    return norm


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
