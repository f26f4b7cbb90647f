"""Layers replaced, added or deleted by hand: the net goes on as mmdet's would, and so does what is made of it."""

import copy
import pickle

import pytest
import torch
from cases import every_class, make
from torch import nn

from resbackbone import ResNet
from resbackbone.checkpoints import load_checkpoint
from resbackbone.complexity import measure
from resbackbone.inference import export, optimize, quantize
from resbackbone.training import fold_frozen_norms


def conv_like(conv, in_channels, **changes):
    options = {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding, **changes}
    return nn.Conv2d(in_channels, conv.out_channels, bias=False, **options)


def for_four_channels(net):
    """What users of multispectral images do."""
    if net.deep_stem:
        net.stem[0] = conv_like(net.stem[0], 4)
    else:
        net.conv1 = conv_like(net.conv1, 4)
    return 4


def behind_a_projection(net):
    net.conv1 = nn.Sequential(nn.Conv2d(5, 3, 1), net.conv1)
    return 5


def deleted_and_added_again(net):
    conv = conv_like(net.conv1, 6)
    del net.conv1
    net.conv1 = conv
    return 6


def for_small_images(net):
    net.conv1 = conv_like(net.conv1, 3, kernel_size=3, stride=1, padding=1)
    net.maxpool = nn.Identity()
    return 3


def without_a_stem(net):
    channels = net.in_channels = net.stem_channels
    net.conv1 = net.relu = net.maxpool = nn.Identity()
    setattr(net, net.norm1_name, nn.Identity())
    return channels


def without_the_last_stage(net):
    net.layer4 = nn.Identity()
    return 3


def with_the_last_stage_deleted(net):
    del net.layer4
    net.res_layers.pop()
    net.out_indices = net.out_indices[:-1]
    return 3


def with_more_in_a_stage(net):
    net.layer1 = nn.Sequential(net.layer1, nn.ReLU())
    return 3


def with_a_head(net):
    net.fc = nn.Linear(net.out_channels[-1], 10)
    return 3


SURGERY = [
    for_four_channels,
    behind_a_projection,
    deleted_and_added_again,
    for_small_images,
    without_a_stem,
    without_the_last_stage,
    with_the_last_stage_deleted,
    with_more_in_a_stage,
    with_a_head,
]
every_surgery = pytest.mark.parametrize("operate", SURGERY)


@pytest.fixture
def operated(shake):
    """A net after surgery, in eval mode, and images for it."""

    def build(operate, case="ResNet", **options):
        net = shake(make(case, **options))
        channels = operate(net)
        return net.eval(), torch.randn(2, channels, 64, 64)

    return build


def assert_close(outs, expected):
    assert len(outs) == len(expected)
    for out, reference in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, reference, rtol=1e-3, atol=1e-3 * reference.abs().max().item())


@every_class
@torch.no_grad()
def test_r2_a_first_convolution_for_four_channels(operated, case):
    net, images = operated(for_four_channels, case)
    outs = net(images)
    assert net.in_channels == 4
    assert [out.shape[1] for out in outs] == list(net.out_channels)
    for backend in ("onednn", "eager"):
        assert_close(optimize(net, backend=backend)(images), outs)
    assert_close(fold_frozen_norms(copy.deepcopy(net))(images), outs)
    with pytest.raises(ValueError, match=r"takes images of shape \(N, 4, H, W\), got \(2, 3, 64, 64\)"):
        net(images[:, :3])


@every_surgery
@torch.no_grad()
def test_r2_surgery_and_what_is_made_of_the_net_then(operated, tmp_path, operate):
    net, images = operated(operate)
    outs = net(images)
    assert [(out.shape[1], 64 // out.shape[2]) for out in outs] == list(
        zip(net.out_channels, net.out_strides, strict=True)
    )
    assert net.in_channels == images.shape[1]
    for backend in ("onednn", "eager"):
        fast = optimize(net, backend=backend)
        assert_close(fast(images), outs)
        assert fast.feature_info == net.feature_info
    assert [out.shape for out in quantize(net, images)(images)] == [out.shape for out in outs]
    assert_close(fold_frozen_norms(copy.deepcopy(net))(images), outs)
    assert_close(pickle.loads(pickle.dumps(net))(images), outs)
    export(net, tmp_path / "net.pt2", "torch-export")
    assert measure(net, size=64).parts[-1].channels == net.out_channels[-1]


@every_surgery
def test_r2_surgery_and_training(operated, operate):
    net, images = operated(operate)
    net.freeze(1)
    outs = net.train()(images)
    assert not any(parameter.requires_grad for module in net.frozen_modules() for parameter in module.parameters())
    assert {"conv1.weight", "layer1.0.conv1.weight"} & {
        name for name, parameter in net.named_parameters() if parameter.requires_grad
    } == set()
    sum(out.square().mean() for out in outs).backward()
    net.freeze(-1)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_r2_weights_for_three_channels_are_adapted_to_the_layer_that_is_there(shake, tmp_path):
    net = shake(ResNet(18, base_channels=8))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    other = ResNet(18, base_channels=8)
    for_four_channels(other)
    load_checkpoint(other, tmp_path / "net.pth")
    assert other.conv1.weight.shape[1] == 4
    assert torch.equal(other.layer4[1].conv2.weight, net.layer4[1].conv2.weight)


def test_r2_a_layer_that_is_no_convolution_takes_what_it_likes(images):
    class Normalized(nn.Module):
        def forward(self, x):
            return x.float() / 255

    net = ResNet(18, base_channels=8).eval()
    bytes_ = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    expected = net(bytes_.float() / 255)
    net.conv1 = nn.Sequential(Normalized(), net.conv1)
    assert all(map(torch.equal, net(bytes_), expected))
    assert_close(optimize(net)(bytes_), expected)


def test_r2_a_lazy_convolution_finds_its_channels(images):
    net = ResNet(18, base_channels=8)
    net.conv1 = nn.LazyConv2d(8, 7, 2, 3, bias=False)
    net(images.repeat(1, 2, 1, 1))
    assert net.in_channels == 6
    with pytest.raises(ValueError, match=r"\(N, 6, H, W\)"):
        net(images)
