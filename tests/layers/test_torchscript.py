"""TorchScript: what can be traced is, and scripting is refused in words."""

import warnings

import pytest
import torch
from cases import every_class, make
from torch import nn

from resbackbone import ResNet
from resbackbone.inference import optimize, quantize
from resbackbone.necks import FPN
from resbackbone.training.classification import ImageClassifier


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch calls all of torch.jit deprecated
        warnings.filterwarnings("ignore", ".*torch.jit.*", category=FutureWarning)
        yield


@pytest.fixture
def net(randomize_norms):
    return randomize_norms(ResNet(18, base_channels=8)).eval()


def assert_refused(model, name):
    with pytest.raises(TypeError, match=rf"torch\.jit\.script cannot compile {name}: use torch\.jit\.trace"):
        torch.jit.script(model)


@every_class
def test_scripting_a_backbone_is_refused(case):
    net = make(case)
    assert_refused(net, type(net).__name__)


def test_scripting_what_holds_one_is_refused(net, images):
    fpn = FPN(net.out_channels, 8, num_outs=5)
    assert_refused(nn.Sequential(net, fpn), "ResNet")
    assert_refused(fpn, "FPN")
    assert_refused(net.layer1[0], "BasicBlock")
    assert_refused(ImageClassifier({"type": "ResNet", "depth": 18, "base_channels": 8}, num_classes=3), "ResNet")
    assert_refused(quantize(net, images), "QuantizedEngine")
    for backend in ("onednn", "eager"):
        assert_refused(optimize(net, backend=backend), r"\w+Engine")


@pytest.mark.parametrize("backend", ["onednn", "eager"])
def test_an_optimized_net_is_traced(net, images, backend):
    model = nn.Sequential(net, FPN(net.out_channels, 8, num_outs=5)).eval()
    fast = optimize(model, backend=backend)
    traced = torch.jit.trace(fast, images)
    for x in (images, torch.randn(3, 3, 96, 80)):
        for out, expected in zip(traced(x), fast(x), strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_tracing_a_quantized_net_is_refused(net, images):
    with pytest.raises(TypeError, match=r"torch\.jit\.trace cannot record a quantized net"):
        torch.jit.trace(quantize(net, images), images)
