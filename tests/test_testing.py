"""``check_backbone`` accepts a variant that keeps the contract, and names what each broken one breaks."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn

from resbackbone import ResNet, build_backbone
from resbackbone.blocks import BasicBlock
from resbackbone.testing import BackboneContractError, check_backbone


class WrongStride(ResNet):
    @property
    def feature_info(self):
        first, *others = super().feature_info
        return (first._replace(stride=8), *others)


class WrongChannels(ResNet):
    out_channels = (1, 2, 3, 4)


class ListOfMaps(ResNet):
    def forward(self, x):
        return list(super().forward(x))


class NewWidths(ResNet):
    built = 0

    def __init__(self, depth, **kwargs):
        NewWidths.built += 1
        super().__init__(depth, **{**kwargs, "base_channels": 8 * NewWidths.built})


class InPlace(ResNet):
    def forward(self, x):
        return super().forward(x.mul_(2))


class AllOutputs(ResNet):
    def forward(self, x):
        outs = super().forward(x)
        return tuple(out * len(outs) for out in outs)


class DetachingBlock(BasicBlock):
    def forward(self, x):  # type: ignore[override]
        return super().forward(x.detach())


class Detached(ResNet):
    arch_settings: ClassVar = {18: (DetachingBlock, (2, 2, 2, 2))}


class Unused(ResNet):
    def __init__(self, depth, **kwargs):
        super().__init__(depth, **kwargs)
        self.extra = nn.Parameter(torch.zeros(()))


class TimesZero(Unused):
    def forward(self, x):
        return tuple(out + 0 * self.extra for out in super().forward(x))


class TrainingNorms(ResNet):
    def train(self, mode=True):
        nn.Module.train(self, mode)
        self._freeze_stages()
        return self


class Thawing(ResNet):
    def train(self, mode=True):
        super().train(mode)
        return self.requires_grad_(True)


class FrozenButStem(ResNet):
    def frozen_modules(self):
        return [] if self.frozen_stages == 0 else list(super().frozen_modules())


class NoRecomputing(ResNet):
    def make_res_layer(self, **kwargs):
        return super().make_res_layer(**{**kwargs, "with_cp": False})


class CountingBlock(BasicBlock):
    def forward(self, x):  # type: ignore[override]
        self.runs = getattr(self, "runs", 0) + torch.is_grad_enabled()
        return super().forward(x) if self.runs < 2 else super().forward(2 * x)


class Counting(ResNet):
    arch_settings: ClassVar = {18: (CountingBlock, (2, 2, 2, 2))}


class HiddenWeight(ResNet):
    def __init__(self, depth, **kwargs):
        super().__init__(depth, **kwargs)
        self.factor = torch.rand(())

    def forward(self, x):
        return tuple(out * self.factor for out in super().forward(x))


class Unpicklable(ResNet):
    def __init__(self, depth, **kwargs):
        super().__init__(depth, **kwargs)
        self.activation = lambda x: x


class ByMemoryFormat(ResNet):
    def forward(self, x):
        factor = 1 if x.is_contiguous() else 1.01
        return tuple(out * factor for out in super().forward(x))


BROKEN = {
    WrongStride: "`feature_info` says .* for layer1 and images of 64x64, got",
    WrongChannels: "`out_channels` differs from `feature_info`",
    ListOfMaps: "`forward` must return a tuple of feature maps, got list",
    NewWidths: "a dump of the config builds other",
    InPlace: "`forward` modifies the images",
    AllOutputs: r"out_indices=\(0,\): output 0 differs",
    Detached: "no gradient for conv1.weight, bn1.weight",
    Unused: "no gradient for extra",
    TimesZero: "the gradient is zero for extra",
    TrainingNorms: "norm_eval=True: training=True after train",
    Thawing: "with frozen_stages=0 conv1.weight must be frozen after train",
    FrozenButStem: "with frozen_stages=0 `frozen_modules` lacks the stem",
    NoRecomputing: "with_cp=True does not recompute layer1.0",
    Counting: "with_cp=.* changes gradients",
    HiddenWeight: "a copy by state_dict: output 0 differs",
    Unpicklable: "the net cannot be copied or pickled: .*lambda",
    ByMemoryFormat: "channels_last: output 0 differs",
}


def config_of(backbone_class):
    return {"type": backbone_class, "depth": 18, "base_channels": 8}


def test_a_backbone_that_keeps_the_contract_passes():
    state = torch.get_rng_state()
    config = {**config_of(ResNet), "out_indices": (0, 2), "frozen_stages": 1}
    before = copy.deepcopy(config)
    check_backbone(config)
    assert config == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_name_is_checked_as_well():
    check_backbone("resnet18_cifar")


@pytest.mark.parametrize("backbone_class", BROKEN, ids=lambda cls: cls.__name__)
def test_each_breach_is_named(backbone_class):
    with pytest.raises(BackboneContractError, match=BROKEN[backbone_class]):
        check_backbone(config_of(backbone_class))


def test_a_config_that_building_changes_is_named(monkeypatch):
    def build(config, **overrides):
        config["depth"] = 34
        return build_backbone(config, **overrides)

    monkeypatch.setattr("resbackbone.testing.build_backbone", build)
    with pytest.raises(BackboneContractError, match="building changed the config"):
        check_backbone(config_of(ResNet))


def test_gradients_of_zero_must_be_named_exactly():
    check_backbone(config_of(TimesZero), zero_gradients=["extra"])
    with pytest.raises(BackboneContractError, match=r"names layer4\.1\.conv2\.weight: the gradient is not zero"):
        check_backbone(config_of(TimesZero), zero_gradients=["extra", "layer4.1.conv2.weight"])
