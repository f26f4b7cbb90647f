"""Selective kernels: the layer's formula, and the ResNets built of it. test_timm.py compares numbers."""

import pytest
import torch
from cases import blocks
from torch import nn
from torch.nn import functional as F

from resbackbone import SKResNet, build_backbone
from resbackbone.layers import DeformConv2d, SelectiveKernelConv2d

BN = {"type": "BN"}
NETS = {
    "basic": (SKResNet, {"depth": 18}),
    "basic-split": (SKResNet, {"depth": 18, "split_input": True}),
    "bottleneck": (SKResNet, {"depth": 50, "split_input": True, "deep_stem": True, "avg_down": True}),
    "caffe": (SKResNet, {"depth": 50, "style": "caffe"}),
    "grouped": (SKResNet, {"depth": 50, "groups": 4, "base_width": 4}),
    "three": (SKResNet, {"depth": 18, "num_paths": 3}),
}


def selective(block):
    return block.conv1 if block.num_convs == 2 else block.conv2


@pytest.mark.parametrize("split_input", [False, True])
@pytest.mark.parametrize("num_paths", [2, 3])
def test_the_paths_are_weighed_against_each_other_channel_by_channel(randomize_norms, split_input, num_paths):
    layer = SelectiveKernelConv2d(
        12, 8, stride=2, num_paths=num_paths, min_channels=4, split_input=split_input, norm_cfg=BN
    )
    layer = randomize_norms(layer).eval()
    x = torch.randn(2, 12, 9, 7)
    views = []
    for index, path in enumerate(layer.paths):
        share = x[:, index * 12 // num_paths : (index + 1) * 12 // num_paths] if split_input else x
        reach = index + 1
        view = F.conv2d(share, path.conv.weight, stride=2, padding=reach, dilation=reach)
        views.append(path.bn(view).relu())
    means = sum(views).mean((2, 3))
    hidden = means @ layer.attn.fc_reduce.weight.flatten(1).T
    norm = layer.attn.bn
    hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    logits = hidden.relu() @ layer.attn.fc_select.weight.flatten(1).T
    shares = torch.stack([logits[:, 8 * index : 8 * index + 8].exp() for index in range(num_paths)])
    shares = shares / shares.sum(0)
    expected = sum(view * share[..., None, None] for view, share in zip(views, shares, strict=True))
    assert expected.shape == (2, 8, 5, 4)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("channels", "options", "expected"),
    [(128, {}, 32), (1024, {}, 64), (64, {"min_channels": 8}, 8), (512, {"reduction": 8, "min_channels": 16}, 64)],
)
def test_the_attention_is_as_wide_as_the_paper_says(channels, options, expected):
    assert SelectiveKernelConv2d(8, channels, norm_cfg=BN, **options).attn.fc_reduce.out_channels == expected


@pytest.mark.parametrize("net", NETS)
def test_it_takes_the_place_of_the_convolution_that_may_stride(net):
    net_class, options = NETS[net]
    built = net_class(base_channels=8, **options).eval()
    for block in blocks(built):
        conv = selective(block)
        assert isinstance(conv, SelectiveKernelConv2d)
        assert not hasattr(block, "bn1" if block.num_convs == 2 else "bn2")
        assert len(conv.paths) == dict(options).get("num_paths", 2)
    strides = {path.conv.stride for path in selective(built.layer2[0]).paths}
    assert strides == ({(1, 1)} if net == "caffe" else {(2, 2)})
    for size in ((64, 64), (65, 97)):
        shapes = [tuple(out.shape[2:]) for out in built(torch.randn(1, 3, *size))]
        assert shapes == [tuple(-(-side // stride) for side in size) for stride in built.out_strides]


def test_groups_and_dilation_reach_every_path():
    net = SKResNet(50, groups=32, dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1))
    convs = [path.conv for path in net.layer4[0].conv2.paths]
    assert [(conv.groups, conv.dilation, conv.padding) for conv in convs] == [
        (32, (2, 2), (2, 2)),
        (32, (4, 4), (4, 4)),
    ]


def test_dcn_makes_the_spatial_convolution_deformable():
    dcn = {"type": "DCN", "deform_groups": 1, "fallback_on_stride": True, "backend": "torch"}
    options = {"base_channels": 8, "dcn": dcn, "stage_with_dcn": (False, True, False, False)}
    net = SKResNet(50, **options).eval()
    kinds = [{type(path.conv) for path in block.conv2.paths} for block in net.layer2]
    assert kinds == [{nn.Conv2d}, {DeformConv2d}, {DeformConv2d}, {DeformConv2d}]
    assert net(torch.randn(1, 3, 64, 64))[1].shape == (1, 64, 8, 8)
    net = SKResNet(18, **options)  # the second 3x3 takes it, as in every basic block
    assert isinstance(net.layer2[0].conv2, DeformConv2d)
    assert {type(path.conv) for path in net.layer2[0].conv1.paths} == {nn.Conv2d}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_paths": 1}, ValueError, "`num_paths` must be at least 2, got 1"),
        ({"reduction": 0}, ValueError, "`reduction` must be at least 1, got 0"),
        ({"reduction": 0.5}, TypeError, "`reduction` must be an integer, got 0.5"),
        ({"min_channels": 0}, ValueError, "`min_channels` must be at least 1, got 0"),
        ({"split_input": 1}, TypeError, "`split_input` must be True or False, got 1"),
        ({"num_path": 2}, TypeError, "SKResNet has no argument 'num_path'; did you mean 'num_paths'?"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(refused, options, error, text):
    with refused(error, text):
        build_backbone({"type": "SKResNet", "depth": 18, **options})


def test_paths_that_cannot_share_the_channels_are_refused():
    with pytest.raises(ValueError, match="the 8 input channels must be divisible by `num_paths`, got 3"):
        SKResNet(18, base_channels=8, num_paths=3, split_input=True)


def test_a_norm_that_would_see_one_number_is_refused():
    with pytest.raises(ValueError, match="selective-kernel attention normalizes maps of one pixel"):
        SKResNet(18, norm_cfg={"type": "GN", "num_groups": 32})
