"""The ResNets of RT-DETR: transformers' own, with the same weights, to the last bit at every depth."""

import pytest
import torch
from cases import every_class, make, stages
from torch import nn

from resbackbone import ResNet, build_backbone
from resbackbone.checkpoints import convert_state_dict, load_checkpoint

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
NORM = {"norm_eval": False, "zero_init_residual": False}


@pytest.fixture
def published(torchvision, shake):
    """Build transformers' backbone as the published checkpoints of that depth configure it, of that width."""
    transformers = pytest.importorskip("transformers")  # which imports torchvision

    def build(depth, base_channels=64):
        basic = depth < 50
        config = transformers.RTDetrResNetConfig(
            depths=list(DEPTHS[depth]),
            embedding_size=base_channels,
            hidden_sizes=[base_channels * 2**stage * (1 if basic else 4) for stage in range(4)],
            layer_type="basic" if basic else "bottleneck",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        return shake(transformers.RTDetrResNetBackbone(config))

    return build


def run(net, images):
    """The maps of a training step and its gradients, and then the maps in evaluation."""
    maps = net.train()(images)
    maps = getattr(maps, "feature_maps", maps)
    sum(level.square().mean() for level in maps).backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    with torch.no_grad():
        evaluated = net.eval()(images)
    return maps, getattr(evaluated, "feature_maps", evaluated), gradients


def assert_identical(net, reference, images):
    trained, evaluated, gradients = run(net, images)
    their_trained, their_evaluated, their_gradients = run(reference, images)
    for ours, theirs in zip((*trained, *evaluated), (*their_trained, *their_evaluated), strict=True):
        assert theirs.std() > 0
        assert torch.equal(ours, theirs)
    statistics = net.state_dict(), reference.state_dict()
    for ours, theirs in (statistics, (statistics[0] | gradients, statistics[1] | their_gradients)):
        theirs = convert_state_dict(theirs, "huggingface")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("height", [64, 75])  # the odd one is pooled with an incomplete window
def test_r4_a_narrow_net_is_transformers_to_the_last_bit(published, tmp_path, depth, height):
    reference = published(depth, base_channels=8)
    torch.save({f"model.backbone.model.{key}": value for key, value in reference.state_dict().items()}, tmp_path / "m")
    net = build_backbone(f"rtdetr_r{depth}", base_channels=8, **NORM)
    assert load_checkpoint(net, tmp_path / "m").layout == "huggingface"
    assert_identical(net, reference, torch.randn(2, 3, height, 64))


@pytest.mark.parametrize("depth", [18, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (34, 50, 101))])
def test_r4_the_published_size_is_transformers_to_the_last_bit(published, tmp_path, depth):
    reference = published(depth)
    torch.save(reference.state_dict(), tmp_path / "m")
    net = build_backbone(f"rtdetr_r{depth}", checkpoint=tmp_path / "m", **NORM)
    assert_identical(net, reference, torch.randn(1, 3, 64, 64))


@every_class
def test_r4_every_backbone_projects_in_each_stage_if_told_to(images, case):
    net = make(case, project_first_block=True, strides=(1, 2, 2, 2)[: len(stages(make(case)))])
    for first, *others in stages(net):
        assert any(isinstance(layer, nn.Conv2d) for layer in first.downsample)
        assert all(block.downsample is None for block in others)
    sum(level.square().mean() for level in net.train()(images)).backward()
    assert net.layer1[0].downsample[-1].weight.grad is not None


def test_r4_without_being_told_the_identity_stays():
    assert ResNet(18, base_channels=8).layer1[0].downsample is None


def test_r4_what_is_no_flag_is_refused():
    with pytest.raises(TypeError, match="`project_first_block` must be"):
        ResNet(18, project_first_block="yes")
