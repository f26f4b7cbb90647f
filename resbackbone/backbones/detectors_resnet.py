"""DetectoRS: ResNet with switchable atrous convolutions and an input for the features of a recursive pyramid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Unpack

from resbackbone.backbones.feature_info import FeatureInfo
from resbackbone.backbones.options import GroupedResNetOptions
from resbackbone.backbones.resnet import ResNet
from resbackbone.blocks.detectors import DetectorsBottleneck
from resbackbone.layers.activation_checkpointing import recompute_norms
from resbackbone.layers.arguments import MAX_CHANNELS
from resbackbone.layers.conv import check_conv_cfg
from resbackbone.layers.memory_format import restore_format
from resbackbone.layers.module import Config
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_count, check_flag, check_int, check_sequence, convert_arguments


@MODELS.register_module()
class DetectoRS_ResNet(ResNet):
    """ResNet with switchable atrous convolution (SAC) and an input for a recursive feature pyramid (RFP).

    Args:
        depth: 50, 101 or 152.
        sac: Config of the blocks' 3x3s where ``stage_with_sac`` says so, such as ``dict(type="SAC",
            use_deform=True)``.
        stage_with_sac: Which stages have it.
        rfp_inplanes: Channels of the features that :meth:`rfp_forward` feeds back into the first block of every stage
            but the first; None for a backbone without :meth:`rfp_forward`.
        output_img: Return the images themselves before the feature maps, for mmdet's ``RFP`` neck. Then
            ``feature_info`` begins with ``FeatureInfo(name="image", stage=-1, channels=in_channels, stride=1)``, and
            a neck for the feature maps alone has ``in_channels=out_channels[1:]``.
        options: As for :class:`~resbackbone.ResNet`; DetectoRS has ``conv_cfg=dict(type="ConvAWS")``. ``avg_down``
            pools in the shortcuts of strided stages only, as mmdet's DetectoRS does.

    Raises:
        KeyError, TypeError, ValueError: As for :class:`~resbackbone.ResNet`, and if a stage has ``sac`` and ``dcn``.

    Source: Qiao et al., DetectoRS: Detecting Objects with Recursive Feature Pyramid and Switchable Atrous Convolution,
    arXiv:2006.02334; arguments and keys as in mmdet 3.3.0 ``models/backbones/detectors_resnet.py``.

    >>> net = DetectoRS_ResNet(50, base_channels=8, conv_cfg=dict(type="ConvAWS"), output_img=True)
    >>> net.out_channels, net.out_strides
    ((3, 32, 64, 128, 256), (1, 4, 8, 16, 32))
    """

    arch_settings: ClassVar[dict[int, tuple[Any, tuple[int, ...]]]] = {
        depth: (DetectorsBottleneck, ResNet.arch_settings[depth][1]) for depth in (50, 101, 152)
    }

    _sizes: ClassVar[tuple[str, ...]] = ("rfp_inplanes",)

    @convert_arguments
    def __init__(
        self,
        depth: int,
        *,
        sac: Config | None = None,
        stage_with_sac: Sequence[bool] = (False, False, False, False),
        rfp_inplanes: int | None = None,
        output_img: bool = False,
        **options: Unpack[GroupedResNetOptions],
    ) -> None:
        if sac is not None:
            _check_sac(sac, stage_with_sac, options)
        if rfp_inplanes is not None:
            check_count("rfp_inplanes", rfp_inplanes, most=MAX_CHANNELS)
        check_flag("output_img", output_img)
        self.sac = None if sac is None else dict(sac)
        self.stage_with_sac = check_sequence("stage_with_sac", stage_with_sac)
        self.rfp_inplanes = rfp_inplanes
        self.output_img = output_img
        super().__init__(depth, **options)

    def first_stages(self, num_stages: int) -> dict[str, Any]:
        """Return the arguments that build the first stages alone."""
        arguments = super().first_stages(num_stages)
        if arguments and self.sac is not None:
            flags = self.stage_with_sac[:num_stages]
            arguments |= {"stage_with_sac": flags} if any(flags) else {"sac": None}
        return arguments

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """What each output is, in output order; the images, if they are returned, come first."""
        images = (FeatureInfo("image", -1, self.in_channels, 1),) if self.output_img else ()
        return images + super().feature_info

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Make one stage, with ``sac`` in all of its blocks and the input of the RFP in the first."""
        stage = len(self.res_layers)
        if self.sac is not None and self.stage_with_sac[stage]:
            kwargs["sac"] = self.sac
        if self.rfp_inplanes is not None and stage > 0:
            kwargs["first_block"] = {"rfp_inplanes": self.rfp_inplanes}
        kwargs["avg_down"] = kwargs["avg_down"] and kwargs["stride"] > 1  # in mmdet's DetectoRS, not in its ResNet
        return super().make_res_layer(**kwargs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps, behind the images ``(N, in_channels, H, W)`` themselves under ``output_img``."""
        outs = super().forward(x)
        return (x, *outs) if self.output_img else outs

    def rfp_forward(self, x: Tensor, rfp_feats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the feature maps with features fed back, the second pass of a recursive feature pyramid.

        Args:
            x: Images ``(N, in_channels, H, W)``.
            rfp_feats: One ``(N, rfp_inplanes, H/s, W/s)`` per stage, of that stage's stride. The first is not used,
                nor are any behind the last stage's, which a neck with further levels has.

        Returns:
            One ``(N, C, H/s, W/s)`` per entry of ``out_indices``; never the images.

        Raises:
            ValueError: If the backbone was built without ``rfp_inplanes``, or a stage has no entry.
        """
        if self.rfp_inplanes is None:
            raise ValueError("`rfp_forward` needs a backbone that was built with `rfp_inplanes`, got None")
        if len(rfp_feats) < self.num_stages:
            raise ValueError(
                f"`rfp_feats` must have one entry per stage, at least {self.num_stages}, got {len(rfp_feats)}"
            )
        run = self._run_again
        return restore_format(self, run, (x, rfp_feats), {}) if self.folds_norms else run(x, rfp_feats)

    def _run_again(self, x: Tensor, rfp_feats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x, outs = self.forward_stem(x)
        for index, (name, rfp_feat) in enumerate(zip(self._needed_stages(), rfp_feats, strict=False)):
            stage = getattr(self, name)
            run = partial(_run_stage, stage, rfp_feat)
            x = recompute_norms(run, x, [stage]) if self.with_cp == "norms" else run(x)
            if index in self.out_indices:
                outs.append(x)
        return tuple(outs)


@MODELS.register_module()
class DetectoRS_ResNeXt(DetectoRS_ResNet):
    """:class:`DetectoRS_ResNet` by the name that it has in mmdet when it is a ResNeXt, with ``groups=32``.

    Source: mmdet 3.3.0 ``models/backbones/detectors_resnext.py``.

    >>> DetectoRS_ResNeXt(50, groups=32, base_width=4).layer1[0].conv2.groups
    32
    """


def _run_stage(stage: Iterable[Any], rfp_feat: Tensor, x: Tensor) -> Tensor:
    for block in stage:
        x = block.rfp_forward(x, rfp_feat)
    return x


def _check_sac(sac: Config, stage_with_sac: Sequence[bool], others: Mapping[str, Any]) -> None:
    """Raise unless ``sac`` is a convolution's config, and alone in its stages."""
    check_conv_cfg(sac, "sac")
    num_stages = others.get("num_stages", 4)
    check_int("num_stages", num_stages, low=1, high=4)
    why = f"one per stage, `num_stages`={num_stages}"
    check_sequence("stage_with_sac", stage_with_sac, length=num_stages, why=why)
    for index, flag in enumerate(stage_with_sac):
        check_flag(f"stage_with_sac[{index}]", flag)
    if others.get("dcn") is None:
        return
    stage_with_dcn = others.get("stage_with_dcn", ())
    check_sequence("stage_with_dcn", stage_with_dcn)
    both = [
        index
        for index, (sac_flag, dcn_flag) in enumerate(zip(stage_with_sac, stage_with_dcn, strict=False))
        if sac_flag and dcn_flag is True  # the latter is not checked yet
    ]
    if both:
        raise ValueError(
            f"`stage_with_sac` and `stage_with_dcn` must not name the same stage, got both for {both}: each says what "
            "the 3x3s are; SAC itself can be deformable, dict(type='SAC', use_deform=True)"
        )
