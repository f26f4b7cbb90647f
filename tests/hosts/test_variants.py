"""Res2Net, ResNeSt, SE-ResNe(X)t and the CIFAR ResNet give the numbers of their OpenMMLab originals, to the bit."""

import importlib
import re
import sys
import warnings
from importlib.util import find_spec, module_from_spec

import pytest
import torch
from sweep_hosts import compare_backbones
from torch import nn

import resbackbone

# What the hosts have different defaults for; a case may say otherwise.
SHARED = {"out_indices": (0, 1, 2, 3), "norm_eval": False, "depth": 50}
DILATED = {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)}
DCN = {"dcn": {"type": "DCNv2", "deform_groups": 1}, "stage_with_dcn": (False, False, True, True)}
PLUGIN = {"plugins": [{"cfg": {"type": "ContextBlock", "ratio": 1 / 8}, "position": "after_conv3"}]}
# Ours only: what says mmpretrain's ways.
POOLS = {"pool_at_stride_1": True}

STEM = {
    r"^stem\.(\d)\.conv": lambda match: f"stem.{3 * int(match[1])}",
    r"^stem\.(\d)\.bn": lambda match: f"stem.{3 * int(match[1]) + 1}",
}
# mmpretrain has no pooling in a shortcut that does not stride.
SHORTCUT = {r"^(layer1\.0\.downsample)\.(\d)": lambda match: f"{match[1]}.{int(match[2]) + 1}"}

# The host, the class, options of both, options of ours alone, and how the host's keys read with us.
CASES = {
    "res2net": ("mmdet", "Res2Net", {}, {}, {}),
    "res2net-8s": ("mmdet", "Res2Net", {"scales": 8, "base_width": 14}, {}, {}),
    "res2net-2s": ("mmdet", "Res2Net", {"scales": 2, "base_width": 48}, {}, {}),
    "res2net-101": ("mmdet", "Res2Net", {"depth": 101, "frozen_stages": 1, "norm_eval": True}, {}, {}),
    "res2net-dilated": ("mmdet", "Res2Net", DILATED, {}, {}),
    "res2net-gn": ("mmdet", "Res2Net", {"norm_cfg": {"type": "GN", "num_groups": 2}}, {}, {}),
    "res2net-dcn": ("mmdet", "Res2Net", DCN, {}, {}),
    "res2net-plugin": ("mmdet", "Res2Net", PLUGIN, {}, {}),
    "res2net-v1b": ("mmpretrain", "Res2Net", {}, POOLS, STEM),
    "res2net-v1": ("mmpretrain", "Res2Net", {"deep_stem": False, "avg_down": False}, POOLS, {}),
    "res2net-v1-dilated": ("mmpretrain", "Res2Net", {"deep_stem": False, "avg_down": False, **DILATED}, POOLS, {}),
    "res2net-v1-caffe": ("mmpretrain", "Res2Net", {"deep_stem": False, "avg_down": False, "style": "caffe"}, POOLS, {}),
    "resnest": ("mmdet", "ResNeSt", {}, {}, {}),
    "resnest-101": ("mmdet", "ResNeSt", {"depth": 101, "stem_channels": 128, "frozen_stages": 1}, {}, {}),
    "resnest-200": ("mmdet", "ResNeSt", {"depth": 200, "base_channels": 16, "stem_channels": 32}, {}, {}),
    "resnest-groups": ("mmdet", "ResNeSt", {"groups": 2, "base_width": 40, "radix": 4}, {}, {}),
    "resnest-radix-1": ("mmdet", "ResNeSt", {"groups": 4, "base_width": 24, "radix": 1}, {}, {}),
    "resnest-reduction": ("mmdet", "ResNeSt", {"reduction_factor": 2, "avg_down_stride": False}, {}, {}),
    "resnest-caffe": ("mmdet", "ResNeSt", {"style": "caffe"}, {}, {}),
    "resnest-dcn": ("mmdet", "ResNeSt", DCN, {}, {}),
    "resnest-plugin": ("mmdet", "ResNeSt", PLUGIN, {}, {}),
    "resnest-gn": ("mmdet", "ResNeSt", {"norm_cfg": {"type": "GN", "num_groups": 8}}, {}, {}),
    "resnest-mmseg": ("mmseg", "ResNeSt", {**DILATED, "multi_grid": (1, 2, 4), "contract_dilation": True}, {}, {}),
    "resnest-pretrain": ("mmpretrain", "ResNeSt", {}, {}, STEM | SHORTCUT),
    "resnest-269": ("mmpretrain", "ResNeSt", {"depth": 269, "stem_channels": 128}, {}, STEM | SHORTCUT),
    "seresnet-50": ("mmpretrain", "SEResNet", {}, {}, {}),
    "seresnet-101": ("mmpretrain", "SEResNet", {"depth": 101}, {}, {}),
    "seresnet-152": ("mmpretrain", "SEResNet", {"depth": 152, "base_channels": 16, "stem_channels": 16}, {}, {}),
    "seresnet-ratio": ("mmpretrain", "SEResNet", {"se_ratio": 8, "style": "caffe", "frozen_stages": 1}, {}, {}),
    "seresnext-50": ("mmpretrain", "SEResNeXt", {}, {}, {}),
    "seresnext-101": ("mmpretrain", "SEResNeXt", {"depth": 101, "groups": 32}, {}, {}),
    "cifar-18": ("mmpretrain", "ResNet_CIFAR", {"depth": 18}, {}, {}),
    "cifar-50": ("mmpretrain", "ResNet_CIFAR", {"frozen_stages": 1, "avg_down": False}, {}, {}),
}
QUICK = {
    "res2net",
    "res2net-v1b",
    "resnest",
    "resnest-groups",
    "resnest-pretrain",
    "seresnet-ratio",
    "seresnext-50",
    "cifar-18",
}


class Renamed(nn.Module):
    """A host's backbone with its keys as they read with us."""

    def __init__(self, net, rules):
        super().__init__()
        self.net = net
        self.rules = rules

    def key(self, key):
        for pattern, replacement in self.rules.items():
            key = re.sub(pattern, replacement, key)
        return key

    def forward(self, x):
        return self.net(x)

    def named_parameters(self, *args, **kwargs):
        return ((self.key(key), parameter) for key, parameter in self.net.named_parameters())

    def named_buffers(self, *args, **kwargs):
        return ((self.key(key), buffer) for key, buffer in self.net.named_buffers())

    def state_dict(self):
        return {self.key(key): value for key, value in self.net.state_dict().items()}


def native_class(host, name):
    """Find a host's backbone class, or skip the test."""
    if find_spec(host) is None:
        pytest.skip(f"{host} is not installed; tools/test_hosts.sh installs it")
    module = f"{host}.models.backbones.{name.lower()}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about third parties, while it is imported
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError:
            return getattr(import_alone(module), name)


def import_alone(name):
    """Import a backbone's module without running the packages around it.

    mmpretrain's import torchvision and much else that is not always there, and that its ResNets do not need.
    """
    host = name.partition(".")[0]
    for package in (host, f"{host}.models", f"{host}.models.utils", f"{host}.models.backbones"):
        if package not in sys.modules:
            sys.modules[package] = module_from_spec(find_spec(package))
    return importlib.import_module(name)


def parameters():
    return [
        pytest.param(*case, id=id_, marks=[] if id_ in QUICK else [pytest.mark.slow]) for id_, case in CASES.items()
    ]


@pytest.mark.parametrize(("host", "name", "options", "ours_alone", "rules"), parameters())
def test_identical(host, name, options, ours_alone, rules):
    native = native_class(host, name)(**{**SHARED, **options})
    ours = getattr(resbackbone, name)(**{**SHARED, **options, **ours_alone})
    size = 96 if "dcn" in options else 64  # mmcv's deformable convolution wants maps of 3x3 pixels at least
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    if name == "ResNet_CIFAR":
        images = images[:, :, :32, :32]
    differences = compare_backbones(Renamed(native, rules), ours, images)
    assert not differences, "\n".join(differences)


def test_pooling_is_what_the_two_hosts_differ_in():
    """Without the switch, mmpretrain's Res2Net is not ours from the first stage on."""
    native = native_class("mmpretrain", "Res2Net")(**SHARED)
    differences = compare_backbones(Renamed(native, STEM), resbackbone.Res2Net(**SHARED), torch.randn(2, 3, 32, 32))
    assert "eval output 0: off by" in "\n".join(differences)
