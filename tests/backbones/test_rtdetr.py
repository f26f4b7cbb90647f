"""The ResNets of RT-DETR: transformers' own, with the same weights, to the last bit at every depth."""

import pytest
import torch
from cases import every_class, make, stages
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from resbackbone import ResNet, build_backbone
from resbackbone.checkpoints import convert_state_dict, load_checkpoint
from resbackbone.cli import app
from resbackbone.data.preprocessing import TORCHVISION, Preprocessing

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
NORM = {"norm_eval": False, "zero_init_residual": False}


@pytest.fixture
def published(torchvision, randomize_norms):
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
        return randomize_norms(transformers.RTDetrResNetBackbone(config))

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
def test_a_narrow_net_is_transformers_to_the_last_bit(published, tmp_path, depth, height):
    reference = published(depth, base_channels=8)
    torch.save({f"model.backbone.model.{key}": value for key, value in reference.state_dict().items()}, tmp_path / "m")
    net = build_backbone(f"rtdetr_r{depth}", base_channels=8, **NORM)
    assert load_checkpoint(net, tmp_path / "m").layout == "huggingface"
    assert_identical(net, reference, torch.randn(2, 3, height, 64))


@pytest.mark.parametrize("depth", [18, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (34, 50, 101))])
def test_the_published_size_is_transformers_to_the_last_bit(published, tmp_path, depth):
    reference = published(depth)
    torch.save(reference.state_dict(), tmp_path / "m")
    net = build_backbone(f"rtdetr_r{depth}", checkpoint=tmp_path / "m", **NORM)
    assert_identical(net, reference, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_authors_own_keys_in_both_directions(published, tmp_path, depth):
    """As their checkpoints have them: the average beside the raw model, whose norms are frozen and have no counters."""
    reference = published(depth, base_channels=8)
    weights = {key: value for key, value in reference.state_dict().items() if "num_batches" not in key}
    theirs = convert_state_dict(weights, "huggingface", "rtdetr")
    assert all(key.startswith(("conv1.conv1_", "res_layers.")) for key in theirs)
    raw = {f"backbone.{key}": value + 1 for key, value in theirs.items()} | {"decoder.x": torch.zeros(1)}
    averaged = {f"backbone.{key}": value for key, value in theirs.items()} | {"decoder.x": torch.ones(1)}
    torch.save({"model": raw, "ema": {"module": averaged, "updates": 7}, "last_epoch": 71}, tmp_path / "rtdetr.pth")
    net = build_backbone(f"rtdetr_r{depth}", base_channels=8, **NORM)
    with pytest.warns(
        UserWarning, match=r"the one with prefix 'ema\.module\.backbone\.' is loaded.*prefix='model\.backbone\.'"
    ):
        report = load_checkpoint(net, tmp_path / "rtdetr.pth")
    assert (report.layout, report.missing, report.unexpected) == ("rtdetr", (), ())
    back = convert_state_dict(net.state_dict(), target="huggingface")
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    assert_identical(net, reference, torch.randn(2, 3, 64, 64))


def test_the_command_converts(published, tmp_path):
    """From the authors' keys to transformers' and back."""
    weights = {key: value for key, value in published(18, base_channels=8).state_dict().items() if "num_bat" not in key}
    save_file(weights, tmp_path / "hf.safetensors")
    for source, target, layout in (("hf.safetensors", "r.pth", "rtdetr"), ("r.pth", "back.safetensors", "huggingface")):
        result = CliRunner().invoke(app, ["convert", str(tmp_path / source), str(tmp_path / target), "--to", layout])
        assert result.exit_code == 0, result.output
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("layout", ["rtdetr", "huggingface"])
def test_a_whole_detector_takes_images_from_0_to_1_and_its_first_weights_torchvisions(published, tmp_path, layout):
    weights = convert_state_dict(published(18, base_channels=8).state_dict(), "huggingface", layout)
    net = build_backbone("rtdetr_r18", base_channels=8)
    for others, expected in (
        ({}, TORCHVISION),
        ({"model.decoder.x": torch.zeros(1)}, Preprocessing((0.0,) * 3, (255.0,) * 3)),
    ):
        torch.save(
            {f"model.backbone.model.{key}": value for key, value in weights.items()} | others, tmp_path / "m.pth"
        )
        load_checkpoint(net, tmp_path / "m.pth")
        assert net.preprocessing == expected


def test_a_net_that_does_not_project_is_told_how_to(published, tmp_path):
    torch.save(published(18, base_channels=8).state_dict(), tmp_path / "m.pth")
    with pytest.raises(ValueError, match="build the net with `project_first_block=True`"):
        build_backbone("resnet18_v1d", base_channels=8, checkpoint=tmp_path / "m.pth")


@every_class
def test_every_backbone_projects_in_each_stage_if_told_to(images, case):
    net = make(case, project_first_block=True, strides=(1, 2, 2, 2)[: len(stages(make(case)))])
    for first, *others in stages(net):
        assert any(isinstance(layer, nn.Conv2d) for layer in first.downsample)
        assert all(block.downsample is None for block in others)
    sum(level.square().mean() for level in net.train()(images)).backward()
    assert net.layer1[0].downsample[-1].weight.grad is not None


def test_without_being_told_the_identity_stays():
    assert ResNet(18, base_channels=8).layer1[0].downsample is None


def test_what_is_no_flag_is_refused():
    with pytest.raises(TypeError, match="`project_first_block` must be"):
        ResNet(18, project_first_block="yes")
