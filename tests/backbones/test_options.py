"""Every option in every backbone: it does there what it says, or is refused in words."""

import copy

import pytest
import torch
from cases import CASES, CLASSES, arguments_of, blocks, every_case, every_class, make, stages
from mmengine.config import Config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone.blocks import BasicBlock
from resbackbone.blocks.preact import PreActBlock
from resbackbone.config import construct_backbone
from resbackbone.layers import DeformConv2d, FrozenBatchNorm2d

STAGES = dict.fromkeys(CLASSES, 4) | {"TridentResNet": 3}
SEVERAL_BLOCKS = {"ResNeSt": {"depth": 26}, "ResNetT": {"depth": 18}}  # the least depth has one per stage
GN = {"type": "GN", "num_groups": 2}


class Scale(nn.Module):
    """A plugin that fits one width only, and whose parameter gets a gradient if it runs."""

    def __init__(self, in_channels):
        super().__init__()
        self.factor = nn.Parameter(torch.full((in_channels, 1, 1), 1.5))

    def forward(self, x):
        return x * self.factor


def backward(outs):
    sum(out.square().mean() for out in outs).backward()


@every_class
def test_deformable_convolutions_stand_in_their_stages_and_train(randomize_norms, images, case):
    dcn = {"type": "DCNv2", "backend": "torch"}
    with_dcn = (False, True, False, True)[: STAGES[case]]
    net = randomize_norms(make(case, dcn=dcn, stage_with_dcn=with_dcn)).train()
    backward(net(images))
    for stage, deforms in zip(stages(net), with_dcn, strict=True):
        for block in stage:
            layers = [module for module in block.modules() if isinstance(module, DeformConv2d)]
            assert bool(layers) is deforms
            assert all(layer.conv_offset.weight.grad.any() for layer in layers)


@every_class
def test_fallback_on_stride_leaves_what_strides_and_nothing_else_plain(case):
    strides = []
    for fallback_on_stride in (False, True):
        dcn = {"type": "DCNv2", "fallback_on_stride": fallback_on_stride}
        net = make(case, dcn=dcn, stage_with_dcn=(True, True, False, False)[: STAGES[case]])
        assert dcn == {"type": "DCNv2", "fallback_on_stride": fallback_on_stride}
        strides.append({n: layer.stride for n, layer in net.named_modules() if isinstance(layer, DeformConv2d)})
    assert strides[1] == {name: stride for name, stride in strides[0].items() if stride == (1, 1)}


@every_class
def test_plugins_run_behind_every_convolution_of_their_stages(randomize_norms, images, case):
    num_convs = make(case).block.num_convs
    chosen = (True, False, True, True)[: STAGES[case]]
    plugins = [
        {"cfg": {"type": Scale, "postfix": index}, "position": f"after_conv{index}", "stages": chosen}
        for index in range(1, num_convs + 1)
    ]
    given = copy.deepcopy(plugins)
    net = randomize_norms(make(case, plugins=plugins)).train()
    assert plugins == given
    backward(net(images))
    for stage, has_plugins in zip(stages(net), chosen, strict=True):
        for block in stage:
            scales = [module for module in block.modules() if isinstance(module, Scale)]
            assert len(scales) == num_convs * has_plugins
            assert all(scale.factor.grad.all() for scale in scales)


@every_class
def test_a_plugin_behind_a_convolution_that_is_not_there_is_refused(built_convs, case):
    block = make(case).block
    built_convs.clear()
    position = f"after_conv{block.num_convs + 1}"
    with pytest.raises(ValueError, match=rf"`plugins\[0\]\['position'\] in a {block.__name__}`.*got '{position}'"):
        make(case, plugins=[{"cfg": {"type": Scale}, "position": position}])
    assert not built_convs


@every_class
@pytest.mark.parametrize("norm_cfg", [{"type": "BN"}, GN], ids=lambda norm_cfg: norm_cfg["type"])
def test_zero_init_residual_makes_blocks_start_as_the_identity(case, norm_cfg):
    found = []
    for zero_init_residual in (True, False):
        net = make(case, norm_cfg=norm_cfg, zero_init_residual=zero_init_residual, **SEVERAL_BLOCKS.get(case, {}))
        net.init_weights()
        plain = [block for block in blocks(net.eval()) if block.downsample is None]
        assert plain
        for block in plain:
            x = torch.randn(2, block.inplanes, 4, 4)
            found.append(torch.equal(block(x), x if isinstance(block, PreActBlock) else x.relu()))
    assert found == [True] * len(plain) + [False] * len(plain)


@every_class
def test_drop_path_rates_rise_evenly_and_what_is_dropped_has_no_effect(randomize_norms, images, case):
    net = randomize_norms(make(case, drop_path_rate=0.5))
    rates = [0.0 if block.drop_path is None else block.drop_path.drop_prob for block in blocks(net)]
    assert rates == pytest.approx([0.5 * index / (len(rates) - 1) for index in range(len(rates))])
    dropping = blocks(net)[1:]
    for block in dropping:
        block.drop_path.drop_prob = 1 - 1e-6
    before = {training: net.train(training)(images) for training in (True, False)}
    for block in dropping:
        with torch.no_grad():
            getattr(block, f"conv{block.num_convs}").weight.add_(1)
    after = {training: net.train(training)(images) for training in (True, False)}
    assert all(torch.equal(*pair) for pair in zip(before[True], after[True], strict=True))
    assert not torch.equal(before[False][-1], after[False][-1])


def dilations(block):
    """The dilations of a block's 3x3 convolutions."""
    layers = [module for module in block.modules() if isinstance(module, (nn.Conv2d, DeformConv2d))]
    return {layer.dilation[0] for layer in layers if layer.kernel_size == (3, 3)}


def assert_last_stage(case, net, expected, images):
    """Assert the dilation of each block of the last stage; selective kernels look twice as far with one of theirs."""
    found = [max(dilations(block)) for block in stages(net)[-1]]
    assert found == [dilation * (2 if case.startswith("SK") else 1) for dilation in expected]
    for out, stride in zip(net.eval()(images), net.out_strides, strict=True):
        assert out.shape[2:] == (64 // stride, 64 // stride)


@every_class
@pytest.mark.parametrize("contract_dilation", [False, True])
def test_dilation_in_place_of_strides(images, case, contract_dilation):
    strides = (*make(case).strides[:-2], 1, 1)
    options = {"strides": strides, "contract_dilation": contract_dilation}
    if case == "TridentResNet":  # its branches have dilations of their own
        with pytest.raises(ValueError, match="`dilations` must end with 1, because `trident_dilations`"):
            make(case, dilations=(1, 1, 2), **options)
        return
    net = make(case, dilations=(1, 1, 2, 4), **options)
    assert len(set(net.out_strides[-3:])) == 1
    first = 2 if contract_dilation else 4
    assert_last_stage(case, net, [first] + [4] * (net.stage_blocks[-1] - 1), images)


@every_class
@pytest.mark.parametrize("contract_dilation", [False, True])
def test_the_style_of_timm_dilates_all_that_looks_around(images, case, contract_dilation):
    dilations = (1, 2, 1) if case == "TridentResNet" else (1, 1, 2, 4)
    strides = (*make(case).strides[:-2], 1, 1)
    options = {"strides": strides, "dilations": dilations, "contract_dilation": contract_dilation}
    plain, net = (make(case, **options, dilation_style=style) for style in ("openmmlab", "timm"))
    assert plain.state_dict().keys() == net.state_dict().keys()
    assert net.feature_info == plain.feature_info
    for block, stage_dilation in (
        (block, d) for stage, d in zip(stages(net), dilations, strict=True) for block in stage
    ):
        if isinstance(block, BasicBlock) and stage_dilation > 1:
            assert block.conv2.dilation == (stage_dilation, stage_dilation)
    for out, stride in zip(net.eval()(images), net.out_strides, strict=True):
        assert out.shape[2:] == (64 // stride, 64 // stride)


@every_class
def test_nothing_changes_where_nothing_is_dilated(randomize_norms, images, case):
    plain, net = (make(case, dilation_style=style) for style in ("openmmlab", "timm"))
    net.load_state_dict(randomize_norms(plain).state_dict())
    assert all(torch.equal(*pair) for pair in zip(plain.eval()(images), net.eval()(images), strict=True))


@every_class
def test_an_unknown_style_is_refused(case):
    with pytest.raises(ValueError, match="`dilation_style` must be one of 'openmmlab', 'timm'; got 'smp'"):
        make(case, dilation_style="smp")


def test_shortcuts_pool_at_stride_1_where_timms_do():
    options = {"avg_down": True, "strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)}
    pooling = [stage[0].downsample[0] for stage in stages(make("ResNetV1d", **options, dilation_style="timm"))[1:]]
    assert isinstance(pooling[0], nn.AvgPool2d)
    map_ = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    assert all(torch.equal(pool(map_), torch.tensor([[[[3.0, 2.0], [2.25, 1.5]]]])) for pool in pooling[1:])


@every_class
def test_stage_blocks_take_the_place_of_the_depths(randomize_norms, images, case):
    counts = (1, 3, 1, 2)[: STAGES[case]]
    if case == "RegNet":
        with pytest.raises(TypeError, match="RegNet has no argument 'stage_blocks'"):
            construct_backbone({"type": "RegNet", "arch": "regnetx_200mf", "stage_blocks": counts})
        return
    net = randomize_norms(make(case, stage_blocks=list(counts))).train()
    assert net.stage_blocks == counts == tuple(map(len, stages(net)))
    assert net.feature_info == make(case).feature_info
    backward(net(images))
    assert all(parameter.grad.any() for parameter in net.parameters())


@every_class
def test_multi_grid_dilates_the_blocks_of_the_last_stage(images, case):
    num_blocks = make(case).stage_blocks[-1]
    multi_grid = tuple(range(2, 2 + num_blocks))
    if case == "TridentResNet":
        with pytest.raises(ValueError, match="`multi_grid` must be None in TridentResNet"):
            make(case, multi_grid=multi_grid)
        return
    assert_last_stage(case, make(case, multi_grid=multi_grid), multi_grid, images)
    with pytest.raises(ValueError, match=f"`multi_grid` must have {num_blocks} entries"):
        make(case, multi_grid=(*multi_grid, 1))


def trains(net):
    """Which parameters have gradients, and which layers are in training mode."""
    return (
        {name for name, parameter in net.named_parameters() if parameter.requires_grad},
        {name for name, module in net.named_modules() if module.training},
    )


@every_class
def test_freezing_later_is_freezing_at_once(case):
    norm_cfg = {"type": "BN", "requires_grad": False}  # what is still for another reason stays so
    net = make(case, frozen_stages=1, norm_cfg=norm_cfg)
    for frozen_stages in (2, -1, 0):
        net.freeze(frozen_stages)
        once = make(case, frozen_stages=frozen_stages, norm_cfg=norm_cfg)
        assert trains(net) == trains(once)
        assert trains(net.train()) == trains(once.train())
    net.eval().freeze(1)
    assert not any(module.training for module in net.modules())
    twin = copy.deepcopy(net)
    twin.freeze(-1)
    assert trains(twin.train()) == trains(make(case, norm_cfg=norm_cfg).train()) != trains(net.train())


@every_class
def test_freezing_more_stages_than_there_are_is_refused(case):
    net = make(case, frozen_stages=1)
    most = 2 if case == "TridentResNet" else STAGES[case]
    net.freeze(most)
    for frozen_stages in (most + 1, -2):
        with pytest.raises(ValueError, match=rf"`frozen_stages`.* got {frozen_stages}"):
            net.freeze(frozen_stages)
    assert net.frozen_stages == most


def count(net, kind):
    return sum(isinstance(module, kind) for module in net.modules())


@every_class
def test_group_norm_takes_the_place_of_every_batch_norm(randomize_norms, images, case):
    net = randomize_norms(make(case, norm_cfg=GN)).train()
    assert (count(net, nn.GroupNorm), count(net, _BatchNorm)) == (count(make(case), _BatchNorm), 0)
    backward(net(images))
    assert all(parameter.grad.any() for parameter in net.parameters())


@every_class
@pytest.mark.parametrize(("type_", "norm_class"), [("SyncBN", nn.SyncBatchNorm), ("FrozenBN", FrozenBatchNorm2d)])
def test_synchronized_and_frozen_batch_norms_are_batch_norm_in_eval_mode(
    randomize_norms, images, case, type_, norm_class
):
    plain, net = randomize_norms(make(case)).eval(), make(case, norm_cfg={"type": type_}).eval()
    assert count(net, norm_class) == count(net, (_BatchNorm, FrozenBatchNorm2d)) == count(plain, _BatchNorm)
    net.load_state_dict(plain.state_dict())
    assert all(torch.equal(*pair) for pair in zip(net(images), plain(images), strict=True))


@every_class
def test_a_group_norm_that_does_not_divide_the_channels_is_refused(case):
    with pytest.raises(ValueError, match=r"`norm_cfg` asks for 5 groups, which do not divide the \d+ channels"):
        make(case, norm_cfg={"type": "GN", "num_groups": 5})


@every_case
def test_a_config_that_mmengine_dumped_builds_the_same_net(tmp_path, case):
    config = {"type": CASES[case][0], **arguments_of(case, out_indices=(-1, 0))}
    config["plugins"] = [{"cfg": {"type": "SELayer", "postfix": "_mine"}, "position": "after_conv2"}]
    given = copy.deepcopy(config)
    net = construct_backbone(config)
    assert config == given
    for name in ("net.py", "net.yaml"):
        Config({"backbone": config}).dump(tmp_path / name)
        again = construct_backbone(tmp_path / name)
        assert str(again) == str(net)
        assert list(again.state_dict()) == list(net.state_dict())
        assert again.feature_info == net.feature_info
