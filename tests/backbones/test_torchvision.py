"""With the same weights, our backbones give what torchvision's models give, to the bit."""

import copy

import pytest
import torch
from torch import nn

from resbackbone import ResNet, ResNeXt, WideResNet

SMALL = {
    "resnet18": (ResNet, {"depth": 18}),
    "resnet34": (ResNet, {"depth": 34}),
    "resnet50": (ResNet, {"depth": 50}),
    "resnext50_32x4d": (ResNeXt, {"depth": 50, "groups": 32, "base_width": 4}),
    "wide_resnet50_2": (WideResNet, {"depth": 50}),
}
LARGE = {
    "resnet101": (ResNet, {"depth": 101}),
    "resnet152": (ResNet, {"depth": 152}),
    "resnext101_32x8d": (ResNeXt, {"depth": 101, "groups": 32, "base_width": 8}),
    "resnext101_64x4d": (ResNeXt, {"depth": 101, "groups": 64, "base_width": 4}),
    "wide_resnet101_2": (WideResNet, {"depth": 101}),
}
MODELS = {**SMALL, **LARGE}
LAYERS = ("layer1", "layer2", "layer3", "layer4")


@pytest.fixture
def build_pair(torchvision, randomize_norms):
    """Build our net and torchvision's, without its classifier, both with our random weights."""
    from torchvision.models._utils import IntermediateLayerGetter

    def build(name, replace_stride_with_dilation=None, **options):
        net_class, arguments = MODELS[name]
        ours = randomize_norms(net_class(norm_eval=False, **arguments, **options))
        with torch.device("meta"):  # no time for weights that are replaced
            theirs = torchvision.models.get_model(name, replace_stride_with_dilation=replace_stride_with_dilation)
        keys = theirs.load_state_dict(copy.deepcopy(ours.state_dict()), strict=False, assign=True)
        assert (keys.missing_keys, keys.unexpected_keys) == (["fc.weight", "fc.bias"], [])
        return ours, IntermediateLayerGetter(theirs, {layer: layer for layer in LAYERS})

    return build


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes_are_torchvisions(torchvision, name):
    net_class, arguments = MODELS[name]
    with torch.device("meta"):
        ours = net_class(**arguments).state_dict()
        theirs = torchvision.models.get_model(name).state_dict()
    del theirs["fc.weight"], theirs["fc.bias"]
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("name", MODELS)
def test_features_are_torchvisions_to_the_bit(build_pair, images, name):
    ours, theirs = build_pair(name)
    with torch.no_grad():
        features = ours.eval()(images)
        expected = theirs.eval()(images)
    assert list(expected) == [info.name for info in ours.feature_info]
    for feature, reference in zip(features, expected.values(), strict=True):
        assert feature.std() > 0.01  # zeros would agree as well
        assert torch.equal(feature, reference)


@pytest.mark.parametrize("name", SMALL)
def test_training_step_is_torchvisions_to_the_bit(build_pair, images, name):
    ours, theirs = build_pair(name)
    features = ours.train()(images)
    expected = theirs.train()(images)
    for outputs in (features, expected.values()):
        sum(output.square().mean() for output in outputs).backward()
    assert all(torch.equal(*pair) for pair in zip(features, expected.values(), strict=True))
    reference = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, reference[key]), key
    statistics = dict(theirs.named_buffers())
    for key, statistic in ours.named_buffers():
        assert torch.equal(statistic, statistics[key]), key


def test_contracted_dilation_is_torchvisions(build_pair, images):
    dilated = {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "contract_dilation": True}
    ours, theirs = build_pair("resnet50", replace_stride_with_dilation=[False, True, True], **dilated)
    assert [module.dilation for module in ours.modules() if isinstance(module, nn.Conv2d)] == [
        module.dilation for module in theirs.modules() if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        features, expected = ours.eval()(images), theirs.eval()(images)
    assert [feature.shape[-1] for feature in features] == [16, 8, 8, 8]
    assert all(torch.equal(*pair) for pair in zip(features, expected.values(), strict=True))


def dilate_as_smp(encoder, output_stride):
    """What segmentation_models_pytorch makes of its encoders' last stages: every convolution at the stage's rate."""
    for layer, rate in {8: {"layer3": 2, "layer4": 4}, 16: {"layer4": 2}}[output_stride].items():
        for conv in encoder[layer].modules():
            if isinstance(conv, nn.Conv2d):
                conv.stride, conv.dilation = (1, 1), (rate, rate)
                conv.padding = tuple(side // 2 * rate for side in conv.kernel_size)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", SMALL)
def test_features_at_an_output_stride_are_smps(build_pair, images, name, output_stride):
    dilated = {
        8: {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)},
        16: {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)},
    }[output_stride]
    ours, theirs = build_pair(name, **dilated, dilation_style="timm")
    dilate_as_smp(theirs, output_stride)
    with torch.no_grad():
        features, expected = ours.eval()(images), theirs.eval()(images)
    for feature, reference in zip(features, expected.values(), strict=True):
        # It dilates 1x1 convolutions too, which changes no number, but the kernel that computes them.
        assert (feature - reference).abs().max() <= 1e-5 * reference.abs().max()
