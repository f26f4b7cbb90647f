"""ResNeSt: what split attention computes, where it pools, and that every option of a ResNet holds there too."""

import copy

import pytest
import torch
from cases import blocks
from torch import nn

from resbackbone import ResNeSt, build_backbone
from resbackbone.blocks.split import SplitAttentionBottleneck
from resbackbone.layers import DeformConv2d, DropPath, SplitAttentionConv2d

TINY = {"base_channels": 8, "norm_eval": False}
BN = {"type": "BN"}


def net(depth=14, **options):
    return ResNeSt(depth, **{**TINY, **options})


def split_attention(layer, x):
    """The paper's equations, one group and one split at a time: figure 2, equations 1 and 2."""
    images, groups, radix = len(x), layer.groups, layer.radix
    features = layer.bn0(layer.conv(x)).relu()
    width = features.shape[1] // (radix * groups)
    # The splits of one group are as far apart as one split of all groups is wide.
    split = {(k, r): features[:, (r * groups + k) * width :][:, :width] for k in range(groups) for r in range(radix)}
    means = [sum(split[k, r] for r in range(radix)).mean((2, 3), keepdim=True) for k in range(groups)]
    logits = layer.fc2(layer.bn1(layer.fc1(torch.cat(means, 1))).relu()).view(images, groups, radix, width)
    weights = logits.softmax(2) if radix > 1 else logits.sigmoid()
    outs = [sum(weights[:, k, r, :, None, None] * split[k, r] for r in range(radix)) for k in range(groups)]
    return torch.cat(outs, 1)


@pytest.mark.parametrize("radix", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 2])
def test_split_attention_is_the_papers(randomize_norms, radix, groups):
    layer = randomize_norms(
        SplitAttentionConv2d(8, 16, 3, stride=2, padding=1, groups=groups, radix=radix, norm_cfg=BN)
    ).eval()
    nn.init.normal_(layer.fc2.weight)  # weights far from even
    x = torch.randn(2, 8, 9, 7)
    out = layer(x)
    assert out.shape == (2, 16, 5, 4)
    torch.testing.assert_close(out, split_attention(layer, x))
    weights = layer.attention(torch.randn(2, 16, 1, 1))
    assert weights.shape == (2, radix, 16, 1, 1)
    assert weights.std() > 0.1
    if radix > 1:
        torch.testing.assert_close(weights.sum(1), torch.ones(2, 16, 1, 1))


def test_keys_are_mmdets():
    layer = SplitAttentionConv2d(64, 64, 3, norm_cfg=BN)
    keys = [key for key in layer.state_dict() if "running" not in key and "tracked" not in key]
    assert keys == [
        "conv.weight", "bn0.weight", "bn0.bias", "fc1.weight", "fc1.bias", "bn1.weight", "bn1.bias",
        "fc2.weight", "fc2.bias",
    ]  # fmt: skip
    block = SplitAttentionBottleneck(32, 8)
    assert [name for name, child in block.named_children() if list(child.parameters())] == [
        "conv1", "bn1", "conv2", "conv3", "bn3",
    ]  # fmt: skip


def test_channels_of_the_attention():
    channels = [(64, 2, 4), (64, 1, 4), (256, 2, 4), (256, 2, 8)]
    layers = [SplitAttentionConv2d(c, c, 3, radix=r, reduction_factor=f, norm_cfg=BN) for c, r, f in channels]
    assert [layer.fc1.out_channels for layer in layers] == [32, 32, 128, 64]


def order_of_step_2(block):
    order = []
    for name in ("conv2", "avd_layer"):
        if getattr(block, name) is not None:
            getattr(block, name).register_forward_hook(lambda *_, name=name: order.append(name))
    block.eval()(torch.randn(1, block.inplanes, 8, 8))
    return order


def test_pooling_strides_beside_the_split_attention():
    behind, front = net().layer2[0], net(avd_first=True).layer2[0]
    for block in (behind, front):
        assert (block.avd_layer.kernel_size, block.avd_layer.stride, block.avd_layer.padding) == (3, 2, 1)
        assert block.conv2.conv.stride == (1, 1)
    assert order_of_step_2(behind) == ["conv2", "avd_layer"]
    assert order_of_step_2(front) == ["avd_layer", "conv2"]
    assert [block.avd_layer for block in net(26).layer1] == [None, None]
    assert net(26).layer2[1].avd_layer is None


def test_without_pooling_the_split_attention_strides(images):
    backbone = net(avg_down_stride=False)
    assert backbone.layer2[0].avd_layer is None
    assert backbone.layer2[0].conv2.conv.stride == (2, 2)
    assert [out.shape[-1] for out in backbone(images)] == [16, 8, 4, 2]


def test_caffe_style_strides_in_the_first_convolution(images):
    backbone = net(style="caffe")
    assert backbone.layer2[0].conv1.stride == (2, 2)
    assert backbone.layer2[0].avd_layer is None
    assert [out.shape[-1] for out in backbone(images)] == [16, 8, 4, 2]


@pytest.mark.parametrize(("groups", "base_width", "widths"), [(1, 4, [64, 128]), (2, 40, [80, 160])])
def test_width_is_that_of_a_resnext(groups, base_width, widths):
    for planes, width in zip((64, 128), widths, strict=True):
        block = SplitAttentionBottleneck(64, planes, groups=groups, base_width=base_width, radix=4)
        assert (block.conv2.conv.in_channels, block.conv2.conv.out_channels) == (width, width * 4)
        assert (block.conv2.conv.groups, block.conv2.fc1.groups, block.conv2.fc2.groups) == (groups * 4, groups, groups)
        assert block.conv3.in_channels == width


@pytest.mark.parametrize("depth", [14, 26, 50, 101, 152, 200, 269])
def test_depths(depth):
    with torch.device("meta"):
        backbone = net(depth)
    # Three layers per block, and the stem and the classifier, which count as one each.
    assert 3 * len(blocks(backbone)) + 2 == depth
    assert backbone.out_channels == (32, 64, 128, 256)


@pytest.mark.parametrize("init_cfg", [None, {"type": "Kaiming", "layer": "Conv2d"}])
def test_defect_03_blocks_start_as_the_identity(init_cfg):
    """In mmdet, resnet.py:415 checks ``block is Bottleneck`` and skips ResNeSt's. Here, its last norm is zero, too."""
    backbone = build_backbone({"type": "ResNeSt", "depth": 26, "init_cfg": init_cfg, **TINY})
    assert all(not block.norm3.weight.any() for block in blocks(backbone))
    assert all(block.conv2.bn0.weight.all() and block.conv2.bn1.weight.all() for block in blocks(backbone))
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(backbone.layer1[1](x), x.relu())


@pytest.mark.parametrize(("position", "width"), [("after_conv1", 16), ("after_conv2", 16), ("after_conv3", 32)])
@pytest.mark.parametrize("radix", [1, 2])
def test_defect_04_plugins_have_the_width_of_the_groups(position, width, radix):
    """Upstream builds ResNeSt's plugins for ``planes`` channels; with several groups they crash in ``forward``.

    Here, plugins have the width of the preceding convolution.
    """
    plugins = [{"cfg": {"type": "SELayer", "postfix": postfix}, "position": position} for postfix in ("_a", "_b")]
    backbone = net(plugins=plugins, groups=4, base_width=4, radix=radix)
    backbone(torch.randn(2, 3, 64, 64))
    for stage, block in enumerate(blocks(backbone)):
        pooling = ["avd_layer"] if position == "after_conv2" and block.avd_layer is not None else []
        assert getattr(block, f"{position}_plugin_names") == [*pooling, "se_layer_a", "se_layer_b"]
        assert block.se_layer_a.conv1.conv.in_channels == width * 2**stage


def test_plugins_after_conv2_see_the_pooled_map():
    block = net(plugins=[{"cfg": {"type": "SELayer"}, "position": "after_conv2"}]).layer2[0].eval()
    seen = []
    block.se_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    block(torch.randn(1, 32, 8, 8))
    assert seen == [(1, 16, 4, 4)]


def test_defect_10_drop_path_leaves_branches_out(randomize_norms):
    """In mmpretrain, resnest.py ignores ``drop_path_rate``. Here, half of the paths are dropped at rate 0.5."""
    backbone = randomize_norms(net(26, drop_path_rate=0.5))
    rates = [block.drop_path.drop_prob if block.drop_path else 0.0 for block in blocks(backbone)]
    assert rates == [pytest.approx(0.5 * index / 7) for index in range(8)]
    block = backbone.layer4[1].train()
    assert isinstance(block.drop_path, DropPath)
    out = block(x := torch.randn(64, 256, 2, 2))
    dropped = [torch.equal(sample, kept.relu()) for sample, kept in zip(out, x, strict=True)]
    assert 10 < sum(dropped) < 54


@pytest.mark.parametrize("groups", [1, 2])
def test_the_convolution_inside_is_deformable(groups):
    dcn = {"type": "DCNv2", "deform_groups": 1, "backend": "torch"}
    backbone = net(dcn=dcn, stage_with_dcn=(False, True, True, True), groups=groups, base_width=8)
    assert [isinstance(block.conv2.conv, DeformConv2d) for block in blocks(backbone)] == [False, True, True, True]
    assert backbone.layer2[0].conv2.conv.groups == 2 * groups
    assert "layer2.0.conv2.conv.conv_offset.weight" in backbone.state_dict()
    backbone(torch.randn(2, 3, 96, 96))[-1].sum().backward()
    assert backbone.layer2[0].conv2.conv.weight.grad.any()


@pytest.mark.parametrize("avg_down_stride", [False, True])
def test_a_strided_convolution_falls_back_to_a_plain_one(avg_down_stride):
    """Where pooling strides, the convolution does not, and stays deformable."""
    dcn = {"type": "DCN", "fallback_on_stride": True}
    before = copy.deepcopy(dcn)
    backbone = net(26, dcn=dcn, stage_with_dcn=(True,) * 4, avg_down_stride=avg_down_stride)
    deformable = [isinstance(block.conv2.conv, DeformConv2d) for block in blocks(backbone)]
    assert deformable == [True, True, *[avg_down_stride, True] * 3]
    assert dcn == before


def test_norms_are_named_as_they_are():
    norms = net(norm_cfg={"type": "GN", "num_groups": 4}).layer1[0].conv2
    assert isinstance(norms.gn0, nn.GroupNorm)
    assert isinstance(norms.gn1, nn.GroupNorm)


@pytest.mark.parametrize("norm_cfg", [{"type": "IN"}, {"type": "GN", "num_groups": 32}])
def test_norms_of_a_single_number_are_refused(norm_cfg):
    """On the attention's maps of one pixel they give zeros, and raise for a single image."""
    with pytest.raises(
        ValueError, match=r"split attention normalizes maps of one pixel.*two channels together.*got {'type'"
    ):
        ResNeSt(14, norm_cfg=norm_cfg)


def test_groups_must_divide_the_attention():
    with pytest.raises(ValueError, match="the 32 channels of the split attention must be divisible by `groups`, got 3"):
        SplitAttentionConv2d(24, 24, 3, groups=3, norm_cfg=BN)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"radix": 0}, ValueError, "`radix` must be at least 1, got 0"),
        ({"radix": 2.0}, TypeError, "`radix` must be an integer, got 2.0 of type float"),
        ({"groups": 0}, ValueError, "`groups` must be at least 1, got 0"),
        ({"reduction_factor": 0}, ValueError, "`reduction_factor` must be at least 1, got 0"),
        ({"avg_down_stride": 1}, TypeError, "`avg_down_stride` must be True or False, got 1"),
        ({"avd_first": "no"}, TypeError, "`avd_first` must be True or False, got 'no'"),
        ({"depth": 18}, KeyError, "`depth` of ResNeSt must be one of 14, 26, 50, 101, 152, 200, 269; got 18"),
        ({"reduction": 4}, TypeError, "ResNeSt has no argument 'reduction'; did you mean 'reduction_factor'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_built(refused, options, error, text):
    with refused(error, text):
        build_backbone({"type": "ResNeSt", "depth": 14, **options})
