"""TridentNet: its branches are one ResNet at several dilations, in training and in eval mode."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone import FeatureInfo, ResNet, TridentResNet, build_backbone
from resbackbone.blocks import TridentBottleneck
from resbackbone.layers import DeformConv2d, DropPath

TINY = {"depth": 50, "base_channels": 8}
STAGES = {"num_stages": 3, "strides": (1, 2, 2), "out_indices": (2,)}
BATCH = 2


def trident(**options):
    return TridentResNet(**{**TINY, **options})


def plain(dilation, **options):
    """The ResNet that a branch is."""
    return ResNet(**{**TINY, **STAGES, "dilations": (1, 1, dilation), **options})


def assert_same(outs, expected):
    assert len(outs) == len(expected)
    for out, reference in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, reference, rtol=0, atol=0)


# What the branches compute


def test_its_keys_are_those_of_a_resnet():
    assert list(trident().state_dict()) == list(plain(1).state_dict())


@pytest.mark.parametrize("branch", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"style": "caffe"}, {"deep_stem": True}], ids=str)
def test_in_eval_mode_it_is_the_resnet_of_one_dilation(randomize_norms, images, branch, options):
    net = randomize_norms(trident(test_branch_idx=branch, trident_dilations=(1, 2, 4), **options)).eval()
    resnet = plain((1, 2, 4)[branch], **options).eval()
    resnet.load_state_dict(net.state_dict())
    assert_same(net(images), resnet(images))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"plugins": [{"cfg": {"type": nn.Identity}, "position": "after_conv2"}]}])
def test_branches_follow_each_other_on_the_batch_dimension(randomize_norms, images, training, options):
    """All of them in training mode, and in eval mode with -1."""
    net = randomize_norms(trident(test_branch_idx=1 if training else -1, out_indices=(0, 1, 2), **options)).train(
        training
    )
    outs = net(images)
    assert [out.shape[0] for out in outs] == [BATCH, BATCH, 3 * BATCH]
    for dilation, out in zip((1, 2, 3), outs[2].split(BATCH), strict=True):
        resnet = plain(dilation, out_indices=(0, 1, 2)).eval()
        resnet.load_state_dict(net.state_dict(), strict=not options)
        assert_same([*outs[:2], out], resnet(images))


@pytest.mark.parametrize("dilations", [(1,), (1, 2, 3, 5)])
def test_any_number_of_branches(images, dilations):
    net = trident(num_branch=len(dilations), trident_dilations=dilations, test_branch_idx=0)
    assert net.train()(images)[0].shape == (BATCH * len(dilations), 128, 4, 4)
    assert net.eval()(images)[0].shape == (BATCH, 128, 4, 4)
    assert net.num_branch == len(dilations)


def test_feature_info_is_of_one_branch():
    net = trident(out_indices=(1, -1))
    assert net.feature_info == (FeatureInfo("layer2", 1, 64, 8), FeatureInfo("layer3", 2, 128, 16))
    assert net.feat_dim == 128


def test_gradients_are_the_sum_over_the_branches(randomize_norms, images):
    net = randomize_norms(trident()).train()
    net(images)[0].square().sum().backward()
    branches = [plain(dilation).train() for dilation in (1, 2, 3)]
    for resnet in branches:
        resnet.load_state_dict(net.state_dict())
        resnet(images)[0].square().sum().backward()
    for name, parameter in net.named_parameters():
        expected = sum(resnet.get_parameter(name).grad for resnet in branches)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_norms_see_one_branch_after_the_other(randomize_norms, images):
    """As in mmdet: three updates of the running statistics per step, each by the batch of one branch."""
    net = randomize_norms(trident(norm_eval=False, with_cp=True)).train()
    net(images)[0].sum().backward()
    counts = {name: int(norm.num_batches_tracked) for name, norm in net.named_modules() if isinstance(norm, _BatchNorm)}
    assert {count for name, count in counts.items() if name.startswith("layer3")} == {3}
    assert {count for name, count in counts.items() if not name.startswith("layer3")} == {1}


def test_plugins_in_the_last_stage_see_every_branch(images):
    net = trident(plugins=[{"cfg": {"type": Seen, "postfix": k}, "position": "after_conv3"} for k in (1, 2)]).train()
    net(images)
    blocks = [block for name in net.res_layers for block in getattr(net, name)]
    assert [block.seen1.count for block in blocks] == [block.seen2.count for block in blocks] == [1] * 7 + [3] * 6


class Seen(nn.Module):
    """A plugin that counts how often it runs."""

    _abbr_ = "seen"

    def __init__(self, in_channels):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return x


def test_drop_path_leaves_out_samples_of_single_branches(randomize_norms):
    block = randomize_norms(TridentBottleneck(32, 8, trident_dilations=(1, 2), drop_path_rate=0.5)).train()
    assert isinstance(block.drop_path, DropPath)
    x = [torch.randn(16, 32, 4, 4) for _ in range(2)]
    left_out = [(out == branch.relu()).flatten(1).all(1) for out, branch in zip(block(x), x, strict=True)]
    assert 0 < int(left_out[0].sum()) < 16
    assert not torch.equal(*left_out)


def test_a_net_with_drop_path_in_every_block(randomize_norms, images):
    net = randomize_norms(trident(drop_path_rate=0.5)).train()
    net(images)[0].sum().backward()
    assert net.layer3[-1].drop_path.drop_prob == 0.5
    assert net.eval()(images)[0].isfinite().all()


@pytest.mark.parametrize(
    "norm_cfg", [{"type": "GN", "num_groups": 4}, {"type": "FrozenBN"}, {"type": "BN", "requires_grad": False}], ids=str
)
def test_other_norms(randomize_norms, images, norm_cfg):
    net = randomize_norms(trident(norm_cfg=norm_cfg)).train()
    net(images)[0].square().mean().backward()
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    assert trainable
    assert all(parameter.grad is not None for parameter in trainable)


def test_shortcuts_of_the_last_stage_do_not_pool():
    """The keys of mmdet's TridentNet."""
    net = trident(avg_down=True)
    assert type(net.layer2[0].downsample[0]) is nn.AvgPool2d
    assert [type(layer) for layer in net.layer3[0].downsample] == [nn.Conv2d, nn.BatchNorm2d]


def test_contracted_dilation_is_for_the_other_stages():
    net = trident(dilations=(1, 4, 1), strides=(1, 1, 2), contract_dilation=True)
    assert [block.conv2.dilation[0] for block in net.layer2] == [2, 4, 4, 4]
    assert {block.conv2.dilation for block in net.layer3} == {(2, 2)}  # of the branch that is tested


# Defects 5 and 6


def test_defect_05_every_weight_is_initialized():
    """In mmdet, trident_resnet.py:54 leaves conv2 uninitialized. Here, it is initialized like any convolution."""
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(trident())
    for block, same in zip(nets[0].layer3, nets[1].layer3, strict=True):
        assert torch.equal(block.conv2.weight, same.conv2.weight)
        bound = 1 / (block.conv2.weight[0].numel() ** 0.5)  # that of any new nn.Conv2d
        assert 0.9 * bound < float(block.conv2.weight.detach().abs().max()) <= bound


def test_defect_05_init_weights_reaches_the_last_stage():
    """In mmdet, initialization raises (trident_resnet.py:122) and skips the blocks (line 231).

    Here, Kaiming normal in every convolution and zero in the last norm of each block, as in the other stages.
    """
    net = build_backbone({"type": "TridentResNet", "depth": 50})
    for block in net.layer3:
        for conv in (block.conv1, block.conv2, block.conv3):
            deviation = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5  # by fan-out
            assert float(conv.weight.detach().std()) == pytest.approx(deviation, rel=0.05)
        assert not block.norm3.weight.any()
        assert bool((block.norm2.weight == 1).all())


def test_defect_05_the_last_norms_are_kept_on_request():
    """``zero_init_residual=False`` takes effect in the last stage, too."""
    net = build_backbone({"type": "TridentResNet", **TINY, "zero_init_residual": False})
    assert all(bool((block.norm3.weight == 1).all()) for block in net.layer3)


@pytest.mark.parametrize("norm_eval", [False, True])
def test_defect_06_checkpointing_equals_none(randomize_norms, images, norm_eval):
    """In mmdet, trident_resnet.py:171 reads ``requires_grad`` of a list. Here, ``with_cp`` changes no result."""
    nets = [randomize_norms(trident(with_cp=with_cp, norm_eval=norm_eval)).train() for with_cp in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    outs = [net(images)[0] for net in nets]
    assert torch.equal(*outs)
    for out in outs:
        out.square().mean().backward()
    for name, parameter in nets[0].named_parameters():
        assert torch.equal(parameter.grad, nets[1].get_parameter(name).grad), name
    for name, buffer in nets[0].named_buffers():
        assert torch.equal(buffer, nets[1].get_buffer(name)), name


def test_defect_06_checkpointing_keeps_less(images):
    """The forward pass keeps fewer activations under ``with_cp``."""
    kept = []
    for with_cp in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            trident(with_cp=with_cp).train()(images)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_defect_06_deformable_convolution_is_refused_in_the_last_stage(randomize_norms, built_convs):
    """In mmdet, ``dcn`` is silently ignored in the last stage. Here, it is refused there, and works in the others."""
    dcn = {"type": "DCNv2", "deform_groups": 1}
    with pytest.raises(ValueError, match="`stage_with_dcn` of TridentResNet must end with False"):
        trident(dcn=dcn, stage_with_dcn=[False, True, True])
    assert not built_convs
    net = randomize_norms(trident(dcn=dcn, stage_with_dcn=(False, True, False)))
    assert all(isinstance(block.conv2, DeformConv2d) for block in net.layer2)
    assert not any(isinstance(block.conv2, DeformConv2d) for block in net.layer3)
    assert net.train()(torch.randn(1, 3, 64, 64))[0].shape[0] == 3
    assert dcn == {"type": "DCNv2", "deform_groups": 1}


# Arguments


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"depth": 18}, KeyError, "`depth` of TridentResNet must be one of 50, 101, 152; got 18"),
        ({"num_stages": 4}, ValueError, "`num_stages` of TridentResNet must be 3.*got 4"),
        ({"num_branch": 0}, ValueError, "`num_branch` must be at least 1"),
        ({"num_branch": 2}, ValueError, "`trident_dilations` must have 2 entries .one per branch, `num_branch`=2"),
        ({"trident_dilations": (1, 2, 0)}, ValueError, r"`trident_dilations\[2\]` must be at least 1, got 0"),
        ({"trident_dilations": 2}, TypeError, "`trident_dilations` must be a list or tuple"),
        ({"test_branch_idx": 3}, ValueError, "`test_branch_idx` must be from -1 to 2, got 3"),
        ({"test_branch_idx": -2}, ValueError, "`test_branch_idx` must be from -1 to 2, got -2"),
        ({"dilations": (1, 1, 2)}, ValueError, r"`dilations` must end with 1.*got \(1, 1, 2\)"),
        ({"dilations": (1, 1)}, ValueError, "`dilations` must have 3 entries"),
        ({"strides": (1, 2)}, ValueError, "`strides` must have 3 entries"),
        ({"out_indices": (3,)}, ValueError, "`out_indices` must be below `num_stages` .=3."),
        ({"frozen_stages": 3}, ValueError, "`frozen_stages` of TridentResNet must be at most 2, got 3"),
        ({"frozen_stages": 4}, ValueError, "`frozen_stages` must be from -1 to 3, got 4"),
        ({"dcn": {"type": "DCN"}, "stage_with_dcn": (False,)}, ValueError, "`stage_with_dcn` must have 3 entries"),
        ({"multi_grid": (1, 2, 4)}, ValueError, "`multi_grid` must be None in TridentResNet"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_built(built_convs, wrong, error, text):
    with pytest.raises(error, match=text):
        trident(**wrong)
    assert not built_convs


def test_a_block_has_no_dcn():
    with pytest.raises(ValueError, match="`dcn` must be None in a trident block"):
        TridentBottleneck(32, 8, trident_dilations=(1, 2), dcn={"type": "DCN"})


def test_a_frozen_net_trains_what_is_left(randomize_norms, images):
    net = randomize_norms(trident(frozen_stages=2, norm_eval=False)).train()
    out = net(images)[0]
    assert out.shape[0] == 3 * BATCH
    out.sum().backward()
    assert {name.split(".")[0] for name, parameter in net.named_parameters() if parameter.grad is not None} == {
        "layer3"
    }


# Tracers


def test_fx_traces_the_mode_it_finds(randomize_norms):
    net = randomize_norms(trident())
    x = torch.randn(2, 3, 65, 97)
    for mode in (net.train(), net.eval()):
        assert_same(torch.fx.symbolic_trace(mode)(x), mode(x))


def test_all_branches_in_eval_mode_are_exported(randomize_norms, images):
    net = randomize_norms(trident(test_branch_idx=-1)).eval()
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(net, (images,), dynamic_shapes=(dynamic,)).module()
    other = torch.randn(1, 3, 97, 65)
    assert_same(exported(other), net(other))


@pytest.mark.slow
@pytest.mark.parametrize("with_cp", [False, True])
def test_a_compiled_training_step_equals_eager(randomize_norms, images, with_cp):
    eager = randomize_norms(trident(norm_eval=False, with_cp=with_cp)).train()
    twin = copy.deepcopy(eager)
    torch.compiler.reset()
    for net in (eager, torch.compile(twin, fullgraph=True, backend="aot_eager")):
        net(images)[0].square().mean().backward()
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(twin.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), buffer, msg=name)
