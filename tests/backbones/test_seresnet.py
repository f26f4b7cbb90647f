"""SE-ResNet, SE-ResNeXt and the SELayer alone: where it sits, what it computes, how wide it is."""

import pytest
import torch
from cases import blocks
from torch import nn

from resbackbone import Res2Net, ResNeSt, ResNet, ResNeXt, SEResNet, SEResNeXt, build_backbone
from resbackbone.layers import DropPath, SELayer

TINY = {"base_channels": 8, "norm_eval": False}
CLASSES = [(SEResNet, 18), (SEResNet, 50), (SEResNeXt, 50)]


def test_the_layer_is_the_papers():
    layer = SELayer(32, ratio=2)
    x = torch.randn(2, 32, 5, 7)
    first, second = layer.conv1.conv, layer.conv2.conv
    squeezed = (x.mean((2, 3)) @ first.weight[:, :, 0, 0].T + first.bias).relu()
    gates = (squeezed @ second.weight[:, :, 0, 0].T + second.bias).sigmoid()
    torch.testing.assert_close(layer(x), x * gates[:, :, None, None])
    assert list(layer.state_dict()) == ["conv1.conv.weight", "conv1.conv.bias", "conv2.conv.weight", "conv2.conv.bias"]


@pytest.mark.parametrize(
    ("channels", "options", "squeezed"),
    [
        (256, {}, 16),
        (256, {"ratio": 4}, 64),
        (64, {}, 8),  # 4 would be no multiple of 8
        (192, {}, 16),  # 12, rounded up
        (176, {}, 16),  # 11: 8 would be less than nine tenths of it
        (176, {"divisor": 1}, 11),
        (64, {"squeeze_channels": 5}, 5),
        (8, {"ratio": 16}, 8),
    ],
)
def test_squeezed_channels(channels, options, squeezed):
    assert SELayer(channels, **options).conv1.conv.out_channels == squeezed


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"ratio": 0}, ValueError, "`ratio` must be at least 1, got 0"),
        ({"ratio": 0.25}, TypeError, "`ratio` must be an integer, got 0.25 of type float"),
        ({"divisor": 0}, ValueError, "`divisor` must be at least 1, got 0"),
        ({"squeeze_channels": 0}, ValueError, "`squeeze_channels` must be at least 1, got 0"),
    ],
)
def test_the_layer_refuses_wrong_arguments(options, error, text):
    with pytest.raises(error, match=text):
        SELayer(64, **options)


@pytest.mark.parametrize(("net_class", "depth"), CLASSES)
def test_it_runs_behind_the_last_norm_and_before_the_sum(randomize_norms, net_class, depth):
    block = randomize_norms(net_class(depth, **TINY)).layer1[1].eval()
    last_norm = block.norm2 if depth == 18 else block.norm3
    seen = {}
    last_norm.register_forward_hook(lambda _, args, out: seen.update(norm=out.clone()))
    block.se_layer.register_forward_hook(lambda _, args, out: seen.update(into=args[0].clone(), out=out.clone()))
    x = torch.randn(2, block.inplanes, 6, 6)
    out = block(x)
    assert torch.equal(seen["into"], seen["norm"])
    assert torch.equal(out, (seen["out"] + x).relu())


@pytest.mark.parametrize(("net_class", "depth"), CLASSES)
def test_defect_10_the_ratio_takes_effect(net_class, depth):
    """In mmpretrain, seresnext.py:150 does not pass ``se_ratio`` on. Here, every block uses it."""
    channels = [block.se_layer.conv1.conv for block in blocks(net_class(depth, se_ratio=2, base_channels=32))]
    assert channels[0].in_channels == (32 if depth == 18 else 128)
    assert all(conv.out_channels == conv.in_channels // 2 for conv in channels)


@pytest.mark.parametrize(("net_class", "depth"), CLASSES)
def test_defect_10_drop_path_leaves_branches_out(randomize_norms, net_class, depth):
    """In mmpretrain, seresnet.py ignores ``drop_path_rate``. Here, half of the paths are dropped at rate 0.5."""
    block = randomize_norms(net_class(depth, drop_path_rate=0.5, **TINY)).layer4[-1].train()
    assert isinstance(block.drop_path, DropPath)
    assert block.drop_path.drop_prob == 0.5
    out = block(x := torch.randn(64, 64 if depth == 18 else 256, 2, 2))
    dropped = [torch.equal(sample, kept.relu()) for sample, kept in zip(out, x, strict=True)]
    assert 10 < sum(dropped) < 54


@pytest.mark.parametrize("init_cfg", [None, {"type": "Kaiming", "layer": "Conv2d"}])
@pytest.mark.parametrize(("net_class", "depth"), CLASSES)
def test_blocks_start_as_the_identity(net_class, depth, init_cfg):
    backbone = build_backbone({"type": net_class.__name__, "depth": depth, "init_cfg": init_cfg, **TINY})
    block = backbone.layer1[1]
    x = torch.randn(2, block.inplanes, 4, 4)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize(("net_class", "depth"), CLASSES)
def test_plugins_of_the_user_run_behind_it(net_class, depth):
    position = "after_conv2" if depth == 18 else "after_conv3"
    plugins = [
        {
            "cfg": {"type": "SELayer", "ratio": 4, "postfix": "_2"},
            "position": position,
            "stages": (False, True, True, True),
        }
    ]
    backbone = net_class(depth, plugins=plugins, **TINY)
    for stage, name in enumerate(backbone.res_layers):
        for block in getattr(backbone, name):
            assert getattr(block, f"{position}_plugin_names") == ["se_layer", "se_layer_2"][: 1 + bool(stage)]
    assert backbone.plugins == plugins
    assert [out.shape[-1] for out in backbone(torch.randn(2, 3, 32, 32))] == [8, 4, 2, 1]


def test_a_second_layer_of_the_same_name_is_refused():
    plugins = [{"cfg": {"type": "SELayer"}, "position": "after_conv3"}]
    with pytest.raises(ValueError, match="duplicate plugin 'se_layer' in one block; give each its own `postfix`"):
        SEResNet(50, plugins=plugins, **TINY)


@pytest.mark.parametrize(
    ("net_class", "options", "widths"),
    [
        (ResNet, {"depth": 18}, (8, 8)),
        (ResNet, {"depth": 50}, (8, 8, 32)),
        (ResNeXt, {"depth": 50, "groups": 4, "base_width": 3}, (12, 12, 32)),
        (Res2Net, {"depth": 50, "base_width": 3}, (12, 12, 32)),
        (ResNeSt, {"depth": 14}, (8, 8, 32)),
        (SEResNeXt, {"depth": 50, "groups": 4, "base_width": 3}, (12, 12, 32)),
    ],
)
def test_it_is_a_plugin_of_every_block(randomize_norms, net_class, options, widths):
    for index, width in enumerate(widths, start=1):
        plugin = {"cfg": {"type": "SELayer", "postfix": "_mine"}, "position": f"after_conv{index}"}
        backbone = randomize_norms(net_class(plugins=[plugin], **options, **TINY))
        assert [block.se_layer_mine.conv1.conv.in_channels for block in backbone.layer1] == [width] * len(
            backbone.layer1
        )
        backbone(torch.randn(2, 3, 32, 32))[-1].sum().backward()
        assert all(block.se_layer_mine.conv2.conv.weight.grad.any() for block in blocks(backbone))


def test_seresnext_is_grouped():
    block = SEResNeXt(50).layer1[0]
    assert (block.conv2.groups, block.conv2.out_channels) == (32, 128)
    assert (SEResNeXt(50, groups=4, base_width=8).layer1[0].conv2.groups) == 4
    assert isinstance(SEResNeXt(50, deep_stem=True, **TINY).stem, nn.Sequential)


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"type": "SEResNet", "se_ratio": 0}, ValueError, "`se_ratio` must be at least 1, got 0"),
        ({"type": "SEResNet", "se_ratio": 0.25}, TypeError, "`se_ratio` must be an integer, got 0.25"),
        (
            {"type": "SEResNet", "depth": 20},
            KeyError,
            "`depth` of SEResNet must be one of 18, 26, 34, 50, 101, 152, 200, 269; got 20",
        ),
        ({"type": "SEResNeXt", "depth": 18}, KeyError, "`depth` of SEResNeXt must be one of 26, 50, 101, 152; got 18"),
        ({"type": "SEResNeXt", "groups": 0}, ValueError, "`groups` must be at least 1, got 0"),
        ({"type": "SEResNet", "plugins": 5}, TypeError, "`plugins` must be a list or tuple, got 5"),
        ({"type": "SEResNeXt", "ratio": 8}, TypeError, "SEResNeXt has no argument 'ratio'; did you mean 'se_ratio'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_built(refused, config, error, text):
    with refused(error, text):
        build_backbone({"depth": 50, **config})
