"""Res2Net: what its blocks compute, where they pool, and that every option of a ResNet holds there too."""

import pytest
import torch
from cases import blocks
from torch import nn

from resbackbone import Res2Net, build_backbone
from resbackbone.backbones import ResLayer
from resbackbone.blocks import BasicBlock, Bottle2neck
from resbackbone.layers import DeformConv2d, DropPath

TINY = {"base_channels": 8, "base_width": 4, "norm_eval": False}  # four splits of 4 channels in layer1


def net(depth=50, **options):
    return Res2Net(depth, **{**TINY, **options})


def watch(block):
    """Run a block on random input; returns what each of its 3x3s saw and gave, and the input of conv3."""
    seen, gave, end = [], [], []
    for conv, norm in zip(block.convs, block.bns, strict=True):
        conv.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        norm.register_forward_hook(lambda _, args, out: gave.append(out.relu()))
    block.conv3.register_forward_pre_hook(lambda _, args: end.append(args[0].clone()))
    middle = []
    block.bn1.register_forward_hook(lambda _, args, out: middle.append(out.relu()))
    with torch.no_grad():
        block.eval()(torch.randn(2, block.inplanes, 7, 9))
    return (
        middle[0].chunk(block.scales, 1),
        seen,
        gave,
        end[0].split([conv.out_channels for conv in block.convs] + [block.split_width], 1),
    )


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_each_split_is_added_to_the_output_before_it(randomize_norms):
    splits, seen, gave, end = watch(randomize_norms(Bottle2neck(32, 8, scales=4, base_width=32)))
    assert_same(seen, [splits[0], splits[1] + gave[0], splits[2] + gave[1]])
    assert_same(end, [*gave, splits[3]])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pool_at_stride_1", [False, True])
def test_splits_of_a_first_block_are_on_their_own(randomize_norms, stride, pool_at_stride_1):
    block = Bottle2neck(
        32,
        8,
        base_width=32,
        stage_type="stage",
        stride=stride,
        pool_at_stride_1=pool_at_stride_1,
        downsample=nn.Conv2d(32, 32, 1, stride=stride),
    )
    splits, seen, gave, end = watch(randomize_norms(block))
    assert_same(seen, splits[:3])
    pools = stride == 2 or pool_at_stride_1
    last = nn.functional.avg_pool2d(splits[3], 3, stride, padding=1) if pools else splits[3]
    assert_same(end, [*gave, last])


def test_a_block_that_strides_is_a_first_block(randomize_norms):
    block = randomize_norms(Bottle2neck(32, 8, stride=2, downsample=nn.Conv2d(32, 32, 1, stride=2)))
    splits, seen, _, _ = watch(block)
    assert_same(seen, splits[:3])


def pools(backbone):
    return [[block.pool and block.pool.stride for block in getattr(backbone, name)] for name in backbone.res_layers]


def test_layer1_pools_on_request():
    later = [[2, None, None, None], [2, None, None, None, None, None], [2, None, None]]
    assert pools(net()) == [[None, None, None], *later]
    assert pools(net(pool_at_stride_1=True)) == [[1, None, None], *later]
    assert pools(net(pool_at_stride_1=True, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)))[3] == [1, None, None]
    assert pools(net(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)))[3] == [None, None, None]


def test_pooling_changes_the_first_stage_and_nothing_else_of_the_net(randomize_norms, images):
    nets = [randomize_norms(net(pool_at_stride_1=pool)).eval() for pool in (False, True)]
    assert list(nets[0].state_dict()) == list(nets[1].state_dict())
    nets[1].load_state_dict(nets[0].state_dict())
    assert not torch.allclose(nets[0](images)[0], nets[1](images)[0])
    nets[1].layer1[0].pool = None
    assert_same(nets[0](images), nets[1](images))


def test_widths_are_the_papers():
    assert [block.split_width for block in (Bottle2neck(64, planes) for planes in (64, 128, 256, 512))] == [
        26, 52, 104, 208,
    ]  # fmt: skip
    block = Bottle2neck(64, 64, scales=8, base_width=14)
    assert (block.conv1.out_channels, len(block.convs), block.conv3.in_channels) == (112, 7, 112)
    assert Bottle2neck(64, 64, base_width=4, groups=8).convs[0].weight.shape == (32, 4, 3, 3)


def test_keys_and_their_order_are_mmdets():
    """An optimizer's state is stored by the order of the parameters, which in mmdet ends with the splits."""
    parameters = [name for name, _ in Bottle2neck(32, 8, scales=3, downsample=nn.Conv2d(32, 32, 1)).named_parameters()]
    norms = {name: [f"{name}.weight", f"{name}.bias"] for name in ("bn1", "bn3", "bns.0", "bns.1", "downsample")}
    assert parameters == [
        "conv1.weight", *norms["bn1"], "conv3.weight", *norms["bn3"], *norms["downsample"],
        "convs.0.weight", "convs.1.weight", *norms["bns.0"], *norms["bns.1"],
    ]  # fmt: skip


@pytest.mark.parametrize(("style", "strides"), [("pytorch", (1, 2)), ("caffe", (2, 1))])
def test_style_says_where_a_block_strides(style, strides):
    block = net(style=style).layer2[0]
    assert block.conv1.stride == (strides[0],) * 2
    assert {conv.stride for conv in block.convs} == {(strides[1],) * 2}
    assert (block.pool is None) is (style == "caffe")
    assert not block.hierarchical


def test_defect_09_style_deep_stem_and_avg_down_take_effect(images):
    """In mmdet, res2net.py:314-317 passes constants in place of these arguments, so v1 cannot be built.

    Here, all three arguments take effect.
    """
    v1b, v1 = net(), net(deep_stem=False, avg_down=False, style="caffe")
    assert hasattr(v1b, "stem")
    assert isinstance(v1b.layer1[0].downsample[0], nn.AvgPool2d)
    assert v1.conv1.kernel_size == (7, 7)
    assert len(v1.layer1[0].downsample) == 2
    assert v1.layer2[0].downsample[0].stride == (2, 2)
    assert v1.layer2[0].conv1.stride == (2, 2)
    assert [out.shape[-1] for out in v1(images)] == [16, 8, 4, 2]


@pytest.mark.parametrize("init_cfg", [None, {"type": "Kaiming", "layer": "Conv2d"}])
def test_defect_03_blocks_start_as_the_identity(init_cfg):
    """In mmdet, resnet.py:415 checks ``block is Bottleneck``, skipping Bottle2neck. Here, its last norm is zero."""
    backbone = build_backbone({"type": "Res2Net", "depth": 50, "init_cfg": init_cfg, **TINY})
    assert all(not block.norm3.weight.any() for block in blocks(backbone))
    assert all(norm.weight.all() for block in blocks(backbone) for norm in block.bns)
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(backbone.layer1[1](x), x.relu())
    backbone = build_backbone({"type": "Res2Net", "depth": 50, "zero_init_residual": False, **TINY})
    assert all(block.norm3.weight.all() for block in blocks(backbone))


@pytest.mark.parametrize(("position", "width"), [("after_conv1", 16), ("after_conv2", 16), ("after_conv3", 32)])
def test_defect_04_plugins_have_the_width_of_all_splits(position, width):
    """Upstream builds Res2Net's plugins for ``planes`` channels, and they crash in ``forward``.

    Here, plugins have the width of the preceding convolution; after the splits, the width of all splits.
    """
    plugins = [{"cfg": {"type": "SELayer", "postfix": postfix}, "position": position} for postfix in ("_a", "_b")]
    backbone = net(plugins=plugins)
    backbone(torch.randn(2, 3, 32, 32))
    for stage, name in enumerate(backbone.res_layers):
        for block in getattr(backbone, name):
            assert getattr(block, f"{position}_plugin_names") == ["se_layer_a", "se_layer_b"]
            assert block.se_layer_a.conv1.conv.in_channels == width * 2**stage


def test_defect_10_drop_path_leaves_branches_out(randomize_norms):
    """In mmpretrain, res2net.py ignores ``drop_path_rate``. Here, half of the paths are dropped at rate 0.5."""
    backbone = randomize_norms(net(drop_path_rate=0.5))
    rates = [block.drop_path.drop_prob if block.drop_path else 0.0 for block in blocks(backbone)]
    assert rates == [pytest.approx(0.5 * index / 15) for index in range(16)]
    block = backbone.layer4[2].train()
    assert isinstance(block.drop_path, DropPath)
    out = block(x := torch.randn(64, 256, 2, 2))
    dropped = [torch.equal(sample, kept.relu()) for sample, kept in zip(out, x, strict=True)]
    assert 10 < sum(dropped) < 54


def test_all_3x3s_are_deformable():
    dcn = {"type": "DCNv2", "deform_groups": 1, "backend": "torch"}
    backbone = net(dcn=dcn, stage_with_dcn=(False, True, True, False))
    for name, deformable in zip(backbone.res_layers, (False, True, True, False), strict=True):
        convs = [conv for block in getattr(backbone, name) for conv in block.convs]
        assert {isinstance(conv, DeformConv2d) for conv in convs} == {deformable}
    assert "layer2.1.convs.2.conv_offset.weight" in backbone.state_dict()
    backbone(torch.randn(2, 3, 64, 64))[-1].sum().backward()
    assert backbone.layer2[0].convs[0].weight.grad.any()


def test_dilation_reaches_every_3x3():
    backbone = net(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), multi_grid=(1, 2, 4))
    assert [{(conv.dilation, conv.padding) for conv in block.convs} for block in backbone.layer4] == [
        {((rate, rate), (rate, rate))} for rate in (1, 2, 4)
    ]
    contracted = net(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 4), contract_dilation=True).layer4
    assert [block.convs[0].dilation for block in contracted] == [(2, 2), (4, 4), (4, 4)]
    assert [out.shape[-1] for out in backbone(torch.randn(2, 3, 65, 65))] == [17, 9, 5, 5]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"scales": 1}, ValueError, "`scales` must be at least 2, got 1; with one split"),
        ({"scales": 4.0}, TypeError, "`scales` must be an integer, got 4.0 of type float"),
        ({"base_width": 0}, ValueError, "`base_width` must be at least 1, got 0"),
        ({"groups": 0}, ValueError, "`groups` must be at least 1, got 0"),
        ({"pool_at_stride_1": 1}, TypeError, "`pool_at_stride_1` must be True or False, got 1"),
        ({"depth": 18}, KeyError, "`depth` of Res2Net must be one of 50, 101, 152; got 18"),
        ({"style": "tensorflow"}, ValueError, "`style` must be one of 'pytorch', 'caffe'; got 'tensorflow'"),
        ({"scale": 4}, TypeError, "Res2Net has no argument 'scale'; did you mean 'scales'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_built(refused, options, error, text):
    with refused(error, text):
        build_backbone({"type": "Res2Net", "depth": 50, **options})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scales": 1}, "`scales` must be at least 2, got 1"),
        ({"stage_type": "first"}, "`stage_type` must be one of 'normal', 'stage'; got 'first'"),
    ],
)
def test_a_block_refuses_wrong_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        Bottle2neck(64, 16, **options)


def test_first_block_of_a_res_layer_gets_arguments_of_its_own():
    given = {"with_cp": True}
    layer = ResLayer(BasicBlock, 8, 16, 3, stride=2, first_block=given, with_cp=False)
    assert [block.with_cp for block in layer] == [True, False, False]
    assert given == {"with_cp": True}
