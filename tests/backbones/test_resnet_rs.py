"""ResNet-RS and the stems of ResNet-T and -S: structure, options, what is refused. test_timm.py compares numbers."""

import pytest
import torch
from torch import nn

from resbackbone import ResNetRS, ResNetT, build_backbone

# Blocks per stage, from the paper's appendix.
BLOCKS = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    270: (4, 29, 53, 4),
    350: (4, 36, 72, 4),
    420: (4, 44, 87, 4),
}


@pytest.mark.parametrize("depth", BLOCKS)
def test_the_depths_are_the_papers(depth):
    with torch.device("meta"):
        net = ResNetRS(depth, base_channels=8)
    assert tuple(len(getattr(net, name)) for name in net.res_layers) == BLOCKS[depth]


def test_a_convolution_strides_in_place_of_the_pooling():
    net = ResNetRS(50).eval()
    assert [type(layer) for layer in net.maxpool.children()] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert net.maxpool[0].weight.shape == (64, 64, 3, 3)
    assert net.out_strides == (4, 8, 16, 32)
    assert [type(net.layer2[0].downsample[index]) for index in (0, 1)] == [nn.AvgPool2d, nn.Conv2d]
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 65, 97))[0].shape[2:] == (17, 25)


def test_every_block_squeezes_to_a_quarter_before_the_users_plugins():
    plugins = [{"cfg": {"type": "ECALayer"}, "position": "after_conv3", "stages": (False, False, False, True)}]
    net = ResNetRS(50, plugins=plugins)
    assert [block.se_layer.conv1.conv.out_channels for block in (net.layer1[0], net.layer4[-1])] == [64, 512]
    assert net.layer4[0].after_conv3_plugin_names == ["se_layer", "eca_layer"]
    assert ResNetRS(50, se_ratio=16).layer1[0].se_layer.conv1.conv.out_channels == 16


def test_the_stems_convolution_is_frozen_with_the_stem(images):
    net = ResNetRS(50, base_channels=8, norm_eval=False, frozen_stages=0).train()
    assert not any(module.training for module in net.maxpool.modules())
    assert not any(parameter.requires_grad for parameter in net.maxpool.parameters())
    sum(out.mean() for out in net(images)).backward()
    assert net.layer1[0].conv1.weight.grad is not None


def test_the_deep_ones_drop_paths():
    assert [block.drop_path is None for block in build_backbone("resnetrs50", base_channels=8).layer4] == [True] * 3
    net = build_backbone("resnetrs200", base_channels=8)
    assert net.layer1[0].drop_path is None
    assert net.layer4[-1].drop_path.drop_prob == torch.tensor(0.1).item()  # in single precision, as upstream


def test_unknown_depths_and_ratios_are_refused():
    with pytest.raises(KeyError, match="`depth` of ResNetRS must be one of 50, 101, 152, 200, 270, 350, 420; got 18"):
        ResNetRS(18)
    with pytest.raises(TypeError, match=r"`se_ratio` must be an integer, got 0\.25"):
        ResNetRS(50, se_ratio=0.25)


# T and S


@pytest.mark.parametrize(
    ("config", "widths", "blocks"),
    [
        ("resnet10t", [24, 32, 64], (1, 1, 1, 1)),
        ("resnet14t", [24, 32, 64], (1, 1, 1, 1)),
        ("resnet26t", [24, 32, 64], (2, 2, 2, 2)),
        ("resnet50t", [24, 32, 64], (3, 4, 6, 3)),
        ("resnet50s", [64, 64, 128], (3, 4, 6, 3)),
    ],
)
def test_the_stem_widens_in_steps(config, widths, blocks):
    net = build_backbone(config)
    assert [layer.out_channels for layer in net.stem if isinstance(layer, nn.Conv2d)] == widths
    assert net.stage_blocks == blocks
    assert net.avg_down is config.endswith("t")
    assert net.layer1[0].conv1.in_channels == widths[-1]


def test_the_tiers_follow_the_stems_width():
    assert [ResNetT(18, stem_channels=channels).stem[0].out_channels for channels in (8, 20, 128)] == [3, 6, 48]
    assert not hasattr(ResNetT(18, deep_stem=False), "stem")


def test_a_stem_too_narrow_for_tiers_is_refused_before_anything_is_built(built_convs):
    with pytest.raises(ValueError, match="`stem_channels` must be at least 8, got 7"):
        ResNetT(18, base_channels=7)
    assert not built_convs
