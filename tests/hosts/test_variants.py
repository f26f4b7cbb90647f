"""Res2Net, ResNeSt, SE-ResNe(X)t and the CIFAR ResNet give the numbers of their OpenMMLab originals, to the bit.

The sweep compares what the hosts' configs ask for; here is what their classes could be asked for besides.
"""

from importlib.util import find_spec

import pytest
import torch
from sweep_hosts import Case, build_pair, compare_backbones, compare_case

import resbackbone

SHARED = {"depth": 50, "out_indices": (0, 1, 2, 3), "norm_eval": False}
DILATED = {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)}
DCN = {"dcn": {"type": "DCNv2", "deform_groups": 1}, "stage_with_dcn": (False, False, True, True)}
PLUGIN = {"plugins": [{"cfg": {"type": "ContextBlock", "ratio": 1 / 8}, "position": "after_conv3"}]}
V1 = {"deep_stem": False, "avg_down": False}

# The host, the class and its options.
CASES = {
    "res2net": ("mmdet", "Res2Net", {}),
    "res2net-8s": ("mmdet", "Res2Net", {"scales": 8, "base_width": 14}),
    "res2net-2s": ("mmdet", "Res2Net", {"scales": 2, "base_width": 48}),
    "res2net-101": ("mmdet", "Res2Net", {"depth": 101, "frozen_stages": 1, "norm_eval": True}),
    "res2net-dilated": ("mmdet", "Res2Net", DILATED),
    "res2net-gn": ("mmdet", "Res2Net", {"norm_cfg": {"type": "GN", "num_groups": 2}}),
    "res2net-dcn": ("mmdet", "Res2Net", DCN),
    "res2net-plugin": ("mmdet", "Res2Net", PLUGIN),
    "res2net-v1b": ("mmpretrain", "Res2Net", {}),
    "res2net-v1": ("mmpretrain", "Res2Net", V1),
    "res2net-v1-dilated": ("mmpretrain", "Res2Net", {**V1, **DILATED}),
    "res2net-v1-caffe": ("mmpretrain", "Res2Net", {**V1, "style": "caffe"}),
    "resnest": ("mmdet", "ResNeSt", {}),
    "resnest-101": ("mmdet", "ResNeSt", {"depth": 101, "stem_channels": 128, "frozen_stages": 1}),
    "resnest-200": ("mmdet", "ResNeSt", {"depth": 200, "base_channels": 16, "stem_channels": 32}),
    "resnest-groups": ("mmdet", "ResNeSt", {"groups": 2, "base_width": 40, "radix": 4}),
    "resnest-radix-1": ("mmdet", "ResNeSt", {"groups": 4, "base_width": 24, "radix": 1}),
    "resnest-reduction": ("mmdet", "ResNeSt", {"reduction_factor": 2, "avg_down_stride": False}),
    "resnest-caffe": ("mmdet", "ResNeSt", {"style": "caffe"}),
    "resnest-dcn": ("mmdet", "ResNeSt", DCN),
    "resnest-plugin": ("mmdet", "ResNeSt", PLUGIN),
    "resnest-gn": ("mmdet", "ResNeSt", {"norm_cfg": {"type": "GN", "num_groups": 8}}),
    "resnest-mmseg": ("mmseg", "ResNeSt", {**DILATED, "multi_grid": (1, 2, 4), "contract_dilation": True}),
    "resnest-pretrain": ("mmpretrain", "ResNeSt", {}),
    "resnest-269": ("mmpretrain", "ResNeSt", {"depth": 269, "stem_channels": 128}),
    "seresnet-50": ("mmpretrain", "SEResNet", {}),
    "seresnet-101": ("mmpretrain", "SEResNet", {"depth": 101}),
    "seresnet-152": ("mmpretrain", "SEResNet", {"depth": 152, "base_channels": 16, "stem_channels": 16}),
    "seresnet-ratio": ("mmpretrain", "SEResNet", {"se_ratio": 8, "style": "caffe", "frozen_stages": 1}),
    "seresnext-50": ("mmpretrain", "SEResNeXt", {}),
    "seresnext-101": ("mmpretrain", "SEResNeXt", {"depth": 101, "groups": 32}),
    "resnet-pretrain-expansion": ("mmpretrain", "ResNet", {"expansion": 2, "base_channels": 32}),
    "resnet-pretrain-d-dilated": ("mmpretrain", "ResNetV1d", {**DILATED, "frozen_stages": 2}),
    "resnet-pretrain-d-gn": ("mmpretrain", "ResNetV1d", {"norm_cfg": {"type": "GN", "num_groups": 8}}),
    "resnet-pretrain-drop-path": ("mmpretrain", "ResNet", {"depth": 34, "drop_path_rate": 0.3}),
    "resnext-pretrain-width": ("mmpretrain", "ResNeXt", {"groups": 8, "width_per_group": 14}),
    "cifar-18": ("mmpretrain", "ResNet_CIFAR", {"depth": 18}),
    "cifar-50": ("mmpretrain", "ResNet_CIFAR", {"frozen_stages": 1, "avg_down": False}),
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
    "resnet-pretrain-expansion",
    "resnet-pretrain-drop-path",
    "resnext-pretrain-width",
}


def parameters():
    return [
        pytest.param(*case, id=id_, marks=[] if id_ in QUICK else [pytest.mark.slow]) for id_, case in CASES.items()
    ]


@pytest.fixture
def host(request):
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed; tools/test_hosts.sh installs it")
    return request.param


@pytest.mark.parametrize(("host", "name", "options"), parameters(), indirect=["host"])
def test_identical(host, name, options):
    differences = compare_case(Case(name, {"type": name, **SHARED, **options}), host).differences
    assert not differences, "\n".join(differences)


@pytest.mark.parametrize("host", ["mmpretrain"], indirect=True)
def test_pooling_is_what_the_two_hosts_differ_in(host):
    """Without the switch, mmpretrain's Res2Net is not ours from the first stage on."""
    native, pooling = build_pair(host, {"type": "Res2Net", **SHARED, **V1})
    images = torch.randn(2, 3, 32, 32)
    assert not compare_backbones(native, pooling, images)
    differences = compare_backbones(native, resbackbone.Res2Net(**SHARED, **V1), images)
    assert "eval output 0: off by" in "\n".join(differences)
