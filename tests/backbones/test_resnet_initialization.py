"""How the weights of a ResNet are initialized: He's normal, ``zero_init_residual``, ``init_cfg``, ``pretrained``."""

import pytest
import torch

from resbackbone import ResNet, ResNeXt, WideResNet, build_backbone

TINY = {"base_channels": 8}
GROUPED = {"groups": 4, "base_width": 4}


def last_norms(net):
    blocks = [block for name in net.res_layers for block in getattr(net, name)]
    return [getattr(block, "norm3" if hasattr(block, "norm3") else "norm2") for block in blocks]


def values(parameters):
    return {value for parameter in parameters for value in parameter.tolist()}


@pytest.mark.parametrize(
    "init_cfg", [None, {"type": "Kaiming", "layer": "Conv2d"}, [{"type": "Xavier", "layer": "Conv2d"}]]
)
@pytest.mark.parametrize(
    ("net_class", "options"),
    [
        (ResNet, {"depth": 18}),
        (ResNet, {"depth": 50}),
        (ResNeXt, {"depth": 50, **GROUPED}),
        (WideResNet, {"depth": 50}),
    ],
    ids=["18", "50", "resnext", "wide"],
)
def test_zero_init_residual_makes_each_branch_zero(net_class, options, init_cfg):
    for zero in (True, False):
        net = net_class(zero_init_residual=zero, init_cfg=init_cfg, **options, **TINY)
        net.init_weights()
        assert len(last_norms(net)) == sum(net.stage_blocks)
        assert values(norm.weight for norm in last_norms(net)) == {0.0 if zero else 1.0}
        assert values(norm.bias for norm in last_norms(net)) == {0.0}
        assert values([net.norm1.weight]) == {1.0}


def test_zero_init_residual_reaches_group_norms_but_not_frozen_ones():
    group = ResNet(18, norm_cfg={"type": "GN", "num_groups": 4}, **TINY)
    frozen = ResNet(18, norm_cfg={"type": "FrozenBN"}, **TINY)
    for net, value in ((group, 0.0), (frozen, 1.0)):
        net.init_weights()
        assert values(norm.weight for norm in last_norms(net)) == {value}


def test_default_initialization_is_he_normal():
    net = build_backbone({"type": "ResNet", "depth": 18})
    weight = net.layer3[0].conv2.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)  # fan out
    net.init_weights()  # a second call changes nothing
    assert net.layer3[0].conv2.weight is weight


def test_init_weights_draws_once():
    net = ResNet(18, **TINY)
    net.init_weights()
    before = net.conv1.weight.clone()
    net.init_weights()
    assert torch.equal(net.conv1.weight, before)


@pytest.fixture
def trained(randomize_norms, tmp_path):
    """A net's weights in a file, its last norms far from zero."""
    net = randomize_norms(ResNet(18, **TINY))
    torch.save(net.state_dict(), tmp_path / "trained.pth")
    return str(tmp_path / "trained.pth"), net.state_dict()


@pytest.mark.parametrize("as_list", [False, True])
def test_pretrained_weights_are_loaded_last(trained, as_list):
    path, weights = trained
    pretrained = {"type": "Pretrained", "checkpoint": path}
    init_cfg = [pretrained, {"type": "Kaiming", "layer": "Conv2d"}] if as_list else pretrained
    net = build_backbone({"type": "ResNet", "depth": 18, "init_cfg": init_cfg, **TINY})
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())


def test_old_spelling_of_pretrained_warns_and_loads(trained):
    path, weights = trained
    with pytest.warns(FutureWarning, match="init_cfg=dict.type='Pretrained'"):
        net = ResNet(18, pretrained=path, **TINY)
    net.init_weights()
    assert torch.equal(net.layer4[1].bn2.weight, weights["layer4.1.bn2.weight"])


def test_build_backbone_loads_a_checkpoint(trained):
    path, weights = trained
    net = build_backbone({"type": "ResNet", "depth": 18, **TINY}, checkpoint=path)
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
