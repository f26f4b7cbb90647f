"""The library inside mmpretrain: whole classifiers, checkpoints in both ways of naming, layer-wise learning rates."""

import copy
import importlib
import warnings
from importlib.util import find_spec

import pytest
import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint
from sweep_hosts import build_pair, compare_tensors, config_tree, gradients_of, randomize

import resbackbone

HOST = "mmpretrain"  # whose default scope `default_scope` sets

pytestmark = [
    pytest.mark.skipif(find_spec(HOST) is None, reason="mmpretrain is not installed; tools/test_hosts.sh installs it"),
    pytest.mark.usefixtures("default_scope"),
]


@pytest.fixture
def classes():
    return importlib.import_module("resbackbone.integrations.mmpretrain")


def build_classifier(backbone_type):
    """Build the classifier of mmpretrain's ResNet-50-D config on another type of backbone, small, for ten classes."""
    from mmpretrain.registry import MODELS

    model = copy.deepcopy(Config.fromfile(config_tree(HOST) / "resnet/resnetv1d50_8xb32_in1k.py").model)
    model.backbone.update(type=backbone_type, base_channels=8, stem_channels=8)
    model.head.update(in_channels=256, num_classes=10)
    torch.manual_seed(0)
    return MODELS.build(model)


@pytest.fixture
def data():
    """Two labeled images, as a data loader hands them over."""
    from mmpretrain.structures import DataSample

    images = torch.randint(0, 255, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {"inputs": list(images), "data_samples": [DataSample().set_gt_label(label) for label in (3, 7)]}


@pytest.fixture
def classifiers(classes, tmp_path):
    """The classifier of mmpretrain and the same with our backbone, which has loaded the other's checkpoint."""
    from mmpretrain.models.backbones import ResNetV1d

    native, ours = build_classifier(ResNetV1d), build_classifier("ResNetV1d")
    assert type(native.backbone) is ResNetV1d
    assert type(ours.backbone) is classes.ResNetV1d
    randomize(native)
    torch.save({"state_dict": native.state_dict(), "meta": {}}, tmp_path / "native.pth")
    load_checkpoint(ours, str(tmp_path / "native.pth"), map_location="cpu", strict=True)
    return native, ours


def test_a_whole_classifier_is_the_same_with_our_backbone(classifiers, data, train_step):
    predictions, losses, gradients = [], [], []
    for model in classifiers:
        predictions.append([sample.pred_score for sample in model.eval().test_step(copy.deepcopy(data))])
        losses.append(train_step(model, data))
        gradients.append({name: value for name, value in gradients_of(model).items() if name.startswith("head")})
    assert losses[0].keys() == losses[1].keys() >= {"loss"}
    for left, right in zip(*map(dict.items, losses), strict=True):
        assert torch.equal(left[1], right[1]), left[0]
    assert all(torch.equal(*pair) for pair in zip(*predictions, strict=True))
    assert not compare_tensors("gradient of", *gradients)
    for left, right in zip(*(model.parameters() for model in classifiers), strict=True):
        assert torch.equal(left, right)  # behind the step of the optimizer, too


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ResNetV1c", {}),
        ("ResNetV1d", {}),
        ("ResNetV1d", {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)}),
        ("ResNetV1d", {"norm_cfg": {"type": "GN", "num_groups": 4}}),
        ("ResNeSt", {}),
        ("Res2Net", {}),
    ],
)
def test_checkpoints_load_in_both_ways_of_naming(name, options):
    native, ours = build_pair(HOST, {"type": name, "depth": 50, "base_channels": 16, "stem_channels": 16, **options})
    randomize(native)
    ours.load_state_dict(native.state_dict())
    values = list(native.state_dict().values())
    assert all(torch.equal(*pair) for pair in zip(ours.state_dict().values(), values, strict=True))
    again = copy.deepcopy(ours)
    randomize(again, seed=1)
    again.load_state_dict(ours.state_dict())  # ours, which the renaming leaves alone
    assert all(torch.equal(*pair) for pair in zip(again.state_dict().values(), values, strict=True))
    elsewhere = getattr(resbackbone, name)(depth=50, base_channels=16, stem_channels=16, **options)
    elsewhere.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_layer_depths_are_mmpretrains(depth):
    native, ours = build_pair(HOST, {"type": "ResNet", "depth": depth, "base_channels": 8})
    for name in [name for name, _ in native.named_parameters()]:
        name = f"backbone.{name}"
        assert ours.get_layer_depth(name, "backbone.") == native.get_layer_depth(name, "backbone."), name
    assert ours.get_layer_depth("head.fc.weight", "backbone.") == native.get_layer_depth("head.fc.weight", "backbone.")


def test_defect_12_layer_depths_of_any_net_and_prefix(classes):
    """In mmpretrain, ``get_layer_depth`` raises for ResNet-18 and accepts only the prefix "backbone.".

    Here, depths increase from the stem to the head in every model, independent of the prefix.
    """
    native, ours = build_pair(HOST, {"type": "ResNet", "depth": 18, "base_channels": 8})
    with pytest.raises(NotImplementedError):
        native.get_layer_depth("conv1.weight")
    one_stage = classes.ResNet(18, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
    for net in (ours, classes.ResNet(34), classes.RegNet("regnetx_400mf"), one_stage):
        depths = [net.get_layer_depth(name) for name, _ in net.named_parameters()]
        assert depths == sorted(depths)
        numbers = [depth for depth, _ in depths]
        head, total = net.get_layer_depth("head.fc.weight", "net.")
        assert sorted({*numbers, head}) == list(range(total))
        assert depths == [net.get_layer_depth(f"net.{name}", "net.") for name, _ in net.named_parameters()]


def test_layer_wise_learning_rates_work(classifiers):
    from mmpretrain.engine.optimizers import LearningRateDecayOptimWrapperConstructor

    constructor = LearningRateDecayOptimWrapperConstructor(
        {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 1.0, "weight_decay": 0.1}},
        {"layer_decay_rate": 0.5},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = [constructor(model).optimizer.param_groups for model in classifiers]
    rates = [{id(p): group["lr"] for group in found for p in group["params"]} for found in groups]
    for left, right in zip(*(model.parameters() for model in classifiers), strict=True):
        assert rates[0][id(left)] == rates[1][id(right)]
    assert len(set(rates[1].values())) == 8


@pytest.mark.parametrize(
    ("depth", "expansion", "error", "text"),
    [
        (18, 2, ValueError, "`expansion` of a BasicBlock must be 1, got 2"),
        (50, 0, ValueError, "`expansion` must be at least 1, got 0"),
        (50, 2.0, TypeError, "`expansion` must be an integer"),
    ],
)
def test_expansion_is_checked(classes, depth, expansion, error, text):
    with pytest.raises(error, match=text):
        classes.ResNet(depth, expansion=expansion)


def test_expansion_changes_one_net_only(classes):
    assert classes.ResNet(50, expansion=2, out_indices=(0, 3)).out_channels == (128, 1024)
    assert classes.ResNet(18, expansion=1).expansion == 1
    assert classes.ResNet(50).out_channels == (2048,)
