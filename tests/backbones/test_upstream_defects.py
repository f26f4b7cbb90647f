"""The defects of the OpenMMLab ResNets that the common classes had; the numbers are ours.

Those of one variant are tested beside it, under names of the same kind. Each docstring says where upstream goes wrong
and what is right: ``tools/upstream_defects.py`` makes docs/upstream_defects.md of them.
"""

import copy

import pytest
import torch
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone import MODELS, ResNeSt, ResNet, ResNetV1d, ResNeXt, WideResNet, build_backbone
from resbackbone.blocks import BasicBlock, Bottleneck
from resbackbone.layers import DeformConv2d, build_conv_layer, build_norm_layer, build_plugin_layer

TINY = {"base_channels": 8}
GROUPED = {"groups": 4, "base_width": 4}


class Recorder(nn.Module):
    """A plugin that writes down its name and the channels it is given when it runs."""

    ran: list[tuple[str, int]] = []  # noqa: RUF012  # emptied by the fixture

    def __init__(self, in_channels, name="", **kwargs):
        super().__init__()
        self.name, self.in_channels = name, in_channels

    def forward(self, x):
        assert x.shape[1] == self.in_channels
        self.ran.append((self.name, self.in_channels))
        return x


@pytest.fixture(autouse=True)
def _record(registry):
    registry.register_module("Recorder", module=Recorder)
    Recorder.ran.clear()


def recorder(name, position):
    return {"cfg": {"type": "Recorder", "name": name, "postfix": name}, "position": position}


def blocks(net):
    return [block for name in net.res_layers for block in getattr(net, name)]


@pytest.mark.parametrize("block_class", [BasicBlock, Bottleneck])
def test_defect_01_chained_plugins_all_run(block_class):
    """In mmseg, resnet.py:249 runs only the last of several plugins at one position. Here, all run, in order."""
    block = block_class(
        8 * block_class.expansion, 8, plugins=[recorder(name, "after_conv2") for name in ("first", "second", "third")]
    )
    block(torch.randn(2, 8 * block_class.expansion, 4, 4))
    assert Recorder.ran == [("first", 8), ("second", 8), ("third", 8)]


@pytest.mark.parametrize(("net_class", "options"), [(ResNet, {}), (ResNetV1d, {}), (ResNeXt, GROUPED)])
def test_defect_02_fallback_on_stride_holds_in_every_stage_and_the_dict_stays(net_class, options):
    """In mmdet, resnet.py:176 pops ``fallback_on_stride`` from the shared dict: it applies to one block or none.

    Here, in every deformable stage the strided 3x3 is plain and all others are deformable, and no dict is modified.
    """
    dcn = {"type": "DCNv2", "deform_groups": 1, "fallback_on_stride": True}
    before = copy.deepcopy(dcn)
    net = net_class(50, dcn=dcn, stage_with_dcn=(False, True, True, True), **options, **TINY)
    for name in ("layer2", "layer3", "layer4"):
        assert [isinstance(block.conv2, DeformConv2d) for block in getattr(net, name)] == [False] + [True] * (
            len(getattr(net, name)) - 1
        )
    assert not any(isinstance(block.conv2, DeformConv2d) for block in net.layer1)
    assert dcn == before == net.dcn
    assert all(block.dcn in (None, before) for block in blocks(net))


def test_defect_02_blocks_do_not_share_the_dict_they_are_given():
    """Several blocks built from the same dict all apply ``fallback_on_stride``."""
    dcn = {"type": "DCN", "deform_groups": 1, "fallback_on_stride": True}
    for _ in range(2):
        assert type(Bottleneck(32, 8, stride=2, dcn=dcn).conv2) is nn.Conv2d
        assert isinstance(Bottleneck(32, 8, stride=1, dcn=dcn).conv2, DeformConv2d)
    assert dcn == {"type": "DCN", "deform_groups": 1, "fallback_on_stride": True}


@pytest.mark.parametrize("init_cfg", [None, {"type": "Kaiming", "layer": "Conv2d"}])
@pytest.mark.parametrize("net_class", [ResNet, ResNeXt, WideResNet])
def test_defect_03_zero_init_residual_holds_for_subclasses_and_beside_init_cfg(net_class, init_cfg):
    """In mmdet, resnet.py:415 applies the flag only if ``block is Bottleneck`` and there is no ``init_cfg``.

    Here, after ``init_weights()`` the last norm of each block is zero, so each block is the identity.
    """
    options = GROUPED if net_class is ResNeXt else {}
    net = build_backbone({"type": net_class.__name__, "depth": 50, "init_cfg": init_cfg, **options, **TINY})
    assert all(not block.norm3.weight.any() for block in blocks(net))
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(net.layer1[1](x), x.relu())


def test_defect_03_zero_init_residual_applies_to_custom_blocks():
    """It applies to user-defined subclasses of blocks, without registration."""

    class MyBlock(Bottleneck):
        pass

    class MyNet(ResNet):
        arch_settings = {50: (MyBlock, (1, 1, 1, 1))}  # noqa: RUF012

    net = MyNet(50, **TINY)
    net.init_weights()
    assert all(not block.norm3.weight.any() for block in blocks(net))


@pytest.mark.parametrize("position", ["after_conv1", "after_conv2", "after_conv3"])
def test_defect_04_plugins_of_a_resnext_have_the_width_they_follow(position):
    """In mmseg, ResNeXt builds plugins for ``planes`` channels and crashes in ``forward``.

    Here, plugins have the width of the preceding convolution, which in ResNeXt is not ``planes``.
    """
    net = ResNeXt(50, plugins=[recorder("", position)], groups=8, base_width=4, **TINY)
    net.eval()(torch.randn(1, 3, 32, 32))  # the plugin itself compares its width with what it gets
    width = 32 * 1
    expected = [width * 2**stage for stage, count in enumerate((3, 4, 6, 3)) for _ in range(count)]
    assert [channels for _, channels in Recorder.ran] == expected
    assert net.layer1[0].planes == 8


@pytest.mark.parametrize(
    ("net_class", "depth", "options"),
    [(ResNet, 18, {}), (ResNet, 50, {}), (ResNeXt, 50, GROUPED), (WideResNet, 50, {}), (ResNetV1d, 18, {})],
)
def test_defect_10_drop_path_is_called_in_every_block(randomize_norms, net_class, depth, options):
    """In mmpretrain, SE, ResNeSt and Res2Net blocks have a drop path that they never call.

    Here, with a rate near 1, nearly every block after the first returns the ReLU of its shortcut.
    """
    net = randomize_norms(net_class(depth, drop_path_rate=0.999, **options, **TINY)).train()
    block = net.layer4[-1]
    assert block.drop_path.drop_prob == pytest.approx(0.999)
    x = torch.randn(8, block.conv1.in_channels, 4, 4)
    untouched = (block(x) == x.relu()).flatten(1).all(1)
    assert int(untouched.sum()) >= 7


@pytest.mark.parametrize("type_", ["Res2Net", "ResNeXt"])
def test_defect_10_no_init_cfg_means_the_default_initialization(type_):
    """In mmpretrain, Res2Net with ``init_cfg=None`` skips initialization.

    Here, None means the default, Kaiming normal for convolutions and ones for norms.
    """
    net = build_backbone({"type": type_, "depth": 50, "init_cfg": None, "zero_init_residual": False})
    conv = net.layer2[1].conv1.weight.detach()  # 1x1: no groups, no splits
    assert float(conv.std()) == pytest.approx((2 / conv.shape[0]) ** 0.5, rel=0.02)
    assert all(bool((norm.weight == 1).all()) for norm in net.modules() if isinstance(norm, nn.BatchNorm2d))


@pytest.mark.parametrize("as_list", [False, True])
def test_defect_11_loaded_weights_are_not_zeroed_afterwards(randomize_norms, tmp_path, as_list):
    """In mmpretrain, resnet.py:642 zeroes the last norms after a list with ``type='Pretrained'`` has loaded them.

    Here, loaded weights are kept, with a list and with a dict.
    """
    trained = randomize_norms(ResNet(50, **TINY))
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    pretrained = {"type": "Pretrained", "checkpoint": str(tmp_path / "trained.pth")}
    net = build_backbone({"type": "ResNet", "depth": 50, "init_cfg": [pretrained] if as_list else pretrained, **TINY})
    for block, source in zip(blocks(net), blocks(trained), strict=True):
        assert block.norm3.weight.all()
        assert torch.equal(block.norm3.weight, source.norm3.weight)


@pytest.mark.parametrize("rate", [0, 0.0])
def test_defect_12_an_integer_drop_path_rate_is_a_rate(rate):
    """In mmpretrain, resnet.py:358 fails on the integer 0. Here, it equals 0.0."""
    net = ResNet(18, drop_path_rate=rate, **TINY)
    assert [block.drop_path for block in blocks(net)] == [None] * 8


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_defect_13_norm_eval_applies_to_every_kind_of_batch_norm(norm):
    """The same for a whole backbone."""
    net = ResNet(18, norm_cfg={"type": norm}, norm_eval=True, **TINY).train()
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) == 20
    assert not any(module.training for module in norms)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (0,), "frozen_stages": 4},
            "`frozen_stages` must be from -1 to 3, got 4",
        ),
        ({"frozen_stages": 5}, "`frozen_stages` must be from -1 to 4, got 5"),
        ({"out_indices": ()}, "`out_indices` must name at least one stage"),
        ({"out_indices": []}, "`out_indices` must name at least one stage"),
        ({"multi_grid": (1, 2)}, "`multi_grid` must have 3 entries"),
        ({"multi_grid": ()}, "`multi_grid` must have 3 entries"),
    ],
)
def test_defect_14_invalid_stage_arguments_raise_clear_errors(built_convs, options, text):
    """Upstream raises AttributeError 'layer4', "max() arg is an empty sequence" and IndexError.

    Here, the error names the argument, its value and the allowed values, before anything is built.
    """
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared below, brackets and all
        ResNet(50, **options)
    assert text in str(caught.value)
    assert not built_convs


@pytest.mark.parametrize(
    ("build", "what", "guess"),
    [
        (lambda name: build_norm_layer({"type": name}, 8), "norm", ("BNN", "BN")),
        (lambda name: build_conv_layer({"type": name}, 8, 8, 3), "convolution", ("DCNv3", "DCNv2")),
        (lambda name: build_plugin_layer({"type": name}, in_channels=8), "plugin", ("Recordr", "Recorder")),
        (lambda name: ResNet(18, norm_cfg={"type": name}), "norm", ("SyncBM", "SyncBN")),
        (lambda name: ResNet(18, conv_cfg={"type": name}), "convolution", ("Conv2D", "Conv2d")),
        (lambda name: MODELS.build({"type": name}), "model", ("ResNeXt50", "ResNeXt")),
    ],
    ids=["norm", "conv", "plugin", "norm_cfg", "conv_cfg", "registry"],
)
def test_defect_15_an_unknown_type_is_named_with_its_nearest(build, what, guess):
    """In mmcv, norm.py:110, conv.py:47 and plugin.py:92 raise "Cannot find None in registry".

    Here, the error names the type and the nearest match.
    """
    wrong, right = guess
    with pytest.raises(KeyError) as caught:
        build(wrong)
    assert f"unknown {what} type {wrong!r}; did you mean {right!r}" in caught.value.args[0]
    assert "None" not in caught.value.args[0]


@pytest.mark.parametrize(("net_class", "options"), [(ResNet, {"depth": 18}), (ResNetV1d, {"depth": 50})])
def test_defect_16_checkpointing_updates_statistics_once_per_step(images, net_class, options):
    """Under ``with_cp``, recomputation updates running statistics a second time (``num_batches_tracked`` is 2).

    Here, they are updated once, to the same values as without it.
    """
    nets = [net_class(with_cp=with_cp, norm_eval=False, **options, **TINY).train() for with_cp in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    for count in (1, 2):
        for net in nets:
            sum(out.mean() for out in net(images)).backward()
        counts = {int(norm.num_batches_tracked) for norm in nets[0].modules() if isinstance(norm, _BatchNorm)}
        assert counts == {count}
        for key, value in nets[0].named_buffers():
            assert torch.equal(value, nets[1].get_buffer(key)), key


def test_defect_16_statistics_are_updated_once_even_if_the_backward_pass_fails(images):
    """The buffers are restored after recomputation, even if it fails."""
    net = ResNet(18, with_cp=True, norm_eval=False, **TINY).train()
    before = {id(buffer) for buffer in net.buffers()}
    handle = net.layer3[0].conv2.register_forward_hook(_fail_when_recomputing())
    with pytest.raises(RuntimeError, match="fails the second time"):
        sum(out.mean() for out in net(images)).backward()
    handle.remove()
    assert {id(buffer) for buffer in net.buffers()} == before
    assert {int(norm.num_batches_tracked) for norm in net.modules() if isinstance(norm, _BatchNorm)} == {1}


def _fail_when_recomputing():
    calls = []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("fails the second time")

    return hook


EVERY_TRACED = [(ResNet, {"depth": 18}), (ResNeSt, {"depth": 14, "stem_channels": 8})]


@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize(("net_class", "options"), EVERY_TRACED)
def test_defect_18_fx_traces_it_with_checkpointing_too(images, net_class, options, with_cp):
    """Upstream, torch.fx traces neither ResNeSt, since its attention reads sizes, nor any model with ``with_cp``."""
    net = net_class(with_cp=with_cp, **options, **TINY).eval()
    traced = torch.fx.symbolic_trace(net)
    assert all(torch.equal(*pair) for pair in zip(traced(images), net(images), strict=True))


@pytest.mark.parametrize(("net_class", "options"), EVERY_TRACED)
def test_defect_18_norms_fold_into_convolutions_on_the_fly(randomize_norms, images, net_class, options):
    """Tracing by mmengine's ``efficient_conv_bn_eval`` therefore fails on both.

    Here, it folds every batch norm in eval mode into its convolution; outputs and gradients do not change.
    """
    net = randomize_norms(net_class(with_cp=True, **options, **TINY)).train()
    folding = copy.deepcopy(net)
    turn_on_efficient_conv_bn_eval(nn.ModuleDict({"backbone": folding}), "backbone")
    for module in folding.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_hook(_fail)
    results = []
    for backbone in (net, folding):
        outs = backbone(images)
        sum(out.square().mean() for out in outs).backward()
        results.append([*outs, *(parameter.grad for parameter in backbone.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _fail(*args):
    raise AssertionError("a batch norm was run")
