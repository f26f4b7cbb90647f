"""The residual blocks and the stage that puts them in a row."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from resbackbone.backbones import ResLayer
from resbackbone.blocks import BasicBlock, Bottleneck
from resbackbone.layers import DeformConv2d, ModulatedDeformConv2d

BLOCKS = [BasicBlock, Bottleneck]
DCN = {"type": "DCN", "deform_groups": 1}


class Scale(nn.Module):
    """A plugin that multiplies by a number, to see whether and in which order plugins run."""

    _abbr_ = "scale"

    def __init__(self, in_channels, factor=2.0, plus=0.0):
        super().__init__()
        self.in_channels, self.factor, self.plus = in_channels, factor, plus

    def forward(self, x):
        return x * self.factor + self.plus


@pytest.fixture(autouse=True)
def _register_scale(registry):
    registry.register_module("Scale", module=Scale)


def plugin(position, **cfg):
    return {"cfg": {"type": "Scale", **cfg}, "position": position}


def identity_block(block_class, **options):
    """A block whose channels stay, so that it needs no downsample."""
    return block_class(16 * block_class.expansion, 16, **options)


def mid_dilations(layer):
    return [(block.conv1 if isinstance(block, BasicBlock) else block.conv2).dilation[0] for block in layer]


# Structure


def test_basic_block_is_two_3x3():
    block = BasicBlock(16, 24, stride=2)
    assert (block.conv1.in_channels, block.conv1.out_channels, block.conv2.out_channels) == (16, 24, 24)
    assert (block.conv1.kernel_size, block.conv2.kernel_size) == ((3, 3), (3, 3))
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    assert (block.conv1.padding, block.conv2.padding) == ((1, 1), (1, 1))
    assert (block.conv1.bias, block.conv2.bias) == (None, None)
    assert (block.norm1, block.norm2) == (block.bn1, block.bn2)
    assert not hasattr(block, "conv3")
    assert BasicBlock.expansion == 1


@pytest.mark.parametrize("style", ["pytorch", "caffe"])
def test_bottleneck_is_1x1_3x3_1x1(style):
    block = Bottleneck(32, 16, stride=2, style=style)
    convs = [block.conv1, block.conv2, block.conv3]
    assert [conv.kernel_size[0] for conv in convs] == [1, 3, 1]
    assert [conv.out_channels for conv in convs] == [16, 16, 64]
    assert [conv.stride[0] for conv in convs] == ([1, 2, 1] if style == "pytorch" else [2, 1, 1])
    assert [conv.bias for conv in convs] == [None] * 3
    assert (block.norm1, block.norm2, block.norm3) == (block.bn1, block.bn2, block.bn3)
    assert Bottleneck.expansion == 4


def test_resnext_bottleneck_is_grouped_at_its_own_width():
    block = Bottleneck(64, 64, groups=32, base_width=4)
    assert block.conv2.groups == 32
    assert [conv.out_channels for conv in (block.conv1, block.conv2, block.conv3)] == [128, 128, 256]
    assert block.conv2.weight.shape == (128, 4, 3, 3)
    assert block.bn2.num_features == 128
    assert Bottleneck(512, 256, groups=32, base_width=8).conv2.out_channels == 1024


def test_one_group_is_a_plain_bottleneck_whatever_the_base_width():
    assert Bottleneck(64, 16, groups=1, base_width=64).conv2.out_channels == 16


def test_a_dilated_block_pads_as_far_as_it_looks():
    for block in (BasicBlock(8, 8, dilation=3), Bottleneck(32, 8, dilation=3)):
        spatial = block.conv1 if isinstance(block, BasicBlock) else block.conv2
        assert (spatial.dilation, spatial.padding) == ((3, 3), (3, 3))
        x = torch.randn(1, block.inplanes, 9, 9)
        assert block.eval()(x).shape == x.shape


@pytest.mark.parametrize("block_class", BLOCKS)
def test_a_block_computes_relu_of_branch_plus_shortcut(randomize_norms, block_class):
    block = randomize_norms(identity_block(block_class)).eval()
    x = torch.randn(2, block.inplanes, 8, 8)
    out = x
    for index in range(1, block.num_convs + 1):
        out = getattr(block, f"bn{index}")(getattr(block, f"conv{index}")(out))
        if index < block.num_convs:
            out = out.relu()
    assert torch.equal(block(x), (out + x).relu())
    block.downsample = nn.Conv2d(block.inplanes, block.inplanes, 1)
    assert torch.equal(block(x), (out + block.downsample(x)).relu())


@pytest.mark.parametrize("block_class", BLOCKS)
@pytest.mark.parametrize("train", [False, True])
def test_a_block_leaves_its_input_alone(block_class, train):
    block = identity_block(block_class).train(train)
    x = torch.randn(2, block.inplanes, 8, 8)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("block_class", BLOCKS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_checkpointed_block_gives_the_same_gradients(randomize_norms, block_class, grad):
    block = randomize_norms(identity_block(block_class, with_cp=True)).train()
    same = copy.deepcopy(block)
    same.with_cp = False
    x = torch.randn(2, block.inplanes, 8, 8, requires_grad=grad)
    out, expected = block(x), same(x)
    assert torch.equal(out, expected)
    gradients = torch.autograd.grad(out.square().sum(), [*block.parameters(), *([x] if grad else [])])
    references = torch.autograd.grad(expected.square().sum(), [*same.parameters(), *([x] if grad else [])])
    assert all(torch.equal(*pair) for pair in zip(gradients, references, strict=True))
    assert [int(getattr(block, f"bn{index}").num_batches_tracked) for index in (1, 2)] == [1, 1]
    assert torch.equal(block.bn1.running_mean, same.bn1.running_mean)


@pytest.mark.parametrize("block_class", BLOCKS)
def test_an_unknown_style_is_refused(block_class):
    with pytest.raises(ValueError, match="`style` must be one of 'pytorch', 'caffe'; got 'tensorflow'"):
        identity_block(block_class, style="tensorflow")


def test_drop_path_of_a_block_drops_its_branch():
    block = identity_block(Bottleneck, drop_path_rate=0.5).train()
    x = torch.randn(64, 64, 2, 2)
    untouched = (block(x) == x.relu()).flatten(1).all(1)
    assert 10 < int(untouched.sum()) < 54
    assert not (block.eval()(x) == x.relu()).flatten(1).all(1).any()


# Plugins


def test_plugins_have_the_width_of_the_convolution_they_follow():
    plugins = [
        plugin("after_conv1", postfix="_1"),
        plugin("after_conv2", postfix="_2"),
        plugin("after_conv3", postfix="_3"),
        plugin("after_conv3"),
    ]
    for block, width in ((Bottleneck(64, 16, plugins=plugins), 16), (
        Bottleneck(64, 16, groups=4, base_width=8, base_channels=16, plugins=plugins), 32
    )):  # fmt: skip
        assert [block.scale_1.in_channels, block.scale_2.in_channels] == [width, width]
        assert [block.scale_3.in_channels, block.scale.in_channels] == [64, 64]
        assert block.after_conv1_plugin_names == ["scale_1"]
        assert block.after_conv2_plugin_names == ["scale_2"]
        assert block.after_conv3_plugin_names == ["scale_3", "scale"]
        assert block.with_plugins
    assert not Bottleneck(64, 16).with_plugins


@pytest.mark.parametrize("block_class", BLOCKS)
def test_plugins_run_behind_norm_and_relu_in_their_order(randomize_norms, block_class):
    last = f"after_conv{block_class.num_convs}"
    plugins = [
        plugin("after_conv1", factor=2.0, plus=-1.0),
        plugin(last, postfix="_a", factor=3.0),
        plugin(last, postfix="_b", plus=5.0, factor=1.0),
    ]
    block = randomize_norms(identity_block(block_class, plugins=plugins)).eval()
    x = torch.randn(2, block.inplanes, 8, 8)
    out = block.bn1(block.conv1(x)).relu() * 2 - 1
    out = block.bn2(block.conv2(out))
    if block_class.num_convs == 3:
        out = block.bn3(block.conv3(out.relu()))
    assert torch.equal(block(x), (out * 3 + 5 + x).relu())


@pytest.mark.parametrize("block_class", BLOCKS)
def test_two_plugins_of_one_name_are_refused(block_class):
    plugins = [plugin("after_conv1"), plugin("after_conv2")]
    with pytest.raises(ValueError, match=r"duplicate plugin 'scale' .* give each its own `postfix`"):
        identity_block(block_class, plugins=plugins)


def test_a_plugin_may_not_take_the_name_of_a_layer(registry):
    @registry.register_module()
    class Thief(Scale):
        _abbr_ = "conv1"

    with pytest.raises(ValueError, match="conv1"):
        Bottleneck(64, 16, plugins=[{"cfg": {"type": "Thief"}, "position": "after_conv2"}])


@pytest.mark.parametrize(
    ("block_class", "position", "allowed"),
    [
        (Bottleneck, "after_conv4", "'after_conv1', 'after_conv2', 'after_conv3'"),
        (Bottleneck, "before_conv1", "'after_conv1', 'after_conv2', 'after_conv3'"),
        (BasicBlock, "after_conv3", "'after_conv1', 'after_conv2'"),
    ],
)
def test_a_position_that_the_block_lacks_is_refused(block_class, position, allowed):
    with pytest.raises(ValueError, match=f"a {block_class.__name__}` must be one of {allowed}; got '{position}'"):
        identity_block(block_class, plugins=[plugin(position)])


def test_an_unknown_plugin_is_answered_with_the_nearest():
    with pytest.raises(KeyError, match="unknown plugin type 'Scael'; did you mean 'Scale'"):
        identity_block(Bottleneck, plugins=[{"cfg": {"type": "Scael"}, "position": "after_conv1"}])


@pytest.mark.parametrize("block_class", BLOCKS)
def test_a_block_changes_neither_plugins_nor_dcn(block_class):
    plugins = [plugin("after_conv1", postfix="_x")]
    dcn = {**DCN, "fallback_on_stride": True}
    before = copy.deepcopy((plugins, dcn))
    identity_block(block_class, plugins=plugins, dcn=dcn)
    assert (plugins, dcn) == before


# Deformable convolution


@pytest.mark.parametrize("block_class", BLOCKS)
@pytest.mark.parametrize(("type_", "conv_class"), [("DCN", DeformConv2d), ("DCNv2", ModulatedDeformConv2d)])
def test_only_the_second_convolution_is_deformable(block_class, type_, conv_class):
    block = identity_block(block_class, dcn={"type": type_, "deform_groups": 2}, dilation=2)
    assert type(block.conv2) is conv_class
    assert block.conv2.deform_groups == 2
    plain = {getattr(block, f"conv{index}") for index in range(1, block.num_convs + 1)} - {block.conv2}
    assert {type(conv) for conv in plain} == {nn.Conv2d}
    assert block.with_dcn
    x = torch.randn(2, block.inplanes, 8, 8)
    out = block(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert block.conv2.conv_offset.weight.grad is not None


def test_a_deformable_convolution_keeps_stride_dilation_and_groups():
    block = Bottleneck(64, 64, stride=2, dilation=2, groups=32, base_width=4, dcn=DCN)
    assert (block.conv2.stride, block.conv2.dilation, block.conv2.padding) == ((2, 2), (2, 2), (2, 2))
    assert block.conv2.groups == 32
    assert block.conv2.weight.shape == (128, 4, 3, 3)


@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize(
    ("stride", "style", "deformable"), [(1, "pytorch", True), (2, "pytorch", False), (2, "caffe", True)]
)
def test_fallback_on_stride_leaves_a_strided_3x3_plain(groups, stride, style, deformable):
    make = partial(Bottleneck, 32, 16, stride=stride, style=style, groups=groups)
    block = make(dcn={**DCN, "fallback_on_stride": True})
    assert isinstance(block.conv2, DeformConv2d) is deformable
    always = make(dcn={**DCN, "fallback_on_stride": False})
    assert isinstance(always.conv2, DeformConv2d)


def test_the_deformable_3x3_of_a_basic_block_never_strides():
    block = BasicBlock(16, 16, stride=2, dcn={**DCN, "fallback_on_stride": True})
    assert isinstance(block.conv2, DeformConv2d)
    assert block.conv2.stride == (1, 1)


@pytest.mark.parametrize("block_class", BLOCKS)
def test_dcn_beside_conv_cfg_is_refused(block_class):
    with pytest.raises(ValueError, match=r"`conv_cfg` must be None where there is `dcn`, got \{'type': 'Conv2d'\}"):
        identity_block(block_class, dcn=DCN, conv_cfg={"type": "Conv2d"})


# ResLayer


@pytest.mark.parametrize("block_class", [BasicBlock, Bottleneck])
def test_a_stage_that_changes_nothing_has_no_downsample(block_class):
    layer = ResLayer(block_class, 16 * block_class.expansion, 16, 3)
    assert len(layer) == 3
    assert [block.downsample for block in layer] == [None] * 3
    assert layer(torch.randn(1, 16 * block_class.expansion, 8, 8)).shape[1:] == (16 * block_class.expansion, 8, 8)


def test_a_stage_that_changes_channels_or_size_downsamples_in_its_first_block():
    for inplanes, stride in ((64, 1), (256, 2)):
        layer = ResLayer(Bottleneck, inplanes, 64, 3, stride=stride)
        conv, norm = layer[0].downsample
        assert (conv.kernel_size, conv.stride, conv.in_channels, conv.out_channels) == (
            (1, 1), (stride, stride), inplanes, 256,
        )  # fmt: skip
        assert isinstance(norm, nn.BatchNorm2d)
        assert [block.downsample for block in list(layer)[1:]] == [None, None]
        assert [block.conv2.stride[0] for block in layer] == [stride, 1, 1]
        assert [block.inplanes for block in layer] == [inplanes, 256, 256]
        assert layer(torch.randn(1, inplanes, 8, 8)).shape == (1, 256, 8 // stride, 8 // stride)


@pytest.mark.parametrize("stride", [1, 2])
def test_avg_down_pools_before_the_1x1(stride):
    layer = ResLayer(Bottleneck, 64, 64, 2, stride=stride, avg_down=True)
    pool, conv, _ = layer[0].downsample
    assert (type(pool), pool.stride, conv.stride) == (nn.AvgPool2d, stride, (1, 1))
    assert layer(torch.randn(1, 64, 9, 9)).shape[2:] == (-(-9 // stride),) * 2


def test_downsample_first_false_changes_in_the_last_block():
    layer = ResLayer(Bottleneck, 64, 32, 3, stride=2, downsample_first=False)
    assert [block.downsample is None for block in layer] == [True, True, False]
    assert [block.conv2.stride[0] for block in layer] == [1, 1, 2]
    assert [block.inplanes for block in layer] == [64, 64, 64]
    assert [block.planes for block in layer] == [16, 16, 32]
    assert layer(torch.randn(1, 64, 8, 8)).shape == (1, 128, 4, 4)


@pytest.mark.parametrize("block_class", [BasicBlock, Bottleneck])
def test_dilation_contraction_and_grid(block_class):
    def layer(**options):
        return ResLayer(block_class, 16, 16, 3, **options)

    assert mid_dilations(layer()) == [1, 1, 1]
    assert mid_dilations(layer(dilation=2)) == [2, 2, 2]
    assert mid_dilations(layer(dilation=2, contract_dilation=True)) == [1, 2, 2]
    assert mid_dilations(layer(dilation=8, contract_dilation=True)) == [4, 8, 8]
    assert mid_dilations(layer(contract_dilation=True)) == [1, 1, 1]
    assert mid_dilations(layer(dilation=8, multi_grid=(1, 2, 4))) == [1, 2, 4]
    assert mid_dilations(layer(dilation=8, multi_grid=(1, 2, 4), contract_dilation=True)) == [1, 2, 4]
    assert layer(dilation=2, multi_grid=(1, 2, 4))(torch.randn(1, 16, 8, 8)).shape[2:] == (8, 8)


def test_a_stage_of_a_block_with_another_expansion():
    class Wide(Bottleneck):
        expansion = 2

    layer = ResLayer(Wide, 16, 16, 2, stride=2)
    assert layer.out_channels == 32
    assert (layer[0].conv3.out_channels, layer[0].downsample[0].out_channels) == (32, 32)
    assert layer[1].downsample is None
    assert layer(torch.randn(1, 16, 8, 8)).shape == (1, 32, 4, 4)


def test_drop_path_of_a_stage_is_one_rate_or_one_per_block():
    def rates(rate):
        layer = ResLayer(BasicBlock, 16, 16, 3, drop_path_rate=rate)
        return [block.drop_path.drop_prob if block.drop_path else 0 for block in layer]

    assert rates(0.2) == [0.2, 0.2, 0.2]
    assert rates([0.0, 0.1, 0.2]) == [0, 0.1, 0.2]
    with pytest.raises(ValueError, match="must have 3 entries, one per block, got 2"):
        rates([0.1, 0.2])


@pytest.mark.parametrize("multi_grid", [(1, 2), (1, 2, 4, 8)])
def test_a_grid_of_another_length_is_refused(multi_grid):
    with pytest.raises(ValueError, match="`multi_grid` must have 3 entries"):
        ResLayer(BasicBlock, 16, 16, 3, multi_grid=multi_grid)


@pytest.mark.parametrize("num_blocks", [0, True, 2.0])
def test_a_stage_needs_a_block(num_blocks):
    with pytest.raises((ValueError, TypeError), match="`num_blocks` must be"):
        ResLayer(BasicBlock, 16, 16, num_blocks)


def test_a_stage_hands_norm_and_conv_configs_to_blocks_and_shortcut(registry):
    @registry.register_module()
    class MyConv(nn.Conv2d):
        pass

    layer = ResLayer(
        Bottleneck,
        16,
        16,
        2,
        conv_cfg={"type": "MyConv"},
        norm_cfg={"type": "GN", "num_groups": 2},
        style="caffe",
        stride=2,
    )
    assert {type(module) for module in layer.modules() if isinstance(module, nn.Conv2d)} == {MyConv}
    assert not [module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)]
    assert layer[0].gn3.num_groups == layer[0].downsample[1].num_groups == 2
    assert layer[0].conv1.stride == (2, 2)
