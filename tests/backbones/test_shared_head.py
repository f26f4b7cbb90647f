"""The shared head of C4 detectors, the simplified block of SCNet's heads, and the stage that Hourglass reverses."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone import MODELS, ResNet, SharedHead
from resbackbone.backbones import ResLayer
from resbackbone.blocks import BasicBlock, Bottleneck, SimplifiedBasicBlock
from resbackbone.layers import DeformConv2d

DCN = {"type": "DCNv2", "deform_groups": 1, "fallback_on_stride": True}


@pytest.fixture
def regions():
    return torch.randn(3, 256, 14, 14)


def head(**options):
    return SharedHead(**{"depth": 18, **options})


# The shared head


def test_it_is_the_stage_of_a_resnet(randomize_norms, regions):
    net = randomize_norms(ResNet(18)).eval()
    shared = head().eval()
    keys = shared.state_dict().keys()
    assert all(key.startswith("layer4.") for key in keys)
    shared.load_state_dict({key: net.state_dict()[key] for key in keys})
    assert torch.equal(shared(regions), net.layer4(regions))
    assert shared(regions).shape == (3, 512, 7, 7)


@pytest.mark.parametrize(
    ("depth", "stage", "channels"), [(18, 1, (64, 128)), (34, 3, (256, 512)), (50, 2, (512, 1024))]
)
def test_any_stage_but_the_first(depth, stage, channels):
    shared = head(depth=depth, stage=stage).eval()
    assert (shared.in_channels, shared.out_channels) == channels
    assert [name for name, _ in shared.named_children()] == [f"layer{stage + 1}"]
    assert shared(torch.randn(1, channels[0], 8, 8)).shape == (1, channels[1], 4, 4)


def test_mmdets_name_in_our_registry_means_it():
    assert MODELS.get("ResLayer") is SharedHead
    shared = MODELS.build({"type": "ResLayer", "depth": 50, "stage": 3, "stride": 1, "dilation": 2, "style": "caffe"})
    assert type(shared) is SharedHead
    block = shared.layer4[1]
    assert (block.conv2.dilation, block.style, shared.layer4[0].conv1.stride) == ((2, 2), "caffe", (1, 1))


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_defect_13_norm_eval_applies_to_every_kind_of_batch_norm(norm):
    """In mmdet, shared_heads/res_layer.py checks for ``nn.BatchNorm2d`` only, so SyncBN stays in train mode.

    Here, every batch norm is in eval mode.
    """
    shared = head(norm_cfg={"type": norm})
    assert shared.train() is shared
    norms = [module for module in shared.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) == 5
    assert not any(module.training for module in norms)
    assert shared.layer4[0].conv1.training
    assert shared.eval() is shared


def test_norms_train_on_request(regions):
    shared = head(norm_eval=False).train()
    shared(regions)
    assert {int(m.num_batches_tracked) for m in shared.modules() if isinstance(m, _BatchNorm)} == {1}


@pytest.mark.parametrize("with_cp", [True, "norms"])
def test_checkpointing_equals_none(randomize_norms, regions, with_cp):
    heads = [randomize_norms(head(norm_eval=False, with_cp=flag)).train() for flag in (False, with_cp)]
    heads[1].load_state_dict(heads[0].state_dict())
    for shared in heads:
        shared(regions).square().mean().backward()
    for name, parameter in heads[0].named_parameters():
        assert torch.equal(parameter.grad, heads[1].get_parameter(name).grad), name
    for name, buffer in heads[0].named_buffers():
        assert torch.equal(buffer, heads[1].get_buffer(name)), name


def test_deformable_convolution():
    dcn, norm_cfg = copy.deepcopy(DCN), {"type": "GN", "num_groups": 8}
    shared = head(depth=50, dcn=dcn, norm_cfg=norm_cfg)
    assert [isinstance(block.conv2, DeformConv2d) for block in shared.layer4] == [False, True, True]
    assert dcn == DCN
    assert isinstance(shared.layer4[0].norm1, nn.GroupNorm)
    assert norm_cfg == {"type": "GN", "num_groups": 8}


def test_init_weights_is_hes_and_leaves_the_last_norms():
    """As upstream: the head has no ``zero_init_residual``."""
    shared = head(depth=50)
    shared.init_weights()
    conv = shared.layer4[1].conv2
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
    assert all(bool((m.weight == 1).all()) for m in shared.modules() if isinstance(m, _BatchNorm))


@pytest.mark.parametrize("spelling", ["init_cfg", "pretrained"])
def test_it_loads_a_resnets_checkpoint(randomize_norms, tmp_path, spelling):
    net = randomize_norms(ResNet(18))
    path = str(tmp_path / "resnet.pth")
    torch.save(net.state_dict(), path)
    if spelling == "pretrained":
        with pytest.warns(FutureWarning, match="`pretrained` is the old spelling"):
            shared = head(pretrained=path)
    else:
        shared = head(init_cfg={"type": "Pretrained", "checkpoint": path})
    shared.init_weights()
    for key, value in shared.state_dict().items():
        assert torch.equal(value, net.state_dict()[key]), key


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"depth": 20}, KeyError, "`depth` of SharedHead must be one of 18, 26, 34, 50, 101, 152, 200, 269; got 20"),
        ({"depth": [50]}, KeyError, "`depth` of SharedHead"),
        ({"depth": 50.0}, KeyError, "`depth` of SharedHead"),
        ({"stage": 0}, ValueError, "`stage` must be from 1 to 3, got 0"),
        ({"stage": 4}, ValueError, "`stage` must be from 1 to 3, got 4"),
        ({"stride": 0}, ValueError, "`stride` must be at least 1"),
        ({"dilation": 1.5}, TypeError, "`dilation` must be an integer"),
        ({"style": "caffe2"}, ValueError, "`style` must be one of 'pytorch', 'caffe'"),
        ({"norm_cfg": {"type": "BNN"}}, KeyError, "unknown norm type 'BNN'"),
        ({"norm_cfg": None}, TypeError, "`norm_cfg` must be a dict"),
        ({"norm_eval": 1}, TypeError, "`norm_eval` must be True or False"),
        ({"with_cp": "yes"}, TypeError, "`with_cp` must be True, False or 'norms'"),
        ({"dcn": "DCN"}, TypeError, "`dcn` must be a dict"),
        ({"dcn": {"type": "DCNv9"}}, KeyError, "unknown convolution type 'DCNv9'"),
        ({"pretrained": 0}, TypeError, "`pretrained` must be a path, a URL or None"),
        ({"pretrained": "a", "init_cfg": {"type": "Pretrained"}}, ValueError, "give `init_cfg` or `pretrained`"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_built(built_convs, wrong, error, text):
    with pytest.raises(error, match=text):
        head(**wrong)
    assert not built_convs


def test_every_tracer_follows_it(randomize_norms, regions):
    shared = randomize_norms(head()).eval()
    torch.compiler.reset()
    compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(shared, (regions,), dynamic_shapes=(dynamic,)).module()
    with torch.no_grad():
        assert torch.equal(compiled(regions), shared(regions))
    other = torch.randn(1, 256, 9, 7)
    for graph in (exported, torch.fx.symbolic_trace(shared)):
        assert torch.equal(graph(other), shared(other))


# The simplified block


@pytest.mark.parametrize("stride", [1, 2])
def test_a_simplified_block_is_a_basic_one_before_its_last_relu(randomize_norms, stride):
    shortcut = nn.Conv2d(8, 8, 1, stride=stride) if stride > 1 else None
    basic = randomize_norms(BasicBlock(8, 8, stride=stride, dilation=2, downsample=shortcut)).eval()
    simplified = SimplifiedBasicBlock(8, 8, stride=stride, dilation=2, downsample=shortcut).eval()
    simplified.load_state_dict(basic.state_dict())
    x = torch.randn(2, 8, 9, 9)
    out = simplified(x)
    assert bool((out < 0).any())
    assert torch.equal(out.relu(), basic(x))
    assert isinstance(simplified.norm1, nn.BatchNorm2d)
    assert isinstance(simplified.norm2, nn.BatchNorm2d)
    assert simplified.with_norm


def test_a_simplified_block_without_norms_has_biases():
    block = SimplifiedBasicBlock(8, 8, norm_cfg=None)
    assert list(block.state_dict()) == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    assert block.norm1 is None
    assert block.norm2 is None
    assert not block.with_norm
    x = torch.randn(2, 8, 9, 9)
    assert torch.equal(block(x), block.conv2(block.conv1(x).relu()) + x)


@pytest.mark.parametrize("norm_cfg", [None, {"type": "BN"}], ids=str)
def test_simplified_blocks_make_a_stage(norm_cfg):
    stage = ResLayer(SimplifiedBasicBlock, 8, 8, 3, norm_cfg=norm_cfg)
    assert len(stage) == 3
    stage(torch.randn(2, 8, 5, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in stage.parameters())


@pytest.mark.parametrize(
    "refused", [{"dcn": {"type": "DCN"}}, {"plugins": [{"cfg": {}, "position": "after_conv1"}]}, {"with_cp": True}]
)
def test_a_simplified_block_refuses(built_convs, refused):
    with pytest.raises(ValueError, match=f"`{next(iter(refused))}` is not for a SimplifiedBasicBlock, got"):
        SimplifiedBasicBlock(8, 8, **refused)
    assert not built_convs


# The reversed stage


@pytest.mark.parametrize(("block", "channels"), [(BasicBlock, 16), (Bottleneck, 64)])
def test_downsample_first_false_changes_in_the_last_block(block, channels):
    stage = ResLayer(block, 32, 16, 3, stride=2, downsample_first=False)
    assert [b.downsample is None for b in stage] == [True, True, False]
    assert [b.stride for b in stage] == [1, 1, 2]
    assert [b.conv1.in_channels for b in stage] == [32, 32, 32]
    assert stage(torch.randn(2, 32, 9, 9)).shape == (2, channels, 5, 5)
