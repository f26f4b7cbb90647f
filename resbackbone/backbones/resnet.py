"""ResNet, the base class of all variants."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from resbackbone.backbones.arguments import check_depth, check_resnet_arguments, resolve_out_indices, truncate_arguments
from resbackbone.backbones.base import Backbone, total_stride
from resbackbone.backbones.feature_info import FeatureInfo, OutIndex
from resbackbone.backbones.pretrained import resolve_init_cfg
from resbackbone.backbones.res_layer import DilationStyle, ResLayer
from resbackbone.backbones.shapes import fingerprint, measure_maps, shapes_only
from resbackbone.backbones.stem import make_deep_stem
from resbackbone.blocks import BasicBlock, Bottleneck, ResidualBlock
from resbackbone.blocks.base import Style
from resbackbone.layers import FrozenBatchNorm2d, build_conv_layer, build_norm_layer
from resbackbone.layers.activation_checkpointing import WithCp, recompute_norms
from resbackbone.layers.conv_norm import set_folding
from resbackbone.layers.dry_run import check_memory, dry_run
from resbackbone.layers.module import Config, InitConfig
from resbackbone.registry import MODELS, is_ours, resolve_type
from resbackbone.registry.init_cfg import check_overrides
from resbackbone.utils.validation import convert_arguments

__all__ = ["BasicBlock", "Bottleneck", "ResLayer", "ResNet"]

BATCH_NORM: Config = {"type": "BN", "requires_grad": True}  # read, never written to


@MODELS.register_module()
class ResNet(Backbone):
    """ResNet with the arguments, attributes, state-dict keys and outputs of mmdet's and mmseg's.

    Args:
        depth: A key of ``arch_settings``: 18 or 34 with basic blocks; 26, 50, 101, 152, 200 or 269 with bottlenecks.
        in_channels: Channels of the images.
        stem_channels: Channels after the stem; None for ``base_channels``. Three numbers are the channels after each
            convolution of a deep stem; with one, the first two have half of it.
        base_channels: ``planes`` of the first stage; each further stage doubles them.
        num_stages: Number of stages, 1 to 4.
        strides: Stride of each stage's first block.
        dilations: Dilation of each stage.
        out_indices: The outputs: stages, counted from 0, negative ones from the end; and "stem" for the stem's feature
            map after its last activation, before the pooling. Outputs are in ascending order, the stem's first. Stages
            after the last output are in the state dict, but neither run nor trained.
        style: Which convolution of a bottleneck has the stride: "pytorch", the 3x3; "caffe", the first 1x1.
        deep_stem: Use three 3x3 convolutions instead of the stem's 7x7.
        avg_down: Use average pooling in the shortcuts instead of a strided convolution.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages: no gradients, eval mode.
        conv_cfg: Config of the convolutions.
        norm_cfg: Config of the norms: "BN", "SyncBN", "GN", "IN", "FrozenBN" or any registered norm.
        norm_eval: Keep all batch norms in eval mode from construction on (their affine parameters still train).
        dcn: Config of the deformable convolutions, such as ``dict(type="DCNv2", deform_groups=1)``.
        stage_with_dcn: Which stages have them.
        plugins: Dicts of ``cfg``, ``position`` ("after_conv1", ...) and optionally ``stages``, one bool per stage.
        with_cp: Activation checkpointing: True recomputes every block in the backward pass; "norms" everything except
            convolutions, which saves most of the memory at little cost.
        zero_init_residual: Initialize the last norm of each block with zero, so that the block is the identity.
        pretrained: Deprecated alias of ``init_cfg=dict(type="Pretrained", checkpoint=...)``.
        init_cfg: Initializers of ``init_weights()``; None for Kaiming normal convolutions and norms of one.
        multi_grid: Dilation of each block of the last stage, instead of that stage's dilation.
        contract_dilation: Halve the dilation of each stage's first block.
        dilation_style: What a dilated stage does beside dilating the convolution that would stride: "openmmlab",
            nothing; "timm", as timm with ``output_stride`` (docs/differences.md has the mapping), the second 3x3 of a
            basic block is dilated, too, ``avg_down`` averages 2x2 pixels at stride 1 in the shortcut, and an
            anti-aliased block filters where the dilation grows.
        drop_path_rate: Probability, from 0 to below 1, of dropping the last block's branch during training; that of
            earlier blocks is proportional to their index.
        stage_blocks: Number of blocks of each stage, in place of those of ``depth``, which then selects only the block
            class.
        project_first_block: Give the first block of every stage a projection, a 1x1 convolution and a norm, in its
            shortcut, also where the shapes agree: in the first stage of depth 18 and 34. RT-DETR's and
            PaddleDetection's nets have it.
        fold_frozen_norms: Fold frozen norms into the preceding convolutions also in training, as
            :func:`~resbackbone.training.fold_frozen_norms` does.
        groups: Groups of the 3x3 of bottlenecks: ResNeXt's cardinality. 1 is a plain ResNet.
        base_width: With groups, channels per group in the first stage.

    Raises:
        KeyError: If ``depth`` is not in ``arch_settings``, or a type is not registered.
        TypeError, ValueError: If an argument is invalid; nothing is built.

    Source: He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385; depth 200 as in arXiv:1603.05027,
    26 and 269 as in timm. Arguments as in mmdet 3.3.0 ``models/backbones/resnet.py``, ``multi_grid`` and
    ``contract_dilation`` as in mmseg 1.2.2.

    >>> import torch
    >>> net = ResNet(18, out_indices=(0, -1)).eval()
    >>> [tuple(feature.shape) for feature in net(torch.zeros(2, 3, 64, 64))]
    [(2, 64, 16, 16), (2, 512, 2, 2)]
    """

    # Attributes that determine the number of weights, for the error about memory; a variant adds its own.
    _sizes: ClassVar[tuple[str, ...]] = ("in_channels", "stem_channels", "base_channels", "stage_blocks")
    with_cp: WithCp = False  # for subclasses with a constructor that does not call this one
    _given: Config | None = None  # `stage_blocks` and `out_indices` as passed; None in such subclasses
    _stem_names: Sequence[str] = ("conv1", "bn1", "relu", "stem", "maxpool")  # likewise
    _built: str | None = None
    _measured: tuple[str, dict[OutIndex, FeatureInfo]] | None = None
    arch_settings: ClassVar[dict[int, tuple[Any, tuple[int, ...]]]] = {
        18: (BasicBlock, (2, 2, 2, 2)),
        26: (Bottleneck, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
        152: (Bottleneck, (3, 8, 36, 3)),
        200: (Bottleneck, (3, 24, 36, 3)),
        269: (Bottleneck, (3, 30, 48, 8)),
    }

    @convert_arguments
    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        stem_channels: int | Sequence[int] | None = None,
        base_channels: int = 64,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[OutIndex] = (0, 1, 2, 3),
        style: Style = "pytorch",
        deep_stem: bool = False,
        avg_down: bool = False,
        frozen_stages: int = -1,
        conv_cfg: Config | None = None,
        norm_cfg: Config = BATCH_NORM,
        norm_eval: bool = True,
        dcn: Config | None = None,
        stage_with_dcn: Sequence[bool] = (False, False, False, False),
        plugins: Sequence[Config] | None = None,
        with_cp: WithCp = False,
        zero_init_residual: bool = True,
        pretrained: str | None = None,
        init_cfg: InitConfig | None = None,
        *,
        multi_grid: Sequence[int] | None = None,
        contract_dilation: bool = False,
        dilation_style: DilationStyle = "openmmlab",
        drop_path_rate: float = 0.0,
        stage_blocks: Sequence[int] | None = None,
        project_first_block: bool = False,
        fold_frozen_norms: bool = False,
        groups: int = 1,
        base_width: int = 4,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.block, default_blocks = self.block_and_stages(depth)
        check_resnet_arguments(self.block, default_blocks, **given)
        super().__init__(resolve_init_cfg(pretrained, init_cfg))
        self.depth = depth
        self.in_channels = in_channels
        self.deep_stem_channels = tuple(stem_channels) if isinstance(stem_channels, Sequence) else None
        if isinstance(stem_channels, Sequence):
            stem_channels = stem_channels[-1]
        self.stem_channels: int = base_channels if stem_channels is None else stem_channels
        self.base_channels = base_channels
        self.num_stages = num_stages
        self.strides = tuple(strides)
        self.dilations = tuple(dilations)
        self.out_indices = resolve_out_indices(out_indices, num_stages)
        self.style = style
        self.deep_stem = deep_stem
        self.avg_down = avg_down
        self.frozen_stages = frozen_stages
        self.conv_cfg = copy.deepcopy(conv_cfg)
        self.norm_cfg = copy.deepcopy(norm_cfg)
        self.norm_eval = norm_eval
        self.dcn = copy.deepcopy(dcn)
        self.stage_with_dcn = tuple(stage_with_dcn)
        self.plugins = copy.deepcopy(plugins)
        self.with_cp = with_cp
        self.zero_init_residual = zero_init_residual
        self.multi_grid = None if multi_grid is None else tuple(multi_grid)
        self.contract_dilation = contract_dilation
        self.dilation_style = dilation_style
        self.drop_path_rate = drop_path_rate
        self.project_first_block = project_first_block
        self.stage_blocks = default_blocks[:num_stages] if stage_blocks is None else tuple(stage_blocks)
        self._given = {"stage_blocks": stage_blocks, "out_indices": tuple(out_indices)}
        self.groups = groups
        self.base_width = base_width
        self.inplanes = self.stem_channels

        self._check_layers()
        self._make_stem_layer(in_channels, self.stem_channels)
        self._stem_names = [name for name, _ in self.named_children()]
        self.set_stem(channels=self.inplanes, stride=total_stride(self._before_pool()))
        self._make_stages(stride=total_stride(self._stem()))
        self._freeze_stages()
        if fold_frozen_norms:
            set_folding(self, True)
        self.feat_dim = self.block.expansion * self.stage_planes(num_stages - 1)
        self._built = fingerprint(self._measured_parts())

    def _check_layers(self) -> None:
        """Raise unless every layer can be built, by a dry run; hooks of a subclass in another package run only once."""
        hooks = (self._make_stem_layer, self._make_stages, self.make_res_layer, self.stage_planes, self.block)
        if not all(map(is_ours, hooks)):
            return
        in_memory = torch.get_default_device().type != "meta"
        trial: ResNet = type(self).__new__(type(self))
        vars(trial)["_in_construction"] = True  # it is never completed
        Backbone.__init__(trial)
        trial.__dict__.update({name: value for name, value in vars(self).items() if name not in vars(trial)})
        with dry_run() as run:
            trial._make_stem_layer(self.in_channels, self.stem_channels)
            trial._make_stages(stride=1)
        check_overrides(self.init_cfg, trial)
        if in_memory:
            names = [name for base in reversed(type(self).__mro__) for name in vars(base).get("_sizes", ())]
            check_memory(run.num_weights, {name: getattr(self, name) for name in names})

    def first_stages(self, num_stages: int) -> dict[str, Any]:
        """Return the arguments that build only the first stages; none if a subclass built its stages itself."""
        if self._given is None:
            return {}
        names = ("strides", "dilations", "dcn", "stage_with_dcn", "plugins", "multi_grid", "frozen_stages")
        rates = [stage[-1] for stage in self._drop_path_rates()] if self.drop_path_rate else None
        own = {name: getattr(self, name) for name in names}
        return truncate_arguments({**own, "drop_path_rates": rates, **self._given}, num_stages)

    def block_and_stages(self, depth: int) -> tuple[Any, tuple[int, ...]]:
        """Return the block class and the number of blocks per stage of a depth.

        Raises:
            KeyError: If there is no such depth.
        """
        check_depth(type(self).__name__, depth, self.arch_settings)
        return self.arch_settings[depth]

    def stage_planes(self, index: int) -> int:
        """Return the ``planes`` of a stage, counted from 0: the width of its blocks before expansion."""
        planes: int = self.base_channels * 2**index
        return planes

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        """Add the layers before the first stage: ``conv1``, ``norm1``, ``relu`` or ``stem``; and ``maxpool``."""
        if self.deep_stem:
            self._make_deep_stem(in_channels, stem_channels)
        else:
            self._make_plain_stem(in_channels, stem_channels, kernel_size=7)
        self.maxpool: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def _make_plain_stem(self, in_channels: int, stem_channels: int, kernel_size: int) -> None:
        """Add ``conv1`` with stride 2, ``norm1`` and ``relu``."""
        self.conv1 = build_conv_layer(
            self.conv_cfg, in_channels, stem_channels, kernel_size, stride=2, padding=kernel_size // 2, bias=False
        )
        self.norm1_name, norm1 = build_norm_layer(self.norm_cfg, stem_channels, postfix=1)
        self.add_module(self.norm1_name, norm1)
        self.relu = nn.ReLU(inplace=True)

    def _make_deep_stem(self, in_channels: int, stem_channels: int) -> None:
        """Add ``stem``, three convolutions with their norms and ReLUs."""
        half = stem_channels // 2
        channels = self.deep_stem_channels or (half, half, stem_channels)
        self.stem = make_deep_stem(in_channels, channels, self.conv_cfg, self.norm_cfg)

    def _stem(self) -> list[nn.Module]:
        """The layers that ``_make_stem_layer`` added, or their replacements."""
        return [getattr(self, name) for name in self._stem_names if hasattr(self, name)]

    def _before_pool(self) -> list[nn.Module]:
        """The stem's layers before its pooling, whose output is the map of "stem" in ``out_indices``."""
        return [layer for layer in self._stem() if layer is not getattr(self, "maxpool", None)]

    def _make_stages(self, stride: int) -> None:
        """Add ``layer1``, ... behind a stem of this total stride."""
        rates = self._drop_path_rates()
        for index, num_blocks in enumerate(self.stage_blocks):
            planes = self.stage_planes(index)
            # Only what differs from the default, so that a ResLayer written for mmdet accepts it.
            optional: dict[str, Any] = {}
            if self.multi_grid is not None and index == self.num_stages - 1:
                optional["multi_grid"] = self.multi_grid
            if self.contract_dilation:
                optional["contract_dilation"] = True
            if self.dilation_style != "openmmlab":
                optional["dilation_style"] = self.dilation_style
            if self.drop_path_rate:
                optional["drop_path_rate"] = rates[index]
            if self.project_first_block:
                optional["project_first_block"] = True
            if self.groups != 1:
                optional |= {"groups": self.groups, "base_width": self.base_width, "base_channels": self.base_channels}
            stage = self.make_res_layer(
                block=self.block,
                inplanes=self.inplanes,
                planes=planes,
                num_blocks=num_blocks,
                stride=self.strides[index],
                dilation=self.dilations[index],
                style=self.style,
                avg_down=self.avg_down,
                with_cp=self.with_cp is True,
                conv_cfg=self.conv_cfg,
                norm_cfg=self.norm_cfg,
                dcn=copy.deepcopy(self.dcn) if self.dcn and self.stage_with_dcn[index] else None,
                plugins=None if self.plugins is None else self.make_stage_plugins(self.plugins, index),
                init_cfg=self._block_init_cfg(),
                **optional,
            )
            self.inplanes = planes * self.block.expansion
            stride *= getattr(stage, "stride", self.strides[index])
            self.add_stage(stage, channels=getattr(stage, "out_channels", self.inplanes), stride=stride)
            for last_block in list(stage.children())[-1:]:
                if isinstance(last_block, ResidualBlock):
                    last_block.is_output = index in self.out_indices

    def _drop_path_rates(self) -> list[list[float]]:
        """Return one rate per block, from 0 for the first to ``drop_path_rate`` for the last."""
        # In single precision, as in OpenMMLab and timm, since rounding affects the outputs.
        rates = iter(torch.linspace(0, self.drop_path_rate, sum(self.stage_blocks), device="cpu").tolist())
        return [[next(rates) for _ in range(num_blocks)] for num_blocks in self.stage_blocks]

    def _block_init_cfg(self) -> Config | None:
        """Return the ``init_cfg`` of a block: its last norm starts at zero, unless it cannot be trained."""
        if not self.zero_init_residual or resolve_type(self.norm_cfg["type"], "norm") is FrozenBatchNorm2d:
            return None
        for last_norm in ("norm3", "norm2"):
            if hasattr(self.block, last_norm):
                return {"type": "Constant", "val": 0, "override": {"name": last_norm}}
        return None

    def _levels(self) -> dict[OutIndex, FeatureInfo]:
        """Describe every possible output; if layers were replaced, by their channels and strides now."""
        now = fingerprint(self._measured_parts())
        if self._built in (None, now) or not self.has_stock_forward:
            return self._levels_as_built()
        if self._measured is None or self._measured[0] != now:
            self._measured = now, self._measure_levels() or self._levels_as_built()
        return dict(self._measured[1])

    def _measured_parts(self) -> Iterable[tuple[str, nn.Module]]:
        """Return what :meth:`_measure_levels` runs, by name."""
        yield from ((f"stem{index}", layer) for index, layer in enumerate(self._stem()))
        yield from ((name, getattr(self, name)) for name in self.res_layers)

    def _measure_levels(self) -> dict[OutIndex, FeatureInfo] | None:
        """Describe every possible output by a run on the meta device; None if that fails."""
        try:
            shapes = shapes_only(self)
        except Exception:  # of any kind, from copying a third-party layer
            return None
        pool = getattr(shapes, "maxpool", nn.Identity())
        stages = [getattr(shapes, name) for name in shapes.res_layers]
        measured = measure_maps([partial(shapes.run_stem, pool=False), pool, *stages], shapes, self.in_channels)
        if measured is None:
            return None
        stem, _, *maps = measured
        named = enumerate(zip(self.res_layers, maps, strict=True))
        levels: dict[OutIndex, FeatureInfo] = {"stem": FeatureInfo("stem", -1, *stem)}
        return levels | {index: FeatureInfo(name, index, *shape) for index, (name, shape) in named}

    def _levels_as_built(self) -> dict[OutIndex, FeatureInfo]:
        """Describe every possible output by the stages' attributes ``out_channels`` and ``stride``, or as built."""
        built = super()._levels()
        channels = built["stem"].channels if "stem" in built else getattr(self, "stem_channels", self.inplanes)
        stride = total_stride(self._stem())
        levels: dict[OutIndex, FeatureInfo] = {
            "stem": FeatureInfo("stem", -1, channels, total_stride(self._before_pool()))
        }
        for index, name in enumerate(self.res_layers):
            stage = getattr(self, name)
            if not isinstance(stage, nn.Identity):
                channels = getattr(stage, "out_channels", built[index].channels if index in built else channels)
                stride *= getattr(stage, "stride", self.strides[index] if index in built else 1)
            levels[index] = FeatureInfo(name, index, channels, stride)
        return levels

    def make_stage_plugins(self, plugins: Sequence[Config], stage_idx: int) -> list[Config]:
        """Select the plugins of one stage.

        Args:
            plugins: Dicts of ``cfg``, ``position`` and optionally ``stages``; without ``stages``, for every stage.
            stage_idx: The stage, counted from 0.

        Returns:
            Those of the stage, without ``stages``.
        """
        picked = []
        for plugin in plugins:
            rest = dict(plugin)
            stages = rest.pop("stages", None)
            if stages is None or stages[stage_idx]:
                picked.append(rest)
        return picked

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Make one stage; a variant overrides this to pass arguments of its own to its blocks.

        Args:
            kwargs: As for :class:`~resbackbone.backbones.ResLayer`.

        Returns:
            ``(N, inplanes, H, W)`` to ``(N, planes * expansion, H/stride, W/stride)``.
        """
        return ResLayer(**kwargs)

    @property
    def norm1(self) -> nn.Module:
        """The norm of the plain stem."""
        norm: nn.Module = getattr(self, self.norm1_name)
        return norm

    def frozen_modules(self) -> Iterable[nn.Module]:
        """Yield the stem's layers and the first ``frozen_stages`` stages."""
        if self.frozen_stages >= 0:
            yield from self._stem()
        for name in self.res_layers[: max(self.frozen_stages, 0)]:
            yield getattr(self, name)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps.

        Args:
            x: Images ``(N, in_channels, H, W)``, normalized as the weights expect.

        Returns:
            One ``(N, C, H/s, W/s)`` per entry of ``feature_info``, in its order.
        """
        x, outs = self.forward_stem(x)
        for index, name in enumerate(self._needed_stages()):
            stage = getattr(self, name)
            x = recompute_norms(stage, x, [stage]) if self.with_cp == "norms" else stage(x)
            if index in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def forward_stem(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the stem on images.

        Returns:
            The first stage's input, and the outputs so far: the stem's feature map, or none.
        """
        self.check_input(x)
        recomputes = self.with_cp == "norms"
        if "stem" not in self.out_indices:
            x = recompute_norms(self.run_stem, x, self._stem()) if recomputes else self.run_stem(x)
            return x, []
        before_pool = partial(self.run_stem, pool=False)
        x = recompute_norms(before_pool, x, self._before_pool()) if recomputes else before_pool(x)
        outs = [x]
        if self._needed_stages():
            x = recompute_norms(self.maxpool, x, [self.maxpool]) if recomputes else self.maxpool(x)
        return x, outs

    def run_stem(self, x: Tensor, *, pool: bool = True) -> Tensor:
        """Run the layers before the first stage, with or without the pooling."""
        x = self.stem(x) if self.deep_stem else self.relu(self.conv_norm(x, self.conv1, self.norm1_name))
        return self.maxpool(x) if pool else x

    def _needed_stages(self) -> list[str]:
        """The names of the stages up to the last output; later ones are not run."""
        num_stages = 0
        for index in self.out_indices:
            if index != "stem":
                num_stages = max(num_stages, index + 1)
        return self.res_layers[:num_stages]

    def idle_modules(self) -> list[nn.Module]:
        """Return the stages after the last output, and the pooling if only the stem's feature map is returned."""
        needed = self._needed_stages()
        names = self.res_layers[len(needed) :] if needed else ["maxpool", *self.res_layers]
        return [getattr(self, name) for name in names if hasattr(self, name)]

    def first_layer(self) -> nn.Module | None:
        """Return the stem, or its first convolution."""
        return getattr(self, "stem" if self.deep_stem else "conv1", None)
