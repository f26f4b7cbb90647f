"""Warnings about what a caller wrote name the caller's line, however deep inside the package they begin."""

import warnings
from contextlib import suppress

import pytest
from torch import nn

from resbackbone import MODELS, RegNet, ResNet, ResNetV1d, build_backbone
from resbackbone.inference import optimize
from resbackbone.layers import DeformConv2d
from resbackbone.necks import FPN

TINY = {"depth": 18, "base_channels": 8}
WRONG = {
    "pretrained": ({"pretrained": "net.pth"}, FutureWarning, "old spelling"),
    "dcn": ({"dcn": {"type": "DCN"}}, UserWarning, "`dcn` has no effect"),
    "folding": ({"norm_cfg": {"type": "GN", "num_groups": 4}, "fold_frozen_norms": True}, UserWarning, "no effect"),
}


class Mine(ResNetV1d):
    """A subclass without a constructor of its own."""


DOORS = {
    "ResNet": lambda **config: ResNet(**config),
    "ResNetV1d": lambda **config: ResNetV1d(**config),
    "a subclass": lambda **config: Mine(**config),
    "build_backbone": lambda **config: build_backbone({"type": "ResNet", **config}),
    "build_backbone, another class": lambda **config: build_backbone({"type": "ResNetV1d", **config}),
    "MODELS.build": lambda **config: MODELS.build({"type": "ResNetV1d", **config}),
    "the scope": lambda **config: MODELS.build({"type": "resbackbone.ResNetV1d", **config}),
}


def warned_of(call, category, words):
    """The one warning of this kind that a call raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with suppress(FileNotFoundError):  # there is no net.pth
            call()
    (found,) = [one for one in caught if words in str(one.message)]
    assert found.category is category
    return found


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("door", DOORS)
def test_a_warning_names_the_line_that_builds(door, wrong):
    config, category, words = WRONG[wrong]
    found = warned_of(lambda: DOORS[door](**TINY, **config), category, words)
    assert found.filename == __file__
    assert found.lineno == DOORS[door].__code__.co_firstlineno


@pytest.mark.parametrize("build", [RegNet, lambda *args, **config: build_backbone({"type": "RegNet", **config})])
def test_a_warning_of_a_regnet_names_the_line_that_builds(build):
    found = warned_of(lambda: build(arch="regnetx_400mf", base_channels=64), UserWarning, "does nothing in a RegNet")
    assert found.filename == __file__


def test_a_warning_of_a_layer_names_the_line_that_builds():
    found = warned_of(lambda: DeformConv2d(4, 4, 3, deformable_groups=2), FutureWarning, "deprecated")
    assert found.filename == __file__


@pytest.mark.parametrize("neck", [False, True])
def test_a_warning_about_hooks_names_the_line_that_optimizes(neck):
    net = ResNet(**TINY).eval()
    net.layer1.register_forward_hook(print)
    model = nn.Sequential(net, FPN(net.out_channels, 8, num_outs=4)).eval() if neck else net
    found = warned_of(lambda: optimize(model, backend="eager"), UserWarning, "are dropped")
    assert found.filename == __file__
