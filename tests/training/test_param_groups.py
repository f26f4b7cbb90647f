"""Parameter groups: learning rate and weight decay of each parameter."""

import re
from collections import Counter

import pytest
import torch
from cases import every_case, make, small
from torch import nn

from resbackbone import ResNet, ResNetV2, build_backbone
from resbackbone.layers import IBN, FrozenBatchNorm2d
from resbackbone.necks import FPN
from resbackbone.training import param_groups
from resbackbone.training.layer_depth import layer_depth

NORM = re.compile(r"\bbn\d|^norm\b|downsample\.1")  # in a ResNet and in this detector


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.neck = FPN(in_channels=backbone.out_channels, out_channels=8, num_outs=5)
        self.backbone = backbone
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(()))


def tiny(**options):
    return ResNet(**small("ResNet"), **options)


def settings(net, groups):
    """Return group name, learning rate and weight decay of each parameter."""
    found = {
        parameter: (group["name"], group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    return {name: found[parameter] for name, parameter in net.named_parameters() if parameter in found}


@every_case
@pytest.mark.parametrize("frozen_stages", [-1, 2])
def test_each_trainable_parameter_is_in_one_group(case, frozen_stages):
    net = make(case, frozen_stages=frozen_stages)
    groups = param_groups(net, 0.1, 0.9, 0.01)
    assert len({group["name"] for group in groups}) == len(groups)
    counts = Counter(parameter for group in groups for parameter in group["params"])
    assert set(counts.values()) == {1}
    assert set(counts) == {parameter for parameter in net.parameters() if parameter.requires_grad}
    for name, (_, lr, weight_decay) in settings(net, groups).items():
        depth, head = layer_depth(net, name)
        assert lr == pytest.approx(0.1 * 0.9 ** (head - depth))
        layer = net.get_submodule(name.rpartition(".")[0])
        without = name.endswith("bias") or isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d))
        assert weight_decay == (0 if without else 0.01), name


def test_learning_rates_decrease_from_head_to_stem():
    detector = Detector(tiny(norm_eval=False))
    found = settings(detector, param_groups(detector, 0.1, 0.5, 0.01))
    rates = {name: lr for name, (_, lr, _) in found.items()}
    assert rates["scale"] == rates["norm.weight"] == rates["neck.fpn_convs.0.conv.weight"] == 0.1
    assert rates["backbone.layer4.1.conv2.weight"] == 0.05
    assert rates["backbone.layer1.0.conv1.weight"] == 2 * rates["backbone.conv1.weight"] == 0.1 * 0.5**4
    without = {name for name, (_, _, decay) in found.items() if not decay}
    assert without == {name for name in found if name.endswith("bias") or NORM.search(name)}
    assert found["scale"][0] == "depth 5, decay"
    alone = settings(detector.backbone, param_groups(detector.backbone, 0.1, 0.5, 0.01))
    assert alone == {name.removeprefix("backbone."): setting for name, setting in found.items() if "backbone" in name}


def test_two_backbones():
    pair = nn.ModuleDict({"short": tiny(), "long": build_backbone("resnet50", base_channels=8)})
    found = settings(pair, param_groups(pair, 1.0, 0.5, 0.0))
    assert found["short.layer4.0.conv1.weight"] == found["long.layer4.0.conv1.weight"] == ("depth 6, decay", 0.5, 0.0)
    assert (found["short.conv1.weight"][1], found["long.conv1.weight"][1]) == (0.5**5, 0.5**7)


def test_two_groups_without_layer_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), IBN(4), nn.Conv2d(4, 4, 1), FrozenBatchNorm2d(4))
    decay, no_decay = param_groups(net, lr=0.1, weight_decay=0.01)
    assert (decay["name"], no_decay["name"]) == ("decay", "no decay")
    assert (decay["weight_decay"], no_decay["weight_decay"], decay["lr"]) == (0.01, 0.0, 0.1)
    assert list(map(id, decay["params"])) == [id(net[0].weight), id(net[2].weight)]


def test_no_decay():
    detector = Detector(tiny())
    for no_decay, expected in {
        (): set(),
        ("bias",): {name for name, _ in detector.named_parameters() if name.endswith("bias")},
        ("norm",): {name for name, _ in detector.named_parameters() if NORM.search(name)},
        ("neck.", "scale"): {name for name, _ in detector.named_parameters() if name.startswith(("neck.", "scale"))},
    }.items():
        found = settings(detector, param_groups(detector, 0.1, 1, 0.01, no_decay))
        assert {name for name, (group, _, _) in found.items() if group == "no decay"} == expected


def test_third_party_norms_have_no_decay():
    class MyRMSNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

    class NormedConv(nn.Conv2d):
        """A convolution, despite its name."""

    net = nn.Sequential(MyRMSNorm2d(), nn.SyncBatchNorm(3), nn.RMSNorm(3), NormedConv(3, 3, 1, bias=False))
    decay = param_groups(net, lr=0.1, weight_decay=0.01)[-1]
    assert (decay["name"], list(map(id, decay["params"]))) == ("decay", [id(net[3].weight)])


def test_tied_parameters_are_in_one_group():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert sum(len(group["params"]) for group in param_groups(net, 0.1)) == 3


def test_final_norm_has_the_learning_rate_of_the_head():
    net = ResNetV2(18, base_channels=8, final_norm=True, out_indices=(-1,))
    found = settings(net, param_groups(net, 0.1, 0.5))
    assert (found["bn.weight"][1], found["layer4.1.conv1.weight"][1]) == (0.1, 0.05)


def test_with_frozen():
    net = tiny(frozen_stages=2)
    groups = param_groups(net, 0.1, 0.5, 0.1, with_frozen=True)
    assert {p for group in groups for p in group["params"]} == set(net.parameters())
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for frozen_stages in (2, -1):
        net.freeze(frozen_stages)
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        sum(out.square().mean() for out in net(torch.randn(2, 3, 32, 32))).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in net.named_parameters():
            is_frozen = frozen_stages == 2 and name.startswith(("conv1", "bn1", "layer1", "layer2"))
            assert torch.equal(parameter, before[name]) is is_frozen, name


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"lr": "0.1"}, TypeError, "`lr` must be a number, got '0.1'"),
        ({"lr": float("nan")}, ValueError, "`lr` must be finite and not negative, got nan"),
        ({"layer_decay": 0}, ValueError, "`layer_decay` must be above 0 and at most 1, got 0"),
        ({"layer_decay": 1.5}, ValueError, "`layer_decay` must be above 0 and at most 1, got 1.5"),
        ({"weight_decay": -1}, ValueError, "`weight_decay` must be finite and not negative, got -1"),
        ({"no_decay": "bias"}, TypeError, "`no_decay` must be a list or tuple, got 'bias'"),
        ({"no_decay": (1,)}, TypeError, r"`no_decay\[0\]` must be 'norm', 'bias' or a part of parameter names"),
        ({"no_decay": ("norm", "bais")}, ValueError, "`no_decay` has 'bais', which is in no parameter name"),
    ],
)
def test_invalid_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        param_groups(tiny(), **{"lr": 0.1, **arguments})


def test_net_without_backbone_or_trainable_parameters():
    with pytest.raises(ValueError, match="`layer_decay` must be 1 for a Conv2d without a backbone of resbackbone"):
        param_groups(nn.Conv2d(3, 3, 1), lr=0.1, layer_decay=0.5)
    with pytest.raises(ValueError, match="ResNet has no trainable parameter; is everything frozen"):
        param_groups(tiny(frozen_stages=4), lr=0.1)
