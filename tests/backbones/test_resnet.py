"""ResNet and its namesakes V1b, V1c, V1d: maps, stems, shortcuts, norms and plugins, by argument."""

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import batch_norms
from torch import nn

from resbackbone import FeatureInfo, ResNet, ResNetV1b, ResNetV1c, ResNetV1d, ResNeXt, WideResNet
from resbackbone.backbones import ResLayer
from resbackbone.blocks import BasicBlock, Bottleneck
from resbackbone.layers import DropPath, FrozenBatchNorm2d

TINY = {"base_channels": 8}
GROUPED = {"groups": 4, "base_width": 4}


def conv_attributes(layer, name):
    return [[getattr(block, conv).__dict__[name][0] for conv in ("conv1", "conv2", "conv3")] for block in layer]


# Feature maps


@pytest.mark.parametrize(
    ("depth", "blocks", "channels"),
    [
        (18, (2, 2, 2, 2), (64, 128, 256, 512)),
        (26, (2, 2, 2, 2), (256, 512, 1024, 2048)),
        (34, (3, 4, 6, 3), (64, 128, 256, 512)),
        (50, (3, 4, 6, 3), (256, 512, 1024, 2048)),
        (101, (3, 4, 23, 3), (256, 512, 1024, 2048)),
        (152, (3, 8, 36, 3), (256, 512, 1024, 2048)),
        (200, (3, 24, 36, 3), (256, 512, 1024, 2048)),
        (269, (3, 30, 48, 8), (256, 512, 1024, 2048)),
    ],
)
def test_each_depth_has_its_blocks_and_shapes(depth, blocks, channels):
    with torch.device("meta"):
        net = ResNet(depth)
        outs = net(torch.empty(2, 3, 224, 224))
    assert net.stage_blocks == blocks == tuple(len(getattr(net, name)) for name in net.res_layers)
    sizes = (56, 28, 14, 7)
    assert [tuple(out.shape) for out in outs] == [(2, c, s, s) for c, s in zip(channels, sizes, strict=True)]
    assert net.feature_info == tuple(
        FeatureInfo(f"layer{i + 1}", i, c, s) for i, (c, s) in enumerate(zip(channels, (4, 8, 16, 32), strict=True))
    )


@pytest.mark.parametrize(
    ("out_indices", "stages"),
    [
        ((0, 1, 2, 3), (0, 1, 2, 3)),
        ((3,), (3,)),
        ([1, 3], (1, 3)),
        ((3, 0, 2), (0, 2, 3)),
        ((-1,), (3,)),
        ((-1, 0), (0, 3)),
        ((-4, -2), (0, 2)),
    ],
)
def test_out_indices_pick_stages_in_ascending_order(randomize_norms, images, out_indices, stages):
    whole = randomize_norms(ResNet(18, **TINY)).eval()
    net = ResNet(18, out_indices=out_indices, **TINY).eval()
    net.load_state_dict(whole.state_dict())
    outs, expected = net(images), whole(images)
    assert net.out_indices == stages
    assert isinstance(outs, tuple)
    assert len(outs) == len(stages)
    assert all(torch.equal(out, expected[stage]) for out, stage in zip(outs, stages, strict=True))
    assert net.feature_info == tuple(whole.feature_info[stage] for stage in stages)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_fewer_stages(images, num_stages):
    net = ResNet(
        18,
        num_stages=num_stages,
        strides=(1, 2, 2)[:num_stages],
        dilations=(1,) * num_stages,
        out_indices=(-1,),
        **TINY,
    )
    (out,) = net(images)
    assert not hasattr(net, f"layer{num_stages + 1}")
    assert net.res_layers == ["layer1", "layer2", "layer3"][:num_stages]
    assert net.feat_dim == net.out_channels[0] == out.shape[1] == 8 * 2 ** (num_stages - 1)
    assert net.out_strides[0] == 64 // out.shape[2] == 2 ** (num_stages + 1)


@pytest.mark.parametrize("in_channels", [1, 4])
def test_in_channels(in_channels):
    net = ResNet(18, in_channels=in_channels, **TINY)
    assert net.conv1.in_channels == in_channels
    assert len(net(torch.randn(2, in_channels, 64, 64))) == 4


def test_strides_and_dilations_reach_the_convolutions(images):
    net = ResNet(50, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), **TINY)
    assert net.out_strides == (4, 8, 8, 8)
    assert [64 // out.shape[2] for out in net(images)] == [4, 8, 8, 8]
    for name, dilation in zip(net.res_layers, net.dilations, strict=True):
        layer = getattr(net, name)
        assert conv_attributes(layer, "dilation") == [[1, dilation, 1]] * len(layer)
        assert conv_attributes(layer, "padding") == [[0, dilation, 0]] * len(layer)
    assert [getattr(net, name)[0].conv2.stride for name in net.res_layers] == [(1, 1), (2, 2), (1, 1), (1, 1)]


def test_a_basic_block_dilates_its_first_convolution_only():
    net = ResNet(18, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), **TINY)
    assert [(block.conv1.dilation, block.conv2.dilation) for block in net.layer4] == [((2, 2), (1, 1))] * 2


def test_unusual_strides_are_reported(images):
    net = ResNet(18, strides=(2, 1, 3, 2), **TINY)
    assert net.out_strides == (8, 8, 24, 48)
    assert [out.shape[2] for out in net(images)] == [8, 8, 3, 2]


def test_multi_grid_sets_the_last_stage_alone():
    net = ResNet(50, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), multi_grid=(1, 2, 4), **TINY)
    assert [block.conv2.dilation[0] for block in net.layer4] == [1, 2, 4]
    assert [block.conv2.dilation[0] for block in net.layer3] == [2] * 6


def test_multi_grid_follows_num_stages():
    net = ResNet(18, num_stages=2, strides=(1, 1), dilations=(1, 1), out_indices=(1,), multi_grid=(2, 3), **TINY)
    assert [block.conv1.dilation[0] for block in net.layer2] == [2, 3]
    assert [block.conv1.dilation[0] for block in net.layer1] == [1, 1]


def test_contract_dilation_halves_the_first_block_of_each_dilated_stage():
    net = ResNet(50, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True, **TINY)
    dilations = [[block.conv2.dilation[0] for block in getattr(net, name)] for name in net.res_layers]
    assert dilations == [[1] * 3, [1] * 4, [1, 2, 2, 2, 2, 2], [2, 4, 4]]


@pytest.mark.parametrize(("style", "strides"), [("pytorch", (1, 2)), ("caffe", (2, 1))])
def test_style_places_the_stride(style, strides):
    net = ResNet(50, style=style, **TINY)
    for layer in (net.layer2, net.layer3, net.layer4):
        assert (layer[0].conv1.stride[0], layer[0].conv2.stride[0]) == strides
        assert (layer[0].conv1_stride, layer[0].conv2_stride) == strides
        assert (layer[1].conv1.stride, layer[1].conv2.stride) == ((1, 1), (1, 1))
        assert layer[0].downsample[0].stride == (2, 2)


# Stems and shortcuts


def test_stem_channels_follow_base_channels_unless_given():
    assert ResNet(18, base_channels=16).conv1.out_channels == 16
    assert ResNetV1c(18, base_channels=16).stem[6].out_channels == 16
    net = ResNet(18, base_channels=16, stem_channels=24)
    assert (net.stem_channels, net.conv1.out_channels, net.norm1.num_features) == (24, 24, 24)
    assert net.layer1[0].conv1.in_channels == net.layer1[0].downsample[0].in_channels == 24
    assert net.out_channels == (16, 32, 64, 128)


def test_plain_stem():
    net = ResNet(18)
    assert (net.conv1.kernel_size, net.conv1.stride, net.conv1.padding) == ((7, 7), (2, 2), (3, 3))
    assert net.conv1.bias is None
    assert (net.maxpool.kernel_size, net.maxpool.stride, net.maxpool.padding) == (3, 2, 1)
    assert (net.norm1_name, net.norm1) == ("bn1", net.bn1)
    assert not hasattr(net, "stem")


@pytest.mark.parametrize("net_class", [ResNetV1c, ResNetV1d])
@pytest.mark.parametrize("stem_channels", [None, 32])
def test_deep_stem_has_three_convolutions_two_at_half_width(images, net_class, stem_channels):
    net = net_class(50, stem_channels=stem_channels)
    full = stem_channels or 64
    assert [type(module) for module in net.stem] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 3
    convs = [net.stem[index] for index in (0, 3, 6)]
    assert [conv.out_channels for conv in convs] == [full // 2, full // 2, full]
    assert [conv.stride[0] for conv in convs] == [2, 1, 1]
    assert {(conv.kernel_size, conv.padding, conv.bias) for conv in convs} == {((3, 3), (1, 1), None)}
    assert not hasattr(net, "conv1")
    assert net.eval()(images)[0].shape == (2, 256, 16, 16)


def test_only_v1d_pools_in_its_shortcuts():
    assert [type(module) for module in ResNetV1c(50, **TINY).layer2[0].downsample] == [nn.Conv2d, nn.BatchNorm2d]
    net = ResNetV1d(50, **TINY)
    for name, stride in zip(net.res_layers, (1, 2, 2, 2), strict=True):
        pool, conv, norm = getattr(net, name)[0].downsample
        assert (pool.kernel_size, pool.stride, pool.ceil_mode, pool.count_include_pad) == (stride, stride, True, False)
        assert (conv.kernel_size, conv.stride) == ((1, 1), (1, 1))
        assert isinstance(norm, nn.BatchNorm2d)


def test_namesakes_are_resnets_with_other_defaults(randomize_norms, images):
    pairs = [
        (ResNetV1b, {}),
        (ResNetV1c, {"deep_stem": True}),
        (ResNetV1d, {"deep_stem": True, "avg_down": True}),
    ]
    for net_class, options in pairs:
        net, same = net_class(50, **TINY), randomize_norms(ResNet(50, **options, **TINY))
        net.load_state_dict(same.state_dict())
        assert all(torch.equal(*pair) for pair in zip(net.eval()(images), same.eval()(images), strict=True))
        assert isinstance(net, ResNet)
    assert ResNetV1d(18, avg_down=False, deep_stem=False, **TINY).layer2[0].downsample[0].stride == (2, 2)


def test_widening_factor():
    net = WideResNet(50, widening_factor=3, **TINY)
    assert [layer[0].conv2.out_channels for layer in (net.layer1, net.layer4)] == [24, 192]
    assert net.out_channels == (32, 64, 128, 256)


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"groups": 32, "base_width": 4}, [128, 256, 512, 1024]),
        ({"groups": 64, "base_width": 4}, [256, 512, 1024, 2048]),
    ],
)
def test_resnext_groups_and_widths(options, widths):
    with torch.device("meta"):
        net = ResNeXt(50, **options)
    convs = [getattr(net, name)[-1].conv2 for name in net.res_layers]
    assert [conv.groups for conv in convs] == [options["groups"]] * 4
    assert [conv.out_channels for conv in convs] == widths
    assert net.out_channels == (256, 512, 1024, 2048)


def test_resnext_of_one_group_is_a_resnet():
    net, plain = ResNeXt(50, **TINY), ResNet(50, **TINY)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


# Norms


@pytest.mark.parametrize(
    ("norm_cfg", "norm_class", "name"),
    [
        ({"type": "BN"}, nn.BatchNorm2d, "bn"),
        ({"type": "SyncBN", "requires_grad": True}, nn.SyncBatchNorm, "bn"),
        ({"type": "GN", "num_groups": 4}, nn.GroupNorm, "gn"),
        ({"type": "IN"}, nn.InstanceNorm2d, "in"),
        ({"type": "FrozenBN"}, FrozenBatchNorm2d, "bn"),
    ],
)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_each_norm_takes_its_place_and_name(norm_cfg, norm_class, name, mode):
    net = ResNet(50, norm_cfg=norm_cfg, norm_eval=False, **TINY).train(mode)
    assert net.norm1_name == f"{name}1"
    assert type(net.norm1) is norm_class
    block = net.layer1[0]
    assert [type(block.get_submodule(f"{name}{index}")) for index in (1, 2, 3)] == [norm_class] * 3
    assert [block.norm1, block.norm2, block.norm3] == [block.get_submodule(f"{name}{index}") for index in (1, 2, 3)]
    assert type(block.downsample[1]) is norm_class
    others = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.InstanceNorm2d, FrozenBatchNorm2d)
    found = {type(module) for module in net.modules()} & set(others)
    assert found == {norm_class}
    assert all(out.isfinite().all() for out in net(torch.randn(2, 3, 64, 64)))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_sync_batch_norm_alone_on_a_cpu_is_batch_norm(randomize_norms, images, mode):
    plain = randomize_norms(ResNet(18, norm_eval=False, **TINY)).train(mode)
    net = ResNet(18, norm_cfg={"type": "SyncBN"}, norm_eval=False, **TINY).train(mode)
    net.load_state_dict(plain.state_dict())
    assert all(torch.equal(*pair) for pair in zip(net(images), plain(images), strict=True))
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in net.state_dict().items())


def test_frozen_batch_norm_is_batch_norm_in_eval_mode_and_never_moves(randomize_norms, images):
    plain = randomize_norms(ResNet(50, **TINY)).eval()
    net = ResNet(50, norm_cfg={"type": "FrozenBN"}, norm_eval=False, **TINY)
    net.load_state_dict(plain.state_dict())  # strictly; the counters of BN are passed over
    before = copy.deepcopy(net.state_dict())
    outs = net.train()(images)
    assert all(torch.equal(*pair) for pair in zip(outs, plain(images), strict=True))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert {key.split(".")[-2][:4] for key, _ in net.named_parameters()} <= {"conv", "0"}


def test_a_registered_norm_is_found_by_name_or_class(registry, images):
    @registry.register_module()
    class CalmNorm(nn.BatchNorm2d):
        _abbr_ = "calm"

    for type_ in ("CalmNorm", CalmNorm):
        net = ResNet(18, norm_cfg={"type": type_, "eps": 1e-3}, **TINY)
        assert net.norm1_name == "calm1"
        assert type(net.layer4[1].calm2) is CalmNorm
        assert net.calm1.eps == 1e-3
        assert not net.train().calm1.training  # a batch norm, for norm_eval too
        assert len(net(images)) == 4


def test_norms_without_requires_grad_do_not_train():
    net = ResNet(18, norm_cfg={"type": "BN", "requires_grad": False}, **TINY)
    assert not any(parameter.requires_grad for bn in batch_norms(net) for parameter in bn.parameters())
    assert net.conv1.weight.requires_grad
    assert {bn.eps for bn in batch_norms(net)} == {1e-5}


# Drop path


@pytest.mark.parametrize("depth", [18, 50])
def test_drop_path_grows_linearly_over_the_blocks(depth):
    net = ResNet(depth, drop_path_rate=0.3, **TINY)
    blocks = [block for name in net.res_layers for block in getattr(net, name)]
    rates = [block.drop_path.drop_prob if block.drop_path else 0.0 for block in blocks]
    assert rates == pytest.approx([0.3 * index / (len(blocks) - 1) for index in range(len(blocks))])
    assert rates[-1] == pytest.approx(0.3)


def test_drop_path_drops_whole_samples_in_training_only(randomize_norms):
    net = randomize_norms(ResNet(18, drop_path_rate=0.9, **TINY))
    x = torch.randn(1, 3, 64, 64).expand(64, -1, -1, -1)
    last = net.train()(x)[-1]
    assert len({tuple(sample.flatten().tolist()) for sample in last}) > 1
    same = randomize_norms(ResNet(18, **TINY))
    same.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(x)[-1], same.eval()(x)[-1])


def test_drop_path_keeps_the_mean():
    kept = DropPath(0.25).train()(torch.ones(20000, 1, 1, 1))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.02)


# Plugins and deformable convolution


def test_plugins_go_to_their_stages_at_the_width_they_follow(images, gate):
    plugins = [
        {"cfg": gate, "stages": (False, True, True, False), "position": "after_conv2"},
        {"cfg": {**gate, "postfix": "_end"}, "position": "after_conv3"},
    ]
    net = ResNet(50, plugins=plugins, **TINY)
    for index, name in enumerate(net.res_layers):
        for block in getattr(net, name):
            assert hasattr(block, "gate") is (index in (1, 2))
            assert block.gate_end.in_channels == 32 * 2**index
            if index in (1, 2):
                assert block.gate.in_channels == 8 * 2**index
    assert len(net(images)) == 4


def test_make_stage_plugins_picks_by_stage():
    plugins = [
        {"cfg": {"type": "A"}, "stages": (False, True, True, True), "position": "after_conv2"},
        {"cfg": {"type": "B"}, "position": "after_conv3"},
    ]
    net = ResNet(18, **TINY)
    assert [plugin["cfg"]["type"] for plugin in net.make_stage_plugins(plugins, 0)] == ["B"]
    picked = net.make_stage_plugins(plugins, 1)
    assert picked == [
        {"cfg": {"type": "A"}, "position": "after_conv2"},
        {"cfg": {"type": "B"}, "position": "after_conv3"},
    ]
    assert "stages" in plugins[0]


@pytest.mark.parametrize("net_class", [ResNet, ResNeXt])
def test_mmcv_plugins(images, net_class):
    pytest.importorskip("mmcv.cnn")
    attention = {"type": "GeneralizedAttention", "spatial_range": -1, "num_heads": 4, "attention_type": "0010"}
    plugins = [
        {"cfg": {"type": "ContextBlock", "ratio": 1 / 4}, "position": "after_conv3"},
        {"cfg": {"type": "NonLocal2d"}, "stages": (False, False, False, True), "position": "after_conv2"},
        {"cfg": {**attention, "kv_stride": 2}, "stages": (False, True, False, False), "position": "after_conv2"},
    ]
    net = net_class(50, plugins=plugins, **(GROUPED if net_class is ResNeXt else {}), **TINY)
    block = net.layer2[0]
    assert block.context_block.in_channels == 64
    assert block.gen_attention_block.in_channels == block.conv2.out_channels
    assert net.layer4[0].nonlocal_block.in_channels == net.layer4[0].conv2.out_channels
    assert not hasattr(net.layer3[0], "nonlocal_block")
    assert all(out.isfinite().all() for out in net(images))


@pytest.mark.parametrize(
    ("net_class", "options"), [(ResNet, {"depth": 18}), (ResNet, {"depth": 50}), (ResNeXt, {"depth": 50})]
)
def test_deformable_stages(images, net_class, options):
    dcn = {"type": "DCNv2", "deform_groups": 1}
    net = net_class(dcn=dcn, stage_with_dcn=(False, True, False, True), **options, **TINY)
    for name, deformable in zip(net.res_layers, net.stage_with_dcn, strict=True):
        for block in getattr(net, name):
            assert hasattr(block.conv2, "conv_offset") is deformable
            assert type(block.conv1) is nn.Conv2d
            assert block.with_dcn is deformable
    assert net.dcn == dcn
    assert {"layer2.0.conv2.weight", "layer2.0.conv2.conv_offset.weight"} <= set(net.state_dict())
    assert all(out.isfinite().all() for out in net(images))


def test_conv_cfg_reaches_every_convolution(registry):
    @registry.register_module()
    class MyConv(nn.Conv2d):
        pass

    net = ResNetV1d(50, conv_cfg={"type": "MyConv"}, **TINY)
    assert {type(module) for module in net.modules() if isinstance(module, nn.Conv2d)} == {MyConv}


def test_deformable_convolution_in_no_stage_warns():
    with pytest.warns(UserWarning, match="`dcn` has no effect, as `stage_with_dcn` is False for every stage"):
        ResNet(18, base_channels=8, dcn={"type": "DCN"})


# What a backbone is as an object


def test_attributes_of_the_openmmlab_surface():
    net = ResNet(50, **TINY)
    assert net.arch_settings is ResNet.arch_settings
    assert set(net.arch_settings) == {18, 34, 50, 101, 152} | {26, 200, 269}  # mmdet's and ours
    assert net.block is Bottleneck
    assert ResNet(18, **TINY).block is BasicBlock
    assert net.stage_blocks == (3, 4, 6, 3)
    assert net.res_layers == ["layer1", "layer2", "layer3", "layer4"]
    assert net.feat_dim == 256
    assert net.inplanes == 256
    assert net.norm1 is net.bn1
    assert all(isinstance(getattr(net, name), ResLayer) for name in net.res_layers)
    assert (net.depth, net.num_stages, net.strides, net.dilations) == (50, 4, (1, 2, 2, 2), (1, 1, 1, 1))
    assert (net.out_indices, net.style, net.frozen_stages, net.norm_eval) == ((0, 1, 2, 3), "pytorch", -1, True)


def expected_keys(stem, shortcut):
    """The key list of a ResNet-18, written down from OpenMMLab's layout."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = []
    for conv, bn in stem:
        keys += [f"{conv}.weight", *(f"{bn}.{name}" for name in norm)]
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            prefix = f"layer{layer}.{block}"
            for index in (1, 2):
                keys += [f"{prefix}.conv{index}.weight", *(f"{prefix}.bn{index}.{name}" for name in norm)]
            if block == 0 and layer > 1:
                keys += [f"{prefix}.downsample.{shortcut}.weight"]
                keys += [f"{prefix}.downsample.{shortcut + 1}.{name}" for name in norm]
    return keys


@pytest.mark.parametrize(
    ("net_class", "stem", "shortcut"),
    [
        (ResNet, [("conv1", "bn1")], 0),
        (ResNetV1c, [("stem.0", "stem.1"), ("stem.3", "stem.4"), ("stem.6", "stem.7")], 0),
        (ResNetV1d, [("stem.0", "stem.1"), ("stem.3", "stem.4"), ("stem.6", "stem.7")], 1),
    ],
)
def test_state_dict_keys_are_openmmlabs(net_class, stem, shortcut):
    assert list(net_class(18, **TINY).state_dict()) == expected_keys(stem, shortcut)


@pytest.mark.parametrize("with_cp", [False, True])
def test_pickle_and_deepcopy_give_an_equal_and_separate_net(randomize_norms, images, with_cp):
    net = randomize_norms(ResNetV1d(18, frozen_stages=1, with_cp=with_cp, norm_eval=False, **TINY))
    expected = net.eval()(images)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(torch.equal(*pair) for pair in zip(twin(images), expected, strict=True))
        assert twin.feature_info == net.feature_info
        twin.train()
        assert not twin.stem[1].training
        assert twin.layer2[0].bn1.training
        twin.layer2[0].bn1.weight.data.zero_()
        assert float(net.layer2[0].bn1.weight.detach().abs().min()) > 0
    with pytest.raises(ValueError, match="takes images of shape"):  # the check of the images travels along
        copy.deepcopy(net)(torch.zeros(1, 1, 64, 64))


def test_building_and_initializing_leave_the_callers_config_alone(gate):
    arguments = {
        "depth": 50,
        "norm_cfg": {"type": "GN", "num_groups": 4, "requires_grad": True},
        "dcn": {"type": "DCN", "deform_groups": 1, "fallback_on_stride": True},
        "stage_with_dcn": [False, True, True, True],
        "plugins": [{"cfg": {**gate, "postfix": 1}, "stages": [True] * 4, "position": "after_conv2"}],
        "init_cfg": [{"type": "Kaiming", "layer": ["Conv2d"]}],
        "strides": [1, 2, 2, 2],
        "out_indices": [3, 1],
    }
    before = copy.deepcopy(arguments)
    net = ResNet(**arguments, **TINY)
    net.init_weights()
    net.train()
    assert arguments == before
    second = ResNet(**arguments, **TINY)  # and it builds the same a second time
    assert list(second.state_dict()) == list(net.state_dict())


def test_a_net_keeps_no_reference_to_the_callers_config(gate):
    given: dict[str, Any] = {
        "norm_cfg": {"type": "BN"},
        "multi_grid": [1, 2, 4],
        "init_cfg": [{"type": "Constant", "val": 0.5, "layer": "Conv2d"}],
        "plugins": [{"cfg": {**gate}, "position": "after_conv1"}],
        "dcn": {"type": "DCN"},
    }
    before = copy.deepcopy(given)
    net = ResNet(50, stage_with_dcn=(True,) * 4, **given, **TINY)
    given["init_cfg"][0]["val"] = 0.0
    given["plugins"][0]["cfg"].clear()
    for config in given.values():
        config.clear()
    assert {name: getattr(net, name) for name in given} == before | {"multi_grid": net.multi_grid}
    assert list(net.multi_grid) == [1, 2, 4]
    net.init_weights()
    assert net.conv1.weight.eq(0.5).all()


def test_default_configs_are_not_shared_between_nets():
    ResNet(18, **TINY).norm_cfg["type"] = "GN"
    assert ResNet(18, **TINY).norm_cfg == {"type": "BN", "requires_grad": True}
