"""The base class of backbones: feature info, freezing, norms in eval mode, input validation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from resbackbone.backbones.feature_info import FeatureInfo, OutIndex
from resbackbone.backbones.norm_eval import NormEvalModule
from resbackbone.layers.arguments import parameters_of
from resbackbone.layers.module import InitConfig
from resbackbone.layers.tracing import is_tracing
from resbackbone.registry import is_ours, register_kind
from resbackbone.utils.logs import log_info, log_pending
from resbackbone.utils.validation import check_int


@register_kind("backbone")
class Backbone(NormEvalModule):
    """The base class of backbones.

    A subclass sets ``in_channels``, ``out_indices``, ``frozen_stages`` and ``norm_eval``, registers its stem with
    :meth:`set_stem` and each stage with :meth:`add_stage`, implements :meth:`frozen_modules`, and calls
    :meth:`check_input` on the images in its ``forward``.

    Args:
        init_cfg: As for :class:`~resbackbone.backbones.pretrained.PretrainedModule`.
    """

    out_indices: tuple[OutIndex, ...]
    frozen_stages: int

    def __init__(self, init_cfg: InitConfig | None = None) -> None:
        super().__init__(init_cfg)
        self.res_layers: list[str] = []
        self._stem_info: FeatureInfo | None = None
        self._stages: list[FeatureInfo] = []
        self._frozen_parameters: set[str] = set()  # names of those frozen by `frozen_stages` alone
        self._idle: set[str] = set()  # and of those frozen because no output needs them
        log_pending()

    @property
    def in_channels(self) -> int:
        """Channels of the images: those of the first convolution, also after it or its weight was replaced."""
        conv = self._first_convolution()
        return self._in_channels if conv is None else input_channels(conv)

    @in_channels.setter
    def in_channels(self, channels: int) -> None:
        self._in_channels = channels

    def first_layer(self) -> nn.Module | None:
        """Return the first layer, or sequence of layers, of the forward pass; None if it is unknown."""
        return None

    def _first_convolution(self) -> nn.Conv2d | None:
        """The first layer of the forward pass, if it is a convolution."""
        layer = self.first_layer()
        while isinstance(layer, nn.Sequential) and len(layer):
            layer = layer[0]
        return layer if isinstance(layer, nn.Conv2d) and layer.in_channels else None  # a lazy one has none yet

    @property
    def has_stock_forward(self) -> bool:
        """Whether ``forward`` is this library's, and not that of a subclass elsewhere; a wrapper does not count."""
        return is_ours(type(self).forward)

    @property
    def required_channels(self) -> int | None:
        """Channels that images must have; None if ``forward`` or the first layer may accept any."""
        conv = self._first_convolution() if self.has_stock_forward else None
        return None if conv is None else input_channels(conv)

    def check_input(self, images: Any) -> None:
        """Check that the first convolution accepts the images; pass if the first layer is another one.

        It is called in ``forward``, so that a subclass with its own ``forward`` decides for itself.

        Raises:
            TypeError, ValueError: As :func:`check_images`.
        """
        conv = self._first_convolution()
        if conv is not None and not isinstance(images, torch.fx.Proxy) and not is_tracing():
            check_images(images, type(self).__name__, input_channels(conv))

    def set_stem(self, *, channels: int, stride: int) -> None:
        """Register the stem's feature map, before its pooling, which is ``"stem"`` in ``out_indices``.

        Args:
            channels: Its number of channels.
            stride: Input pixels per feature pixel.
        """
        self._stem_info = FeatureInfo("stem", -1, channels, stride)

    def add_stage(self, stage: nn.Module, *, channels: int, stride: int) -> None:
        """Add the next stage as ``layer1``, ``layer2``, ...

        Args:
            stage: The module.
            channels: Channels of its output.
            stride: Input pixels per feature pixel at its output.
        """
        index = len(self._stages)
        name = f"layer{index + 1}"
        self.add_module(name, stage)
        self.res_layers.append(name)
        self._stages.append(FeatureInfo(name, index, channels, stride))

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """The name, stage, channels and stride of each output, in output order."""
        levels = self._levels()
        return tuple(levels[index] for index in self.out_indices)

    def _levels(self) -> dict[OutIndex, FeatureInfo]:
        """Describe every possible output, by its entry in ``out_indices``."""
        levels: dict[OutIndex, FeatureInfo] = dict(enumerate(self._stages))
        return levels if self._stem_info is None else {**levels, "stem": self._stem_info}

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each output, in output order."""
        return tuple(info.channels for info in self.feature_info)

    @property
    def out_strides(self) -> tuple[int, ...]:
        """Input pixels per feature pixel of each output, in output order."""
        return tuple(info.stride for info in self.feature_info)

    def frozen_modules(self) -> Iterable[nn.Module]:
        """Yield the modules that ``frozen_stages`` freezes."""
        raise NotImplementedError(f"{type(self).__name__} must implement `frozen_modules`")

    def idle_modules(self) -> list[nn.Module]:
        """Return the modules that ``forward`` does not run, since no output needs them."""
        return []

    def complete(self) -> None:
        """Finish construction: put norms into eval mode, and freeze what no output needs."""
        super().complete()
        if self._freeze_idle_modules():
            log_info(
                f"{type(self).__name__} ends at the last of `out_indices` {self.out_indices}: what comes after it is "
                f"neither run nor trained{self._how_to_leave_out()}"
            )

    def first_stages(self, num_stages: int) -> dict[str, Any]:
        """Return the arguments to change to build only the first stages.

        Args:
            num_stages: Number of stages, at least 1.

        Returns:
            The arguments by name; empty if the class has a fixed number of stages.
        """
        return {}

    def _how_to_leave_out(self) -> str:
        """Return the end of a log line about stages that no output needs: the arguments that leave them out, if any."""
        num_stages = max((index for index in self.out_indices if index != "stem"), default=0) + 1
        arguments = self.first_stages(num_stages) if num_stages < len(self.res_layers) else {}
        own_class: Any = type(self)
        names, takes_more = parameters_of(own_class)
        if not arguments or (not takes_more and not arguments.keys() <= names.keys()):
            return ""
        written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        but = ", but for one stage, the least" if self.out_indices == ("stem",) else ""
        return f"; `{written}` leaves it out{but}"

    def _idle_parameters(self) -> set[int]:
        """The ids of parameters that no output needs; none if a subclass's ``forward`` may use them."""
        modules = self.idle_modules() if self.has_stock_forward else []
        return {id(parameter) for module in modules for parameter in module.parameters()}

    def _freeze_idle_modules(self) -> bool:
        """Freeze modules that no output needs; ``DistributedDataParallel`` would wait for their gradients forever.

        Returns:
            Whether there are any.
        """
        idle = self._idle_parameters()
        for name, parameter in self.named_parameters() if idle else ():
            if id(parameter) in idle and parameter.requires_grad:
                parameter.requires_grad = False
                self._idle.add(name)
        return bool(idle)

    def _unfreeze_needed_modules(self) -> None:
        """Unfreeze modules that changed ``out_indices`` need now."""
        idle = self._idle_parameters()
        for name, parameter in self.named_parameters():
            if name in self._idle and id(parameter) not in idle:
                parameter.requires_grad = True
                self._idle.discard(name)

    def freeze(self, frozen_stages: int) -> None:
        """Change ``frozen_stages``, and unfreeze what is no longer among them.

        The optimizer must have the parameters that are unfrozen. Inside of ``DistributedDataParallel``, call
        :func:`resbackbone.training.freeze` instead.

        Args:
            frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages.

        Raises:
            TypeError, ValueError: If it is not an integer from -1 to the number of stages.
        """
        check_int("frozen_stages", frozen_stages, low=-1, high=len(self.res_layers))
        for name, parameter in self.named_parameters():
            if name in self._frozen_parameters:
                parameter.requires_grad = True
        self._frozen_parameters.clear()
        self.frozen_stages = frozen_stages
        self._freeze_idle_modules()
        self.train(self.training)

    def _freeze_stages(self) -> None:
        frozen: set[int] = set()
        for module in self.frozen_modules():
            module.eval()
            frozen.update(map(id, module.parameters()))
        for name, parameter in self.named_parameters():
            if id(parameter) in frozen and parameter.requires_grad:
                parameter.requires_grad = False
                self._frozen_parameters.add(name)

    def train(self, mode: bool = True) -> Any:
        """Switch to training (or eval) mode; frozen modules, and with ``norm_eval`` all batch norms, stay in eval mode.

        Returns:
            The backbone itself.
        """
        super().train(mode)
        if self._idle:
            self._unfreeze_needed_modules()
        self._freeze_stages()
        return self


def input_channels(conv: nn.Conv2d) -> int:
    """Return the input channels of a convolution, by its weight, which may have been replaced."""
    # Not `conv.weight`: a parametrization would compute it, and a spectral norm would change with each access.
    weight = conv._parameters.get("weight")
    if weight is not None and weight.dim() == 4:  # not sharded
        return weight.shape[1] * conv.groups
    stored = [conv._parameters.get("weight_orig")]  # of pruned convolutions
    if is_parametrized(conv, "weight"):
        stored = list(conv.parametrizations["weight"]._parameters.values())  # type: ignore[index,union-attr]
    whole = [tensor for tensor in stored if tensor is not None and tuple(tensor.shape[2:]) == conv.kernel_size]
    return max([conv.in_channels, *(tensor.shape[1] * conv.groups for tensor in whole)])


def total_stride(modules: Iterable[nn.Module]) -> int:
    """Return the product of the strides of all layers in ``modules``, which run sequentially."""
    leaves = (leaf for module in modules for leaf in module.modules() if not any(leaf.children()))
    strides = (getattr(leaf, "stride", 1) for leaf in leaves)
    return math.prod(stride[0] if isinstance(stride, tuple) else stride for stride in strides)


def check_images(images: Any, name: str, in_channels: int) -> None:
    """Raise unless the images are a batch of floating-point numbers with the right channels.

    Args:
        images: They should be ``(N, in_channels, H, W)``.
        name: The class of the backbone, for the errors.
        in_channels: The channels that they must have.

    Raises:
        TypeError: If it is no tensor, or not of floating-point numbers.
        ValueError: If its shape is another.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} takes a tensor of images (N, {in_channels}, H, W), got {type(images).__name__}")
    if images.dim() != 4 or images.shape[1] != in_channels:
        raise ValueError(
            f"{name} takes images of shape (N, {in_channels}, H, W), got {tuple(images.shape)}; "
            "add the batch dimension, or build the backbone with the `in_channels` of your images"
        )
    if not images.is_floating_point():
        raise TypeError(f"{name} takes floating-point images, got {images.dtype}; convert and normalize them first")
    if math.prod(images.shape[2:]) == 0:
        raise ValueError(f"{name} takes images of at least 1x1 pixels, got {images.shape[2]}x{images.shape[3]}")
