"""TridentNet: a ResNet with a last stage that runs at several dilations in parallel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from resbackbone.backbones.options import ResNetOptions
from resbackbone.backbones.res_layer import ResLayer
from resbackbone.backbones.resnet import ResNet
from resbackbone.blocks.trident import TridentBottleneck
from resbackbone.layers.arguments import MAX_PARTS, MAX_PIXELS
from resbackbone.registry import MODELS
from resbackbone.utils.validation import check_count, check_int, check_ints, convert_arguments


class TridentLayer(ResLayer):
    """A stage that is run once per branch, with the same weights at the branch's dilation.

    Args:
        trident_dilations: Dilation of each branch, in pixels.
        test_branch_idx: The branch that runs in eval mode, counted from 0; -1 for all.
        kwargs: As for :class:`ResLayer`.
    """

    @convert_arguments
    def __init__(self, *, trident_dilations: Sequence[int], test_branch_idx: int, **kwargs: Any) -> None:
        dilation = trident_dilations[test_branch_idx]
        super().__init__(dilation=dilation, trident_dilations=trident_dilations, **kwargs)
        self.num_branch = len(trident_dilations)
        self.test_branch_idx = test_branch_idx

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, inplanes, H, W)`` to ``(N * branches, planes * 4, H/stride, W/stride)``, branch by branch."""
        if not self.training and self.test_branch_idx >= 0:
            return super().forward(x)  # type: ignore[no-any-return]
        branches = [x] * self.num_branch
        for block in self:
            branches = block(branches)
        return torch.cat(branches)


_DEFAULTS: ResNetOptions = {"num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (2,)}


@MODELS.register_module()
class TridentResNet(ResNet):
    """ResNet of three stages, the third of them with ``num_branch`` branches of one weight and several dilations.

    In training mode the last feature map has ``num_branch`` times as many samples as there are images: first all images
    by the first branch, then all by the second, and so on. In eval mode it is the branch ``test_branch_idx`` alone.

    Args:
        depth: 50, 101 or 152.
        num_branch: Number of branches.
        test_branch_idx: The branch that runs in eval mode, counted from 0; -1 for all, as in training mode.
        trident_dilations: Dilation of each branch, in pixels.
        options: As for :class:`~resbackbone.ResNet`; unless given, ``strides`` is (1, 2, 2) and ``out_indices`` (2,).
            ``num_stages`` is 3, and the last of ``dilations`` 1, because ``trident_dilations`` are those of the last
            stage, in which ``conv_cfg`` does not apply to the 3x3s and ``avg_down`` has no effect, as in mmdet.
            ``frozen_stages`` is at most 2, because what is frozen is in eval mode; ``dcn`` is for the first two stages;
            there is no ``multi_grid``.

    Raises:
        KeyError, TypeError, ValueError: As for :class:`~resbackbone.ResNet`.

    Source: Li et al., Scale-Aware Trident Networks for Object Detection, arXiv:1901.01892, section 4; arguments and
    keys as in mmdet 3.3.0 ``models/backbones/trident_resnet.py``.

    >>> net = TridentResNet(50, base_channels=8)
    >>> images = torch.zeros(2, 3, 64, 64)
    >>> tuple(net.train()(images)[0].shape), tuple(net.eval()(images)[0].shape)
    ((6, 128, 4, 4), (2, 128, 4, 4))
    """

    arch_settings: ClassVar[dict[int, tuple[Any, tuple[int, ...]]]] = {
        depth: ResNet.arch_settings[depth] for depth in (50, 101, 152)
    }

    @convert_arguments
    def __init__(
        self,
        depth: int,
        *,
        num_branch: int = 3,
        test_branch_idx: int = 1,
        trident_dilations: Sequence[int] = (1, 2, 3),
        **options: Unpack[ResNetOptions],
    ) -> None:
        check_count("num_branch", num_branch, most=MAX_PARTS)
        check_int("test_branch_idx", test_branch_idx, low=-1, high=num_branch - 1)
        why = f"one per branch, `num_branch`={num_branch}"
        self.trident_dilations = check_ints(
            "trident_dilations", trident_dilations, low=1, most=MAX_PIXELS, length=num_branch, why=why
        )
        options = {**_DEFAULTS, **options}
        num_stages, dilations = options["num_stages"], options["dilations"]
        check_int("num_stages", num_stages, low=1)
        if num_stages != 3:
            raise ValueError(f"`num_stages` of TridentResNet must be 3, the last with branches, got {num_stages!r}")
        if tuple(check_ints("dilations", dilations, low=1, length=3, why="one per stage"))[-1] != 1:
            raise ValueError(
                f"`dilations` must end with 1, because `trident_dilations` (={self.trident_dilations}) are those of "
                f"the last stage, got {tuple(dilations)}"
            )
        _check_last_stage(options)
        self.num_branch = num_branch
        self.test_branch_idx = test_branch_idx
        super().__init__(depth, **options)

    def freeze(self, frozen_stages: int) -> None:
        """Change ``frozen_stages``, which is at most 2."""
        _check_frozen_stages(frozen_stages)
        super().freeze(frozen_stages)

    def first_stages(self, num_stages: int) -> dict[str, Any]:
        """Return nothing: the number of stages is fixed."""
        return {}

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Make one stage, the last with branches."""
        if len(self.res_layers) < self.num_stages - 1:
            return super().make_res_layer(**kwargs)
        del kwargs["dilation"]
        kwargs.update(block=TridentBottleneck, avg_down=False, contract_dilation=False)
        return TridentLayer(trident_dilations=self.trident_dilations, test_branch_idx=self.test_branch_idx, **kwargs)


def _check_last_stage(others: Mapping[str, Any]) -> None:
    """Raise if an argument of ResNet is not possible in the last stage, which has branches."""
    _check_frozen_stages(others.get("frozen_stages"))
    flags = others.get("stage_with_dcn", ())
    if others.get("dcn") is not None and isinstance(flags, (list, tuple)) and len(flags) == 3 and flags[2] is True:
        raise ValueError(
            f"`stage_with_dcn` of TridentResNet must end with False, got {tuple(flags)}: the 3x3s of the last stage "
            "are trident convolutions"
        )
    if others.get("multi_grid") is not None:
        raise ValueError(
            f"`multi_grid` must be None in TridentResNet, got {others['multi_grid']!r}: `trident_dilations` are the "
            "dilations of its last stage"
        )


def _check_frozen_stages(frozen_stages: Any) -> None:
    if isinstance(frozen_stages, int) and frozen_stages == 3:
        raise ValueError(
            "`frozen_stages` of TridentResNet must be at most 2, got 3: a frozen stage is in eval mode, in which the "
            "last one has not all of its branches; freeze the parameters alone with `requires_grad_(False)`"
        )
