"""The base class of residual blocks: their arguments, and how their layers are built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypedDict

from torch import Tensor, nn

from resbackbone.layers import DropPath, Module, build_conv_layer, build_norm_layer, build_plugin_layer, plugin_name
from resbackbone.layers.blur_pool import AntiAliasing, make_downsampling
from resbackbone.layers.conv import check_conv_cfg
from resbackbone.layers.deform_conv import rename_old_offsets
from resbackbone.layers.ibn import IBN, make_instance_norm
from resbackbone.layers.memory_format import to_output_format
from resbackbone.layers.module import Config, InitConfig
from resbackbone.layers.plugins import check_plugin_cfg
from resbackbone.utils.validation import (
    UnknownKeyError,
    check_choice,
    check_flag,
    check_mapping,
    check_sequence,
    check_type,
)

BATCH_NORM: Config = {"type": "BN"}  # the norm where a config names none; read, never written to
Style = Literal["pytorch", "caffe"]


class BlockOptions(TypedDict, total=False):
    """The arguments of :class:`ResidualBlock` that every subclass accepts by name."""

    stride: int
    dilation: int
    downsample: nn.Module | None
    style: Style
    with_cp: bool
    conv_cfg: Config | None
    norm_cfg: Config
    dcn: Config | None
    plugins: Sequence[Config] | None
    init_cfg: InitConfig | None
    drop_path_rate: float
    stage_dilation: int
    anti_aliasing: AntiAliasing | None
    ibn: Literal["a", "b"] | None


class GroupOptions(BlockOptions, total=False):
    """:class:`BlockOptions`, and the arguments of blocks with a grouped convolution."""

    groups: int
    base_width: int
    base_channels: int


class ResidualBlock(Module):
    """The base class of blocks that compute ``relu(branch(x) + shortcut(x))``.

    A subclass sets ``expansion`` and ``num_convs``, adds its convolutions in :meth:`_build` and has a ``forward``.
    For each convolution there are the attributes ``conv{i}``, ``norm{i}_name`` (None where the layer has norms and
    activations of its own) and ``after_conv{i}_plugin_names``.

    Args:
        inplanes: Input channels.
        planes: The block's width before expansion; it has ``planes * expansion`` output channels.
        stride: Stride of the block.
        dilation: Dilation of its spatial convolution, in pixels.
        downsample: The layers of the shortcut; None for the identity.
        style: The convolution of a bottleneck that has the stride: "pytorch", the 3x3; "caffe", the first 1x1.
        with_cp: Activation checkpointing: recompute the block in the backward pass, and keep only its input.
        conv_cfg: Config of every convolution but a deformable one.
        norm_cfg: Config of every norm.
        dcn: Config of the deformable convolution in place of the block's spatial one. Its entry
            ``fallback_on_stride=True`` leaves strided convolutions plain.
        plugins: Dicts of ``cfg`` (the plugin's config) and ``position`` (``"after_conv1"``, ...).
        init_cfg: As for :class:`~resbackbone.layers.Module`.
        drop_path_rate: Probability, from 0 to below 1, of dropping the branch during training.
        stage_dilation: Dilation of the stage, if it is dilated as in timm (``dilation_style``); the second 3x3 of a
            basic block has it. 1 leaves that undilated.
        anti_aliasing: Do not stride in the spatial convolution, but in a low-pass filter behind its ReLU: "blur" or
            "average"; None for the stride in the convolution. (Zhang, arXiv:1904.11486, equation 8.)
        ibn: "a" for :class:`~resbackbone.layers.IBN` behind the first convolution; "b" for instance norm, called
            ``IN``, between the sum and its ReLU; None for neither. (Pan et al., arXiv:1807.09441, figure 3.)
        width: Channels of the spatial convolution of a bottleneck; None for ``planes``, or what the groups amount to.
        groups: Groups of the spatial convolution of a bottleneck.
        base_width: With groups, channels per group in the first stage; further stages have more, as ``planes`` grow.
        base_channels: ``planes`` of the first stage.

    Raises:
        TypeError, ValueError, KeyError: If an argument does not fit; nothing is built then.

    Source: He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385, figure 5; groups as in Xie et
    al., ResNeXt, arXiv:1611.05431, figure 3c.
    """

    expansion: ClassVar[int]
    num_convs: ClassVar[int]
    unsupported: ClassVar[tuple[str, ...]] = ()  # arguments that a subclass refuses
    conv1: Any
    conv2: Any
    conv3: Any
    relu: Callable[[Tensor], Tensor]
    norm1_name: str | None = None
    norm2_name: str | None = None
    norm3_name: str | None = None
    after_conv1_plugin_names: Sequence[str]
    after_conv2_plugin_names: Sequence[str]
    after_conv3_plugin_names: Sequence[str]

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        style: Style = "pytorch",
        with_cp: bool = False,
        conv_cfg: Config | None = None,
        norm_cfg: Config = BATCH_NORM,
        dcn: Config | None = None,
        plugins: Sequence[Config] | None = None,
        init_cfg: InitConfig | None = None,
        *,
        drop_path_rate: float = 0.0,
        stage_dilation: int = 1,
        anti_aliasing: AntiAliasing | None = None,
        ibn: Literal["a", "b"] | None = None,
        width: int | None = None,
        groups: int = 1,
        base_width: int = 4,
        base_channels: int = 64,
    ) -> None:
        super().__init__(init_cfg)
        check_choice("style", style, ("pytorch", "caffe"))
        for name, value in (("anti_aliasing", anti_aliasing), ("ibn", ibn)):
            if name in self.unsupported and value is not None:
                raise ValueError(f"`{name}` must be None in a {type(self).__name__}, got {value!r}")
        check_dcn(dcn, conv_cfg)
        check_plugins(plugins, type(self))
        check_plugin_names(plugins)
        if width is None:  # with one group, `base_width` has no effect, as upstream
            width = planes if groups == 1 else grouped_width(planes, base_width, base_channels) * groups
        self.inplanes = inplanes
        self.planes = planes
        self.stride = stride
        self.dilation = dilation
        self.stage_dilation = stage_dilation
        self.style = style
        self.with_cp = with_cp
        self.conv_cfg = conv_cfg
        self.norm_cfg = norm_cfg
        self.dcn = dcn
        self.plugins = plugins
        self.anti_aliasing = anti_aliasing
        self.ibn = ibn
        self.width = width
        self.groups = groups
        self._build()
        if dcn is not None:
            self.register_load_state_dict_pre_hook(rename_old_offsets)  # type: ignore[no-untyped-call]
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else None
        self._add_plugins()
        self.IN = make_instance_norm(planes * self.expansion, norm_cfg) if ibn == "b" else None
        self.has_own_add = type(self).add is not ResidualBlock.add

    def _build(self) -> None:
        """Add the convolutions, in order, with :meth:`add_conv`."""
        raise NotImplementedError(f"{type(self).__name__} must add its convolutions in `_build`")

    @property
    def with_dcn(self) -> bool:
        """Whether the block was asked for a deformable convolution."""
        return self.dcn is not None

    @property
    def with_plugins(self) -> bool:
        """Whether the block was asked for plugins."""
        return self.plugins is not None

    @property
    def norm1(self) -> nn.Module:
        """The norm behind the first convolution."""
        return self._norm(1)

    @property
    def norm2(self) -> nn.Module:
        """The norm behind the second convolution."""
        return self._norm(2)

    def _norm(self, index: int) -> nn.Module:
        name = getattr(self, f"norm{index}_name")
        if name is None:
            raise AttributeError(f"{type(self).__name__} has no norm{index}")
        norm: nn.Module = getattr(self, name)
        return norm

    def add_conv(
        self,
        index: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        deformable: bool = False,
    ) -> None:
        """Add ``conv{index}``, the norm behind it and, with ``anti_aliasing``, the filter that has the stride.

        Args:
            index: Its place in the branch, counted from 1.
            in_channels: Input channels.
            out_channels: Output channels.
            kernel_size: Side of the kernel in pixels.
            stride: Stride.
            padding: Zeros added on each side, in pixels.
            dilation: Distance of the kernel's elements, in pixels.
            groups: Groups of channels.
            deformable: Whether it is the spatial convolution, which ``dcn`` replaces.
        """
        filtered = self.anti_aliasing is not None
        conv_stride = 1 if filtered else stride
        cfg = self.spatial_conv_cfg(conv_stride) if deformable else self.conv_cfg
        conv = build_conv_layer(
            cfg,
            *(in_channels, out_channels, kernel_size),
            stride=conv_stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.add_module(f"conv{index}", conv)
        self.add_norm(index, out_channels)
        dilation_grows = kernel_size > 1 and 1 < self.stage_dilation != dilation
        if self.anti_aliasing is not None and (stride > 1 or dilation_grows):
            self.add_module(f"low_pass{index}", make_downsampling(self.anti_aliasing, out_channels, stride))

    def add_norm(self, index: int, channels: int) -> None:
        """Add the ``index``-th norm, on ``channels`` channels."""
        cfg = self.norm_cfg
        if index == 1 and self.ibn == "a":
            cfg = {"type": IBN, "norm_cfg": cfg, "requires_grad": cfg.get("requires_grad", True)}
        norm_name, norm = build_norm_layer(cfg, channels, postfix=index)
        setattr(self, f"norm{index}_name", norm_name)
        self.add_module(norm_name, norm)

    def spatial_conv_cfg(self, stride: int) -> Config | None:
        """Return the spatial convolution's config: ``dcn``, unless it falls back at ``stride``, else ``conv_cfg``."""
        if self.dcn is None:
            return self.conv_cfg
        dcn = dict(self.dcn)
        falls_back = dcn.pop("fallback_on_stride", False) and stride > 1
        return self.conv_cfg if falls_back else dcn

    def _add_plugins(self) -> None:
        for index in range(1, self.num_convs + 1):
            position = f"after_conv{index}"
            cfgs = [plugin["cfg"] for plugin in self.plugins or () if plugin["position"] == position]
            names = self.make_block_plugins(self.channels_after(index), cfgs)
            low_pass = f"low_pass{index}"
            setattr(self, f"{position}_plugins", cfgs)
            setattr(self, f"{position}_plugin_names", [low_pass, *names] if hasattr(self, low_pass) else names)

    def channels_after(self, index: int) -> int:
        """Return the channels behind the ``index``-th convolution, which its plugins work on."""
        return self.planes * self.expansion if index == self.num_convs else self.width

    def make_block_plugins(self, in_channels: int, plugins: Sequence[Config]) -> list[str]:
        """Build plugins and add them to the block.

        Args:
            in_channels: Channels of the feature map that they work on.
            plugins: Their configs; an entry ``postfix`` is appended to the attribute name.

        Returns:
            Their attribute names, in order.
        """
        names = []
        for plugin in plugins:
            cfg = dict(plugin)
            name, layer = build_plugin_layer(cfg, in_channels=in_channels, postfix=cfg.pop("postfix", ""))
            if hasattr(self, name):
                raise ValueError(
                    f"one of `plugins` has the name of a layer of the block, {name!r}; give it a `postfix` in `cfg`"
                )
            self.add_module(name, layer)
            names.append(name)
        return names

    def forward_plugin(self, x: Tensor, plugin_names: Sequence[str]) -> Tensor:
        """Run the named layers one after the other."""
        for name in plugin_names:
            x = getattr(self, name)(x)
        return x

    def finish_branch(self, out: Tensor, plugin_names: Sequence[str]) -> Tensor:
        """Run what comes between the last norm and the sum: the named plugins and drop path."""
        out = self.forward_plugin(out, plugin_names)
        return out if self.drop_path is None else self.drop_path(out)

    def join(self, out: Tensor, shortcut: Tensor) -> Tensor:
        """Add the shortcut to the branch's output, by :meth:`add`, in the memory format of the outputs."""
        out = self.add(out, shortcut)
        return to_output_format(out) if self.is_output and self.folds_norms else out

    def add(self, out: Tensor, shortcut: Tensor) -> Tensor:
        """Add the shortcut to the branch's output, in place; a subclass may combine them in another way."""
        out += shortcut
        return out


def grouped_width(planes: int, base_width: int, base_channels: int) -> int:
    """Return the channels of one group (or split) of a block's 3x3.

    Args:
        planes: The block's width before expansion.
        base_width: Channels per group in the first stage.
        base_channels: ``planes`` of the first stage.

    Raises:
        ValueError: If there would be none.
    """
    width = math.floor(planes * (base_width / base_channels))  # rounds down, as upstream
    width = width or planes * base_width // base_channels  # but not to zero
    if width < 1:
        raise ValueError(
            f"`base_width` (={base_width}) leaves no channels per group where `planes` is {planes}: it is for "
            f"{base_channels} `base_channels`; give more of either"
        )
    return width


def check_dcn(dcn: Config | None, conv_cfg: Config | None) -> None:
    """Raise unless ``dcn`` is None or a dict, and alone: it says the type of a convolution, as ``conv_cfg`` does."""
    if dcn is None:
        return
    check_mapping("dcn", dcn, optional=False)
    check_flag("dcn['fallback_on_stride']", dcn.get("fallback_on_stride", False))
    check_conv_cfg({key: value for key, value in dcn.items() if key != "fallback_on_stride"}, "dcn")
    if conv_cfg is not None:
        raise ValueError(f"`conv_cfg` must be None where there is `dcn`, got {dict(conv_cfg)!r}; drop one of the two")


def check_plugins(plugins: Sequence[Config] | None, block: Any) -> None:
    """Raise unless each plugin has a ``cfg`` with a ``type`` and a ``position`` that the block class has."""
    positions = tuple(f"after_conv{index}" for index in range(1, getattr(block, "num_convs", 3) + 1))
    for index, plugin in enumerate(check_sequence("plugins", () if plugins is None else plugins)):
        name = f"plugins[{index}]"
        check_type(name, plugin, Mapping, "a dict with `cfg`, `position` and optionally `stages`")
        if not {"cfg", "position"} <= set(plugin) <= {"cfg", "position", "stages"}:
            keys = ", ".join(map(repr, plugin)) or "nothing"
            raise UnknownKeyError(f"`{name}` needs `cfg` and `position` and may have `stages`; got {keys}")
        check_choice(f"{name}['position'] in a {block.__name__}", plugin["position"], positions)
        check_plugin_cfg(plugin["cfg"], f"{name}['cfg']")


def check_plugin_names(plugins: Sequence[Config] | None) -> None:
    """Raise ValueError if two plugins of one block would have the same attribute name."""
    names = [plugin_name(plugin["cfg"], plugin["cfg"].get("postfix", "")) for plugin in plugins or ()]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"`plugins` have a duplicate plugin {name!r} in one block; give each its own `postfix` in `cfg`"
            )
