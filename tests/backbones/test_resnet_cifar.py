"""ResNet for small images: the stem keeps the size, all else is a ResNet's."""

import pytest
import torch
from torch import nn

from resbackbone import ResNet, ResNet_CIFAR, build_backbone

TINY = {"base_channels": 8, "norm_eval": False}


@pytest.mark.parametrize("depth", [18, 50])
def test_strides_are_1_2_4_8(depth):
    net = ResNet_CIFAR(depth, **TINY)
    outs = net(torch.randn(2, 3, 32, 32))
    assert [out.shape[-1] for out in outs] == [32, 16, 8, 4]
    assert net.out_strides == (1, 2, 4, 8)
    assert [info.channels for info in net.feature_info] == [out.shape[1] for out in outs]


def test_the_stem_is_one_3x3_with_norm_and_relu(randomize_norms):
    net = randomize_norms(ResNet_CIFAR(18, **TINY)).eval()
    assert (net.conv1.kernel_size, net.conv1.stride, net.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x)[0], net.layer1(net.bn1(net.conv1(x)).relu()))


def test_keys_are_a_resnets():
    small, large = ResNet_CIFAR(18, **TINY).state_dict(), ResNet(18, **TINY).state_dict()
    assert list(small) == list(large)
    assert [key for key in small if small[key].shape != large[key].shape] == ["conv1.weight"]


@pytest.mark.parametrize("norm_cfg", [{"type": "GN", "num_groups": 4}, {"type": "FrozenBN"}])
def test_stem_follows_its_configs(norm_cfg):
    net = ResNet_CIFAR(18, stem_channels=16, in_channels=1, norm_cfg=norm_cfg, frozen_stages=0, **TINY)
    assert net.conv1.weight.shape == (16, 1, 3, 3)
    assert type(net.norm1) is type(net.layer1[0].norm1)
    assert not net.conv1.weight.requires_grad
    assert net.layer1[0].conv1.weight.requires_grad
    assert isinstance(net.maxpool, nn.Identity)


def test_deep_stem_is_refused(built_convs):
    with pytest.raises(ValueError, match=r"`deep_stem` of ResNet_CIFAR must be False, got True.*use ResNetV1c"):
        build_backbone({"type": "ResNet_CIFAR", "depth": 18, "deep_stem": True})
    with pytest.raises(TypeError, match="`deep_stem` must be True or False, got None"):
        build_backbone({"type": "ResNet_CIFAR", "depth": 18, "deep_stem": None})
    assert built_convs == []
