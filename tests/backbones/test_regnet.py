"""RegNetX and RegNetY: the published architectures, what describes one, and every option of ResNet in them."""

import copy
import re

import pytest
import torch
from cases import blocks
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone import FeatureInfo, RegNet, ResNeXt, build_backbone, list_backbones
from resbackbone.analysis.cost import build_on_meta, measure
from resbackbone.backbones.regnet_archs import plan_stages, resolve_arch
from resbackbone.blocks import Bottleneck, RegNetBottleneck
from resbackbone.layers import DeformConv2d, DropPath, FrozenBatchNorm2d

# Widths and blocks per stage, channels per group: arXiv:2003.13678, figures 15 and 16; from 64gf on timm's;
# and for "_tv" torchvision's. Parameters and multiply-accumulates with a classifier of 1000 classes, for one image of
# 224x224; test_timm.py and test_regnet_peers.py ask timm's models and torchvision's metadata for theirs.
PUBLISHED = {
    "regnetx_200mf": ((24, 56, 152, 368), (1, 1, 4, 7), 8, 2_684_792, 199_039_872),
    "regnetx_400mf": ((32, 64, 160, 384), (1, 2, 7, 12), 16, 5_157_512, 397_677_568),
    "regnetx_600mf": ((48, 96, 240, 528), (1, 3, 5, 7), 24, 6_196_040, 600_890_112),
    "regnetx_800mf": ((64, 128, 288, 672), (1, 3, 7, 5), 16, 7_259_656, 799_699_712),
    "regnetx_1.6gf": ((72, 168, 408, 912), (2, 4, 10, 2), 24, 9_190_136, 1_602_849_792),
    "regnetx_3.2gf": ((96, 192, 432, 1008), (2, 6, 15, 2), 48, 15_296_552, 3_176_621_952),
    "regnetx_4.0gf": ((80, 240, 560, 1360), (2, 5, 14, 2), 40, 22_118_248, 3_964_498_816),
    "regnetx_6.4gf": ((168, 392, 784, 1624), (2, 4, 10, 1), 56, 26_209_256, 6_460_291_264),
    "regnetx_8.0gf": ((80, 240, 720, 1920), (2, 5, 15, 1), 120, 39_572_648, 7_995_132_416),
    "regnetx_12gf": ((224, 448, 896, 2240), (2, 5, 11, 1), 112, 46_106_056, 12_086_678_016),
    "regnetx_16gf": ((256, 512, 896, 2048), (2, 6, 13, 1), 128, 54_278_536, 15_940_755_456),
    "regnetx_32gf": ((336, 672, 1344, 2520), (2, 7, 13, 1), 168, 107_811_560, 31_735_929_792),
    "regnety_200mf": ((24, 56, 152, 368), (1, 1, 4, 7), 8, 3_162_996, 199_514_080),
    "regnety_400mf": ((48, 104, 208, 440), (1, 3, 6, 6), 8, 4_344_144, 401_842_848),
    "regnety_600mf": ((48, 112, 256, 608), (1, 3, 7, 4), 16, 6_055_160, 601_220_992),
    "regnety_800mf": ((64, 128, 320, 768), (1, 3, 8, 2), 16, 6_263_168, 797_176_832),
    "regnety_1.6gf": ((48, 120, 336, 888), (2, 6, 17, 2), 24, 11_202_430, 1_612_076_160),
    "regnety_3.2gf": ((72, 216, 576, 1512), (2, 5, 13, 1), 24, 19_436_338, 3_176_482_752),
    "regnety_4.0gf": ((128, 192, 512, 1088), (2, 6, 12, 2), 64, 20_646_656, 3_973_288_448),
    "regnety_6.4gf": ((144, 288, 576, 1296), (2, 7, 14, 2), 72, 30_583_252, 6_355_204_992),
    "regnety_8.0gf": ((168, 448, 896, 2016), (2, 4, 10, 1), 56, 39_180_068, 7_963_057_312),
    "regnety_12gf": ((224, 448, 896, 2240), (2, 5, 11, 1), 112, 51_822_544, 12_092_376_576),
    "regnety_16gf": ((224, 448, 1232, 3024), (2, 4, 11, 1), 112, 83_590_140, 15_911_510_272),
    "regnety_32gf": ((232, 696, 1392, 3712), (2, 5, 12, 1), 232, 145_046_770, 32_279_552_832),
    "regnety_64gf": ((328, 984, 1968, 4920), (2, 5, 12, 1), 328, 281_378_786, 64_069_959_616),
    "regnety_128gf": ((528, 1056, 2904, 7392), (2, 7, 17, 1), 264, 644_812_894, 127_517_815_680),
    "regnety_256gf": ((746, 1492, 4103, 10444), (2, 7, 17, 1), 373, 1_282_601_138, 254_384_814_734),
    "regnetx_400mf_tv": ((32, 64, 160, 400), (1, 2, 7, 12), 16, 5_495_976, 413_812_608),
    "regnety_800mf_tv": ((64, 144, 320, 784), (1, 3, 8, 2), 16, 6_432_512, 833_856_256),
    "regnety_8.0gf_tv": ((224, 448, 896, 2016), (2, 4, 10, 1), 56, 39_381_472, 8_473_070_592),
}
TINY = {"w0": 8, "wa": 10.0, "wm": 2.0, "group_w": 4, "depth": 7}  # widths 8, 16, 32, 64 with 1, 1, 2, 3 blocks
TINY_Y = {**TINY, "se_ratio": 0.25}
THREE_STAGES = {"strides": (2, 2, 2), "dilations": (1, 1, 1), "out_indices": (0, 1, 2)}


def inputs_of(net):
    """What each block takes in, from the net's description alone."""
    widths = [width for width, count in zip(net.stage_widths, net.stage_blocks, strict=True) for _ in range(count)]
    return [net.stem_channels, *widths[:-1]]


def shapes(net):
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


def step(net, images):
    """One training step's outputs and gradients."""
    outs = net.train()(images)
    sum(out.square().mean() for out in outs).backward()
    return outs, {name: parameter.grad for name, parameter in net.named_parameters()}


class Gate(nn.Module):
    """A plugin that is cheap and says what width it was built for."""

    def __init__(self, in_channels):
        super().__init__()
        self.scale = nn.Parameter(torch.full((in_channels, 1, 1), 0.5))

    def forward(self, x):
        return x * self.scale


@pytest.fixture
def gate(registry):
    registry.register_module("Gate", module=Gate)
    return lambda position, postfix="": {"cfg": {"type": "Gate", "postfix": postfix}, "position": position}


# The published architectures


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architecture(name):
    widths, num_blocks, group_width, params, macs = PUBLISHED[name]
    net = build_on_meta(name)
    assert net.stage_widths == net.out_channels == widths
    assert net.stage_blocks == num_blocks == tuple(len(getattr(net, layer)) for layer in net.res_layers)
    assert net.out_strides == (4, 8, 16, 32)
    assert (net.depth, net.feat_dim, net.num_stages) == (sum(num_blocks), widths[-1], 4)
    for layer, width in zip(net.res_layers, widths, strict=True):
        for block in getattr(net, layer):
            convs = (block.conv1, block.conv2, block.conv3)
            assert [conv.out_channels for conv in convs] == [width] * 3
            assert [conv.groups for conv in convs] == [1, max(width // group_width, 1), 1]
            assert hasattr(block, "se_layer") is name.startswith("regnety")
    cost = measure(net)
    assert (cost.params_with_classifier, cost.macs_with_classifier) == (params, macs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_dict_makes_the_same_net(name):
    arch = dict(RegNet.arch_settings[name])
    before = dict(arch)
    with torch.device("meta"):
        by_name, by_dict = RegNet(name), RegNet(arch)
    assert str(by_dict) == str(by_name)
    assert shapes(by_dict) == shapes(by_name)
    assert arch == before


def test_each_has_a_config_of_its_name():
    assert sorted(PUBLISHED) == sorted(RegNet.arch_settings) == list_backbones("regnet*")
    assert build_backbone("regnetx_400mf", out_indices=(-1,)).feature_info == (FeatureInfo("layer4", 3, 384, 32),)


def test_names_of_mmdet_are_all_here():
    mmdet = {"400mf", "800mf", "1.6gf", "3.2gf", "4.0gf", "6.4gf", "8.0gf", "12gf"}
    assert {f"regnetx_{size}" for size in mmdet} <= set(RegNet.arch_settings)


def test_keys_are_those_of_a_resnet():
    net = RegNet(TINY_Y)
    assert {key.split(".")[0] for key in net.state_dict()} == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    names = {re.sub(r"^layer4\.0\.", "", name) for name, _ in net.named_parameters() if name.startswith("layer4.0.")}
    assert names == {
        *(f"conv{index}.weight" for index in (1, 2, 3)),
        *(f"bn{index}.{part}" for index in (1, 2, 3) for part in ("weight", "bias")),
        *(f"se_layer.conv{index}.conv.{part}" for index in (1, 2) for part in ("weight", "bias")),
        *("downsample.0.weight", "downsample.1.weight", "downsample.1.bias"),
    }


def test_the_stem_strides_by_two_without_pooling(images):
    net = RegNet(TINY, stem_channels=24)
    assert (net.conv1.kernel_size, net.conv1.stride, net.conv1.padding) == ((3, 3), (2, 2), (1, 1))
    assert net.conv1.out_channels == net.layer1[0].conv1.in_channels == 24
    assert not any(isinstance(module, nn.MaxPool2d) for module in net.modules())
    assert [out.shape[1:] for out in net(images)] == [(8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
    assert RegNet(TINY).conv1.out_channels == 32
    assert RegNet(TINY, stem_channels=None).conv1.out_channels == 8


# What describes a RegNet


def test_widths_follow_the_line():
    assert plan_stages(resolve_arch(TINY, {})) == ((8, 1), (16, 1), (32, 2), (64, 3))
    assert plan_stages(resolve_arch({**TINY, "wa": 0}, {})) == ((8, 7),)


@pytest.mark.parametrize(("rounding", "width"), [("pycls", 32), ("torchvision", 48)])
def test_rounding_of_a_tie(rounding, width):
    arch = {**TINY, "wa": 0, "w0": 40, "group_w": 16, "rounding": rounding}  # 2.5 groups
    assert plan_stages(resolve_arch(arch, {}))[0][0] == width


def test_torchvision_takes_no_more_than_a_tenth_away():
    arch = {**TINY, "wa": 0, "w0": 192, "group_w": 56}  # 3.43 groups
    assert plan_stages(resolve_arch(arch, {}))[0][0] == 168
    assert plan_stages(resolve_arch({**arch, "rounding": "torchvision"}, {}))[0][0] == 224


def test_a_stage_narrower_than_a_group_is_one_group():
    net = RegNet({**TINY, "group_w": 24})
    assert net.stage_widths == (8, 16, 24, 72)
    assert [block.conv2.groups for block in blocks(net)] == [1, 1, 1, 1, 3, 3, 3]


@pytest.mark.parametrize(("bot_mul", "middle"), [(0.5, (4, 8, 16, 32)), (2, (16, 32, 64, 128))])
def test_bot_mul_widens_the_3x3(images, bot_mul, middle):
    net = RegNet({**TINY, "bot_mul": bot_mul})
    convs = [getattr(net, name)[0].conv2 for name in net.res_layers]
    assert tuple(conv.out_channels for conv in convs) == middle
    assert tuple(conv.groups for conv in convs) == tuple(channels // 4 for channels in middle)
    assert tuple(out.shape[1] for out in net(images)) == net.out_channels == (8, 16, 32, 64)


def test_fewer_stages(images):
    net = RegNet({**TINY, "depth": 4}, **THREE_STAGES)
    assert (net.num_stages, net.stage_blocks, net.feat_dim) == (3, (1, 1, 2), 32)
    assert [out.shape[1:] for out in net(images)] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
    assert not hasattr(net, "layer4")


WITHOUT_WM = {key: value for key, value in TINY.items() if key != "wm"}
BAD_ARCHS = [
    ("regnetx_3.2", KeyError, "unknown `arch` 'regnetx_3.2'; did you mean 'regnetx_3.2gf'? Known: regnetx_1.6gf,"),
    ("RegNetY_400MF", KeyError, "did you mean 'regnety_400mf'?"),
    (50, TypeError, "`arch` must be a name or a dict of w0, wa, wm, group_w and depth, got 50 of type int"),
    (None, TypeError, "got None of type NoneType"),
    ({}, KeyError, "`arch` needs 'w0', got only an empty dict"),
    (WITHOUT_WM, KeyError, "`arch` needs 'wm', got only 'w0', 'wa', 'group_w', 'depth'"),
    ({**TINY, "group_width": 8}, KeyError, "`arch` has no entry 'group_width'; did you mean 'group_w'?"),
    ({**TINY, "w0": 20}, ValueError, "`arch['w0']` must be a multiple of 8, got 20"),
    ({**TINY, "w0": 0}, ValueError, "`arch['w0']` must be at least 8, got 0"),
    ({**TINY, "w0": 8.0}, TypeError, "`arch['w0']` must be an integer, got 8.0"),
    ({**TINY, "wa": -1}, ValueError, "`arch['wa']` must be at least 0, got -1"),
    ({**TINY, "wa": float("nan")}, ValueError, "`arch['wa']` must be at least 0, got nan"),
    ({**TINY, "wa": "10"}, TypeError, "`arch['wa']` must be a number, at least 0, got '10'"),
    ({**TINY, "wm": 1}, ValueError, "`arch['wm']` must be above 1, got 1"),
    ({**TINY, "wm": float("inf")}, ValueError, "`arch['wm']` must be above 1, got inf"),
    ({**TINY, "group_w": 0}, ValueError, "`arch['group_w']` must be at least 1, got 0"),
    ({**TINY, "depth": 0}, ValueError, "`arch['depth']` must be at least 1, got 0"),
    ({**TINY, "depth": True}, TypeError, "`arch['depth']` must be an integer, got True"),
    ({**TINY, "depth": 12}, ValueError, "`arch` must make at most 4 stages, got 5, of widths 8, 16, 32, 64, 128; a"),
    ({**TINY, "bot_mul": 0}, ValueError, "`arch['bot_mul']` must be above 0, got 0"),
    ({**TINY, "bot_mul": 0.1}, ValueError, "leaves no channels in the 3x3 of a stage of width 8"),
    ({**TINY, "bot_mul": 4, "group_w": 5}, ValueError, "`arch['group_w']` (=5) do not go together"),
    ({**TINY, "se_ratio": 1.5}, ValueError, "`arch['se_ratio']` must be from 0 to 1, got 1.5"),
    ({**TINY, "rounding": "timm"}, ValueError, "`arch['rounding']` must be one of 'pycls', 'torchvision'; got 'timm'"),
]


@pytest.mark.parametrize(("arch", "error", "message"), BAD_ARCHS, ids=range(len(BAD_ARCHS)))
def test_bad_arch(refused, arch, error, message):
    with refused(error, message):
        RegNet(arch)


@pytest.mark.parametrize(
    ("arch", "options", "error", "message"),
    [
        (TINY, {"se_ratio": -0.1}, ValueError, "`arch['se_ratio']` must be from 0 to 1, got -0.1"),
        (TINY, {"norm_cfg": {"type": "GN", "num_groups": 3}}, ValueError, "`norm_cfg` asks for 3 groups, which do not"),
        (TINY, {"norm_cfg": None}, TypeError, "`norm_cfg`"),
        (TINY, {"strides": (2, 2, 2)}, ValueError, "`strides` must have 4 entries (one per stage, `num_stages`=4)"),
        ({**TINY, "depth": 4}, {}, ValueError, "`strides` must have 3 entries (one per stage, `num_stages`=3)"),
        (TINY, {"out_indices": (4,)}, ValueError, "`out_indices` must be below `num_stages` (=4)"),
        (TINY, {"frozen_stages": 5}, ValueError, "`frozen_stages` must be from -1 to 4, got 5"),
        (TINY, {"style": "keras"}, ValueError, "`style` must be one of"),
        (TINY, {"multi_grid": (1, 2)}, ValueError, "`multi_grid` must have 3 entries"),
        (TINY, {"plugins": [{"cfg": {"type": "SELayer"}, "position": "after_conv4"}]}, ValueError, "after_conv3"),
    ],
)
def test_bad_options(refused, arch, options, error, message):
    with refused(error, message):
        RegNet(arch, **options)


def test_a_misspelt_argument_of_a_config_is_named():
    with pytest.raises(TypeError, match="RegNet has no argument 'depth'"):
        build_backbone({"type": "RegNet", "depth": 50})
    with pytest.raises(TypeError, match="RegNet has no argument 'se_ration'; did you mean 'se_ratio'"):
        build_backbone({"type": "RegNet", "arch": TINY, "se_ration": 0.5})
    with pytest.raises(TypeError, match="RegNet needs `arch`"):
        build_backbone({"type": "RegNet"})


def test_base_channels_warns_that_it_does_nothing():
    with pytest.warns(UserWarning, match=r"`base_channels` \(=64\) does nothing in a RegNet"):
        net = RegNet(TINY, base_channels=64)
    assert shapes(net) == shapes(RegNet(TINY, base_channels=32))


# Squeeze-and-excitation


@pytest.mark.parametrize("name", ["regnety_400mf", "regnety_8.0gf", "regnety_8.0gf_tv"])
def test_se_squeezes_to_a_quarter_of_what_the_block_takes_in(name):
    net = build_on_meta(name)
    for block, inputs in zip(blocks(net), inputs_of(net), strict=True):
        squeeze, excite = block.se_layer.conv1.conv, block.se_layer.conv2.conv
        assert (squeeze.in_channels, squeeze.out_channels) == (block.planes, inputs // 4)
        assert (excite.in_channels, excite.out_channels) == (inputs // 4, block.planes)


def test_se_stands_between_the_activated_3x3_and_the_last_1x1(randomize_norms):
    block = randomize_norms(RegNetBottleneck(16, 16, group_width=8, se_ratio=0.25)).eval()
    seen = {}
    for name in ("bn2", "se_layer", "conv3"):
        getattr(block, name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: (args[0].clone(), out.clone())})
        )
    block(torch.randn(2, 16, 8, 8))
    activated = seen["bn2"][1].relu()
    assert torch.equal(seen["se_layer"][0], activated)
    assert torch.equal(seen["se_layer"][1], seen["conv3"][0])
    layer = block.se_layer
    gates = layer.conv2.conv(layer.conv1.conv(activated.mean((2, 3), keepdim=True)).relu()).sigmoid()
    torch.testing.assert_close(seen["se_layer"][1], activated * gates)


def test_se_ratio_overrides_what_the_arch_says():
    assert shapes(RegNet(TINY, se_ratio=0.25)) == shapes(RegNet(TINY_Y))
    assert shapes(RegNet(TINY_Y, se_ratio=0)) == shapes(RegNet(TINY))
    halves = RegNet(TINY_Y, se_ratio=0.5)
    assert [block.se_layer.conv1.conv.out_channels for block in blocks(halves)] == [n // 2 for n in inputs_of(halves)]
    assert RegNet(TINY, se_ratio=0.01).layer1[0].se_layer.conv1.conv.out_channels == 1


def test_plugins_stand_behind_se(gate):
    net = RegNet(TINY_Y, plugins=[gate("after_conv2"), gate("after_conv3", "_late")])
    for block in blocks(net):
        assert block.after_conv2_plugin_names == ["se_layer", "gate"]
        assert block.after_conv3_plugin_names == ["gate_late"]


def test_a_second_se_layer_needs_a_postfix():
    plugin = {"cfg": {"type": "SELayer", "ratio": 2}, "position": "after_conv2"}
    assert RegNet(TINY, plugins=[plugin]).layer1[0].after_conv2_plugin_names == ["se_layer"]
    with pytest.raises(ValueError, match="duplicate plugin 'se_layer'"):
        RegNet(TINY_Y, plugins=[plugin])
    plugin["cfg"]["postfix"] = 2
    assert RegNet(TINY_Y, plugins=[plugin]).layer1[0].after_conv2_plugin_names == ["se_layer", "se_layer2"]


def test_compilers_follow_se(randomize_norms, images):
    net = randomize_norms(RegNet(TINY_Y)).eval()
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    torch.compiler.reset()
    with torch.no_grad():
        outs = net(images)
        for same in (
            torch.fx.symbolic_trace(net),
            torch.export.export(net, (images,), dynamic_shapes=(dynamic,)).module(),
            torch.compile(net, fullgraph=True, backend="aot_eager"),
        ):
            assert all(torch.equal(*maps) for maps in zip(same(images), outs, strict=True))


# Defects of mmdet's RegNet


def fail_while_building(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("in the middle of a stage")

    monkeypatch.setattr("resbackbone.backbones.resnet.ResLayer", fail)


@pytest.mark.parametrize("how", ["built", "refused", "failed"])
def test_defect_07_other_bottlenecks_keep_their_expansion(monkeypatch, how):
    """In mmdet, regnet.py:167 sets ``Bottleneck.expansion = 1``; after an exception, every later ResNeXt is broken.

    Here, no class is modified, whether building succeeds, is refused or fails in the middle.
    """
    if how == "built":
        RegNet(TINY)
    elif how == "refused":
        with pytest.raises(ValueError, match="stages"):
            RegNet({**TINY, "depth": 20})
    else:
        with monkeypatch.context() as patch:
            fail_while_building(patch)
            with pytest.raises(RuntimeError, match="in the middle"):
                RegNet(TINY)
    assert (Bottleneck.expansion, RegNetBottleneck.expansion) == (4, 1)
    net = ResNeXt(50, groups=4, base_width=4, base_channels=8)
    assert net.out_channels == (32, 64, 128, 256)
    assert [out.shape[1] for out in net(torch.randn(2, 3, 32, 32))] == [32, 64, 128, 256]


@pytest.mark.parametrize("frozen_stages", [0, 2])
def test_defect_07_a_deep_stem_can_be_frozen(images, frozen_stages):
    """In mmdet, regnet.py ignores ``deep_stem``, and with ``frozen_stages`` fails because ``stem`` is missing.

    Here, the deep stem is built and can be frozen.
    """
    net = RegNet(TINY, deep_stem=True, frozen_stages=frozen_stages, norm_eval=False).train()
    assert [conv.out_channels for conv in net.stem if isinstance(conv, nn.Conv2d)] == [16, 16, 32]
    assert not hasattr(net, "conv1")
    assert net.out_strides == (4, 8, 16, 32)
    assert [out.shape[1:] for out in net(images)] == [(8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
    frozen = [net.stem, *(getattr(net, name) for name in net.res_layers[:frozen_stages])]
    assert not any(module.training for root in frozen for module in root.modules())
    of_frozen = {parameter for root in frozen for parameter in root.parameters()}
    assert {parameter for parameter in net.parameters() if not parameter.requires_grad} == of_frozen


def test_the_3x3_has_the_width_that_its_groups_add_up_to():
    """In mmdet, resnext.py:32 computes the width in floats: 7 * 49 channels of 8 * 49; and all, of one group."""
    assert int(392 * (8 / 392)) == 7
    block = RegNetBottleneck(8, 392, group_width=8, downsample=nn.Conv2d(8, 392, 1))
    assert (block.conv2.out_channels, block.conv2.groups) == (392, 49)
    block = RegNetBottleneck(16, 16, group_width=8, bot_mul=0.5)
    assert (block.conv2.out_channels, block.conv2.groups) == (8, 1)


# ResNet's options in it


@pytest.mark.parametrize(("style", "strides"), [("pytorch", (1, 2)), ("caffe", (2, 1))])
def test_style_places_the_stride(style, strides):
    net = RegNet(TINY, style=style)
    for name in net.res_layers:
        layer = getattr(net, name)
        assert (layer[0].conv1.stride[0], layer[0].conv2.stride[0]) == strides
        assert layer[0].downsample[0].stride == (2, 2)


def test_avg_down_pools_the_shortcut(images):
    net = RegNet(TINY, avg_down=True)
    assert [type(module) for module in net.layer1[0].downsample] == [nn.AvgPool2d, nn.Conv2d, nn.BatchNorm2d]
    assert [out.shape[-1] for out in net(images)] == [16, 8, 4, 2]


def test_dilation(images):
    dilated = {"strides": (2, 2, 1, 1), "dilations": (1, 1, 2, 4)}
    net = RegNet(TINY_Y, **dilated)
    assert net.out_strides == (4, 8, 8, 8)
    assert [out.shape[-1] for out in net(images)] == [16, 8, 8, 8]
    assert [block.conv2.dilation[0] for block in blocks(net)] == [1, 1, 2, 2, 4, 4, 4]
    net = RegNet(TINY, **dilated, contract_dilation=True, multi_grid=(1, 2, 3))
    assert [block.conv2.dilation[0] for block in blocks(net)] == [1, 1, 1, 2, 1, 2, 3]


def test_dcn_takes_the_place_of_the_3x3(images):
    dcn = {"type": "DCNv2", "deform_groups": 1, "fallback_on_stride": True, "backend": "torch"}
    before = copy.deepcopy(dcn)
    net = RegNet(TINY_Y, dcn=dcn, stage_with_dcn=(False, False, True, True))
    deformable = [isinstance(block.conv2, DeformConv2d) for block in blocks(net)]
    assert deformable == [False, False, False, True, False, True, True]
    assert [block.conv2.groups for block in blocks(net)] == [2, 4, 8, 8, 16, 16, 16]
    assert dcn == before
    _, gradients = step(net, images)
    assert all(gradient is not None for gradient in gradients.values())


def test_plugins_have_the_width_of_their_place(gate, images):
    plugins = [
        {**gate("after_conv1", 1), "stages": (True, False, True, False)},
        gate("after_conv2", 2),
        gate("after_conv3", 3),
        gate("after_conv3", 4),
    ]
    net = RegNet({**TINY, "bot_mul": 2}, plugins=plugins)
    for stage, name in enumerate(net.res_layers):
        for block in getattr(net, name):
            planes = net.stage_widths[stage]
            widths = {key: plugin.scale.shape[0] for key, plugin in block.named_children() if key.startswith("gate")}
            expected = {"gate2": 2 * planes, "gate3": planes, "gate4": planes}
            assert widths == (expected | {"gate1": 2 * planes} if stage in (0, 2) else expected)
    _, gradients = step(net, images)
    assert all(gradient.any() for name, gradient in gradients.items() if "gate3" in name or "gate4" in name)


@pytest.mark.parametrize("arch", [TINY, TINY_Y], ids=["X", "Y"])
def test_checkpointing_equals_none(randomize_norms, images, arch):
    nets = [RegNet(arch, with_cp=with_cp, norm_eval=False) for with_cp in (False, True)]
    nets[1].load_state_dict(randomize_norms(nets[0]).state_dict())
    (outs, gradients), (same_outs, same_gradients) = (step(net, images) for net in nets)
    assert all(torch.equal(*pair) for pair in zip(outs, same_outs, strict=True))
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)
    statistics = dict(nets[1].named_buffers())
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in nets[0].named_buffers())


@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 4])
def test_freezing(frozen_stages):
    net = RegNet(TINY_Y, frozen_stages=frozen_stages, norm_eval=False).eval().train()
    frozen = {name.split(".")[0] for name, parameter in net.named_parameters() if not parameter.requires_grad}
    trained = {name.split(".")[0] for name, parameter in net.named_parameters() if parameter.requires_grad}
    names = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    cut = 0 if frozen_stages < 0 else 2 + frozen_stages
    assert (frozen, trained) == (set(names[:cut]), set(names[cut:]))
    for name in names:
        assert getattr(net, name).training is (name in trained)


def test_norm_eval_is_the_default():
    norms = [module for module in RegNet(TINY).train().modules() if isinstance(module, _BatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert all(
        norm.training for norm in RegNet(TINY, norm_eval=False).train().modules() if isinstance(norm, _BatchNorm)
    )


@pytest.mark.parametrize(
    ("norm_cfg", "norm_class", "name"),
    [
        ({"type": "GN", "num_groups": 4}, nn.GroupNorm, "gn1"),
        ({"type": "SyncBN"}, nn.SyncBatchNorm, "bn1"),
        ({"type": "FrozenBN"}, FrozenBatchNorm2d, "bn1"),
    ],
)
def test_norms(images, norm_cfg, norm_class, name):
    net = RegNet(TINY_Y, norm_cfg=norm_cfg).eval()
    assert type(getattr(net, name)) is type(getattr(net.layer4[0], name)) is norm_class
    assert type(net.layer4[0].downsample[1]) is norm_class
    assert all(out.isfinite().all() for out in net(images))


def test_groups_of_a_norm_need_not_fit_mmdets_base_channels():
    arch = {**TINY, "w0": 24, "wa": 0, "group_w": 8}
    options = {"strides": (2,), "dilations": (1,), "out_indices": (0,)}
    assert RegNet(arch, stem_channels=24, norm_cfg={"type": "GN", "num_groups": 24}, **options).feat_dim == 24


@pytest.mark.parametrize("zero", [True, False])
def test_zero_init_residual(zero):
    net = RegNet(TINY_Y, zero_init_residual=zero)
    net.init_weights()
    for block in blocks(net):
        assert set(block.norm3.weight.tolist()) == {0.0 if zero else 1.0}
        assert set(block.norm1.weight.tolist()) == set(block.norm2.weight.tolist()) == {1.0}


def test_drop_path_grows_with_depth(images):
    net = RegNet(TINY, drop_path_rate=0.6)
    rates = [block.drop_path.drop_prob if block.drop_path else 0.0 for block in blocks(net)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert any(isinstance(module, DropPath) for module in net.modules())
    assert all(out.isfinite().all() for out in net.train()(images))


def test_images_of_other_channels():
    assert len(RegNet(TINY, in_channels=4)(torch.randn(2, 4, 64, 64))) == 4
