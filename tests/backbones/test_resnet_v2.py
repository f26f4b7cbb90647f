"""ResNet v2 and BiT: pre-activation, weight standardization, what is refused. test_timm.py compares numbers, too."""

import warnings

import pytest
import torch
from torch import nn

from resbackbone import ResNetV2, build_backbone, list_backbones
from resbackbone.blocks import PreActBasicBlock, PreActBottleneck
from resbackbone.layers import ConvWS2d, DeformConv2d, FrozenBatchNorm2d, StdConv2d

BIT = {
    "zero_padded_pool": True,
    "norm_cfg": {"type": "GN", "num_groups": 4},
    "conv_cfg": {"type": "StdConv2d", "eps": 1e-8},
}
NETS = {"basic": {"depth": 18}, "deep": {"depth": 50, "deep_stem": True, "avg_down": True}, "bit": {"depth": 50, **BIT}}
every_net = pytest.mark.parametrize("net", NETS)


def build(net, **options):
    return ResNetV2(**{"base_channels": 8, "norm_eval": False, **NETS[net], **options})


# Weight standardization


@pytest.mark.parametrize("shape", [(8, 4, 1), (4, 6, 3), (6, 2, 7)])
def test_filters_have_mean_zero_and_variance_one(shape):
    out_channels, in_channels, side = shape
    layer = StdConv2d(in_channels, out_channels, side, bias=False, eps=1e-3).double()
    weight = layer.weight
    n = in_channels * side * side
    mean = weight.sum((1, 2, 3), keepdim=True) / n
    variance = ((weight - mean) ** 2).sum((1, 2, 3), keepdim=True) / n
    expected = (weight - mean) / (variance + 1e-3).sqrt()
    torch.testing.assert_close(layer.standardized_weight(), expected, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, in_channels, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, expected))


def test_it_differs_from_mmcvs_by_what_its_docstring_says():
    layer = StdConv2d(4, 8, 3, eps=0.0)
    other = ConvWS2d(4, 8, 3, eps=0.0)
    other.load_state_dict(layer.state_dict())
    ratio = layer.standardized_weight() / other.standardized_weight()
    torch.testing.assert_close(ratio, torch.full_like(ratio, (36 / 35) ** 0.5))


def test_jit_traces_it():
    layer = StdConv2d(4, 8, 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # its users know; a TracerWarning is ours
        traced = torch.jit.trace(layer, torch.randn(1, 4, 8, 8))
    x = torch.randn(2, 4, 9, 7)
    assert torch.equal(traced(x), layer(x))


@pytest.mark.parametrize("eps", [1e-6, 1e-8])
def test_it_is_timms_to_the_bit(timm, eps):
    ours = StdConv2d(16, 32, 3, stride=2, padding=1, groups=4, bias=False, eps=eps)
    theirs = timm.layers.StdConv2d(16, 32, 3, stride=2, groups=4, eps=eps)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 9, 9)
    assert torch.equal(ours(x), theirs(x))
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


def test_the_config_hands_eps_to_every_convolution():
    net = build_backbone("resnetv2_50x1_bit", base_channels=32, stem_channels=32)
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert {type(conv) for conv in convs} == {StdConv2d}
    assert {conv.eps for conv in convs} == {1e-8}
    assert {norm.num_groups for norm in net.modules() if isinstance(norm, nn.GroupNorm)} == {32}


# Structure


@pytest.mark.parametrize("block_class", [PreActBasicBlock, PreActBottleneck])
def test_norm_and_relu_come_before_each_convolution(randomize_norms, block_class):
    channels = 8 * block_class.expansion
    block = randomize_norms(block_class(channels, 8)).eval()
    x = torch.randn(2, channels, 6, 6)
    before = x.clone()
    out = x
    for index in range(1, block.num_convs + 1):
        out = getattr(block, f"conv{index}")(getattr(block, f"bn{index}")(out).relu())
    torch.testing.assert_close(block(x), x + out)
    block.downsample = nn.Conv2d(channels, channels, 1)
    torch.testing.assert_close(block(x), block.downsample(block.bn1(x).relu()) + out)
    assert torch.equal(x, before)
    assert block(x).min() < 0


@every_net
def test_stem_and_shortcuts_have_no_norm(net):
    built = build(net)
    norms = (nn.BatchNorm2d, nn.GroupNorm)
    if built.deep_stem:
        assert [type(layer) for layer in built.stem][-1] is nn.Conv2d
        assert sum(isinstance(layer, norms) for layer in built.stem) == 2
    else:
        assert not any(isinstance(layer, (*norms, nn.ReLU)) for layer in (built.norm1, built.relu))
    for name in built.res_layers:
        shortcut = getattr(built, name)[0].downsample
        assert shortcut is None or not any(isinstance(layer, norms) for layer in shortcut)
    assert built.out_strides == (4, 8, 16, 32)


@pytest.mark.parametrize("padded", [False, True])
def test_the_pooling_sees_zeros_only_where_asked(padded):
    net = ResNetV2(18, zero_padded_pool=padded)
    pooled = net.maxpool(torch.full((1, 64, 9, 8), -1.0))
    assert pooled.shape[2:] == (5, 4)
    assert torch.equal(pooled[0, 0, 0], torch.full((4,), 0.0 if padded else -1.0))
    assert torch.equal(pooled[0, 0, 2, 1:3], torch.full((2,), -1.0))


def test_the_last_norm_is_there_where_asked(randomize_norms, images):
    net = randomize_norms(build("basic", final_norm=True)).eval()
    plain = build("basic").eval()
    keys = plain.load_state_dict(net.state_dict(), strict=False)
    assert {key.split(".")[0] for key in keys.unexpected_keys} == {"bn"}
    outs, sums = net(images), plain(images)
    assert all(torch.equal(*pair) for pair in zip(outs[:-1], sums[:-1], strict=True))
    assert torch.equal(outs[-1], net.bn(sums[-1]).relu())
    assert outs[-1].min() == 0
    assert all(out.min() < 0 for out in sums)
    assert type(build("bit", final_norm=True).gn) is nn.GroupNorm


def test_a_block_starts_as_the_identity_where_asked():
    for net in ("basic", "deep"):
        built = build(net, zero_init_residual=True)
        built.init_weights()
        block = built.layer2[1].eval()
        x = torch.randn(1, block.inplanes, 4, 4)
        assert torch.equal(block(x), x)
        assert block.bn2.weight.min() == 1
        built = build(net)
        built.init_weights()
        assert not torch.equal(built.layer2[1].eval()(x), x)


# Options


@pytest.mark.parametrize("net", ["basic", "deep"])
def test_dcn_plugins_dilation_and_style_hold(images, net):
    style = {"style": "caffe"} if net == "deep" else {}
    built = build(
        net,
        dcn={"type": "DCNv2", "deform_groups": 1, "backend": "torch"},
        stage_with_dcn=(False, False, True, False),
        plugins=[{"cfg": {"type": "ECALayer", "postfix": index}, "position": f"after_conv{index}"} for index in (1, 2)],
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        **style,
    ).eval()
    assert all(isinstance(block.conv2, DeformConv2d) for block in built.layer3)
    assert (built.layer4[0].conv1 if net == "basic" else built.layer4[0].conv2).dilation == (2, 2)
    if net == "deep":
        assert (built.layer2[0].conv1.stride, built.layer2[0].conv2.stride) == ((2, 2), (1, 1))
    assert [out.shape[-1] for out in built(images)] == [16, 8, 4, 4]
    block = built.layer1[1]
    x = torch.randn(1, block.inplanes, 6, 6)
    out = block.eca_layer1(block.bn2(block.conv1(block.bn1(x).relu())).relu())
    if net == "basic":
        out = block.eca_layer2(block.conv2(out))
    else:
        out = block.conv3(block.eca_layer2(block.bn3(block.conv2(out)).relu()))
    torch.testing.assert_close(block(x), x + out)


@every_net
def test_checkpointing_freezing_and_drop_path_hold(images, net):
    nets = [build(net, frozen_stages=1, drop_path_rate=0.2, with_cp=with_cp).train() for with_cp in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    for twin in nets:
        torch.manual_seed(2)
        sum(out.square().mean() for out in twin(images)).backward()
        assert not any(module.training for module in twin.frozen_modules())
    for (name, parameter), same in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        frozen = name.startswith(("conv1", "stem", "layer1"))
        assert (parameter.grad is None) is frozen, name
        assert frozen or torch.equal(parameter.grad, same.grad), name
    for (name, buffer), same in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
        assert torch.equal(buffer, same), name


@pytest.mark.parametrize(("norm", "kind"), [("SyncBN", nn.SyncBatchNorm), ("FrozenBN", FrozenBatchNorm2d)])
def test_other_norms_are_taken(images, norm, kind):
    net = build("basic", norm_cfg={"type": norm}, final_norm=True).eval()
    assert type(net.bn) is type(net.layer1[0].norm1) is kind
    assert net(images)[0].shape == (2, 8, 16, 16)


def test_tracers_and_compilers_follow_bit(randomize_norms, images):
    one_stage = {"num_stages": 1, "strides": (1,), "dilations": (1,), "out_indices": (0,)}
    net = randomize_norms(build("bit", final_norm=True, **one_stage)).eval()
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    torch.compiler.reset()
    traced = [
        torch.export.export(net, (images,), dynamic_shapes=(dynamic,)).module(),
        torch.compile(net, fullgraph=True, backend="aot_eager"),
        torch.fx.symbolic_trace(net),
    ]
    with torch.no_grad():
        for x in (images, torch.randn(1, 3, 65, 97)):
            for function in traced:
                torch.testing.assert_close(function(x)[0], net(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"final_norm": 1}, TypeError, "`final_norm` must be True or False, got 1"),
        ({"zero_padded_pool": None}, TypeError, "`zero_padded_pool` must be True or False, got None"),
        (
            {"final_norm": True, "out_indices": (0, 1)},
            ValueError,
            "the last stage must be among `out_indices`, got (0, 1)",
        ),
        (
            {**BIT, "zero_init_residual": True},
            ValueError,
            "`zero_init_residual` must be False where `conv_cfg` standard",
        ),
        (
            {"conv_cfg": {"type": "ConvWS"}, "zero_init_residual": True},
            ValueError,
            "`zero_init_residual` must be False",
        ),
        ({"depth": 20}, KeyError, "`depth` of ResNetV2 must be one of 18, 26, 34, 50, 101, 152, 200, 269; got 20"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(refused, options, error, text):
    with refused(error, text):
        build_backbone({"type": "ResNetV2", "depth": 18, **options})


# timm

TIMMS_STEM = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2", "6": "conv3"}


def timms_key(key):
    """How timm's feature extractor calls what we call ``key``."""
    first, *rest = key.split(".")
    if first == "conv1":
        return f"stem_conv.{rest[0]}"
    if first == "stem":
        return f"stem_{TIMMS_STEM[rest[0]]}.{rest[1]}"
    block, layer, *rest = rest
    layer = "downsample.conv" if layer == "downsample" else layer.replace("bn", "norm").replace("gn", "norm")
    return f"stages_{int(first[-1]) - 1}.blocks.{block}.{layer}.{rest[-1]}"


@pytest.mark.parametrize("name", list_backbones("resnetv2_*"))
def test_it_has_as_many_parameters_as_timms(timm, name):
    def count(net):
        return sum(parameter.numel() for parameter in net.parameters())

    with torch.device("meta"):
        assert count(build_backbone(name, final_norm=True)) == count(timm.create_model(name, num_classes=0))


@pytest.mark.parametrize("name", ["resnetv2_18d", "resnetv2_50x1_bit"])
def test_features_are_those_before_the_last_norm(timm, randomize_norms, images, name):
    ours = randomize_norms(build_backbone(name, out_indices=("stem", 0, 1, 2, 3))).eval()
    theirs = timm.create_model(name, features_only=True).eval()
    theirs.load_state_dict({timms_key(key): value for key, value in ours.state_dict().items()})
    with torch.no_grad():
        for feature, reference in zip(ours(images), theirs(images), strict=True):
            assert reference.std() > 0.01
            assert (feature - reference).abs().max() <= 1e-5 * reference.abs().max()
