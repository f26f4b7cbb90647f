"""The residual block: everything that the blocks share, so that each states only its own convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from resbackbone.layers import DropPath, Module, build_conv_layer, build_norm_layer, build_plugin_layer, plugin_name
from resbackbone.layers.activation_checkpointing import needs_backward, recompute_in_backward
from resbackbone.layers.conv import check_conv_cfg
from resbackbone.layers.conv_norm import conv_norm
from resbackbone.layers.deform_conv import rename_old_offsets
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


class ResidualBlock(Module):
    """``relu(branch(x) + shortcut(x))``, the branch being ``num_convs`` convolutions with norm, ReLU and plugins.

    A subclass sets ``expansion`` and ``num_convs`` and adds its convolutions in :meth:`_build`; where they are not
    ``planes`` wide before the last, it overrides :meth:`channels_after`. The forward pass runs
    ``conv1, norm1, relu, plugins after_conv1, conv2, ...``; the last norm has no ReLU of its own. A subclass with
    something else in the place of one convolution overrides :meth:`step`.

    Args:
        inplanes: Channels that come in.
        planes: The block's width before expansion; ``planes * expansion`` channels go out.
        stride: Step of the block in pixels.
        dilation: Dilation of its spatial convolution, in pixels.
        downsample: The shortcut, where it is not the identity.
        style: Where a bottleneck strides: "pytorch" in the 3x3, "caffe" in the first 1x1.
        with_cp: Recompute the block in the backward pass instead of keeping its activations.
        conv_cfg: Config of every convolution but a deformable one.
        norm_cfg: Config of every norm.
        dcn: Config of the deformable convolution that takes the place of the block's spatial one. Its entry
            ``fallback_on_stride=True`` leaves strided convolutions plain.
        plugins: Dicts of ``cfg`` (the plugin's config) and ``position`` (``"after_conv1"``, ...).
        drop_path_rate: Probability, 0 to 1, of leaving the branch out while training.
        stage_dilation: Dilation of the stage, which ``dilation`` may be half of, where the stage is dilated as in timm
            (``dilation_style``); a basic block's second 3x3 has it. 1 leaves that plain.
        init_cfg: As for :class:`~resbackbone.layers.Module`.

    Raises:
        TypeError, ValueError, KeyError: If an argument does not fit; nothing is built then.

    Source: He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385, figure 5.
    """

    expansion: ClassVar[int]
    num_convs: ClassVar[int]
    is_output = False  # whether the backbone returns what this block computes

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        style: str = "pytorch",
        with_cp: bool = False,
        conv_cfg: Config | None = None,
        norm_cfg: Config = BATCH_NORM,
        dcn: Config | None = None,
        plugins: Sequence[Config] | None = None,
        init_cfg: InitConfig | None = None,
        *,
        drop_path_rate: float = 0.0,
        stage_dilation: int = 1,
    ) -> None:
        super().__init__(init_cfg)
        check_choice("style", style, ("pytorch", "caffe"))
        check_dcn(dcn, conv_cfg)
        check_plugins(plugins, type(self))
        check_plugin_names(plugins)
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
        self._build()
        if dcn is not None:
            self.register_load_state_dict_pre_hook(rename_old_offsets)  # type: ignore[no-untyped-call]
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else None
        self._add_plugins()

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
        norm: nn.Module = getattr(self, getattr(self, f"norm{index}_name"))
        return norm

    def add_conv(self, index: int, in_channels: int, out_channels: int, kernel_size: int, **kwargs: Any) -> None:
        """Add ``conv{index}`` and the norm behind it.

        Args:
            index: Its place in the branch, counted from 1.
            in_channels: As for :meth:`make_conv`.
            out_channels: As for :meth:`make_conv`.
            kernel_size: As for :meth:`make_conv`.
            kwargs: As for :meth:`make_conv`.
        """
        self.add_module(f"conv{index}", self.make_conv(in_channels, out_channels, kernel_size, **kwargs))
        self.add_norm(index, out_channels)

    def make_conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        deformable: bool = False,
        bias: bool = False,
        **kwargs: Any,
    ) -> nn.Module:
        """Make one of the block's convolutions.

        Args:
            in_channels: Channels that come in.
            out_channels: Channels that go out.
            kernel_size: Side of the kernel in pixels.
            stride: Step of the kernel in pixels.
            deformable: Whether it is the spatial one, which ``dcn`` replaces.
            bias: Whether it has a bias.
            kwargs: padding, dilation, groups.

        Returns:
            ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``.
        """
        cfg = self.spatial_conv_cfg(stride) if deformable else self.conv_cfg
        return build_conv_layer(cfg, in_channels, out_channels, kernel_size, stride=stride, bias=bias, **kwargs)

    def add_norm(self, index: int, channels: int) -> None:
        """Add the ``index``-th norm, on ``channels`` channels."""
        norm_name, norm = build_norm_layer(self.norm_cfg_at(index), channels, postfix=index)
        setattr(self, f"norm{index}_name", norm_name)
        self.add_module(norm_name, norm)

    def norm_cfg_at(self, index: int) -> Config:
        """Return the config of the ``index``-th norm."""
        return self.norm_cfg

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
            setattr(self, f"{position}_plugins", cfgs)
            setattr(self, f"{position}_plugin_names", self.make_block_plugins(self.channels_after(index), cfgs))

    def channels_after(self, index: int) -> int:
        """Return the channels behind the ``index``-th convolution, which its plugins work on."""
        return self.planes * self.expansion if index == self.num_convs else self.planes

    def make_block_plugins(self, in_channels: int, plugins: Sequence[Config]) -> list[str]:
        """Build plugins and add them to the block.

        Args:
            in_channels: Channels that they work on.
            plugins: Their configs; an entry ``postfix`` goes into the attribute name.

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
        """Run the named plugins one after the other; the shape stays."""
        for name in plugin_names:
            x = getattr(self, name)(x)
        return x

    def branch(self, x: Tensor) -> Tensor:
        """Map ``(N, inplanes, H, W)`` to ``(N, planes * expansion, H/stride, W/stride)`` without the shortcut."""
        return self._run_steps(self.num_convs, x)

    def _run_steps(self, count: int, x: Tensor) -> Tensor:
        for index in range(1, count + 1):
            x = self.step(index, x)
            x = self.forward_plugin(x, getattr(self, f"after_conv{index}_plugin_names"))
        return x

    def step(self, index: int, x: Tensor) -> Tensor:
        """Run the ``index``-th convolution with its norm and, but for the last, the ReLU; plugins come behind it."""
        x = conv_norm(x, getattr(self, f"conv{index}"), self._norm(index))
        return self.relu(x) if index < self.num_convs else x

    def before_branch(self, x: Tensor) -> Tensor:
        """Compute what the branch and a projecting shortcut get of the block's input: all of it, unless overridden."""
        return x

    def _add_shortcut(self, x: Tensor) -> Tensor:
        entering = self.before_branch(x)
        last = self.num_convs
        if self._ends_plainly():  # so that a folded convolution can add the shortcut
            out = self._run_steps(last - 1, entering)
            shortcut = x if self.downsample is None else self.downsample(entering)
            return conv_norm(out, getattr(self, f"conv{last}"), self._norm(last), shortcut=shortcut)
        out = self.branch(entering)
        if self.drop_path is not None:
            out = self.drop_path(out)
        return self.add(out, x if self.downsample is None else self.downsample(entering))

    def _ends_plainly(self) -> bool:
        """Return whether nothing comes between the last norm and the sum, not even of a subclass."""
        kind = type(self)
        overridden = any(getattr(kind, name) is not getattr(ResidualBlock, name) for name in ("branch", "step", "add"))
        return not (overridden or self.drop_path is not None or getattr(self, f"after_conv{self.num_convs}_plugins"))

    def add(self, out: Tensor, shortcut: Tensor) -> Tensor:
        """Add the shortcut to the branch's output, which is overwritten."""
        out += shortcut
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, inplanes, H, W)`` to ``(N, planes * expansion, H/stride, W/stride)``."""
        x = self.residual(x)
        return self.relu(to_output_format(x) if self.is_output else x)  # type: ignore[no-any-return]

    def residual(self, x: Any) -> Any:
        """Compute branch plus shortcut, before the last ReLU; with ``with_cp`` again in the backward pass."""
        if self.with_cp and needs_backward(x, [self]):
            return recompute_in_backward(self._add_shortcut, x, [self])
        return self._add_shortcut(x)


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
