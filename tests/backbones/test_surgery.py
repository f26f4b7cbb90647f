"""Layers replaced, added or deleted by hand: the net goes on as mmdet's would, and so does what is made of it."""

import copy
import pickle

import pytest
import torch
from cases import every_class, make
from torch import nn
from torch.nn.utils import prune

from resbackbone import ResNet
from resbackbone.analysis.cost import measure
from resbackbone.backbones import resnet
from resbackbone.checkpoints import load_checkpoint
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


def with_a_weight_for_four_channels(net):
    net.conv1.weight = nn.Parameter(torch.randn(net.conv1.out_channels, 4, 7, 7) / 10)
    return 4


def with_another_last_stage(net):
    channels = net.out_channels[-2]
    net.layer4 = nn.Sequential(nn.Conv2d(channels, channels // 2, 3, 2, 1), nn.ReLU())
    return 3


def with_another_stage_in_the_middle(net):
    before, after = net.out_channels[1:3]
    net.layer3 = nn.Sequential(nn.Conv2d(before, after, 1), nn.BatchNorm2d(after), nn.ReLU())
    return 3


def with_a_projection_after_a_stage(net):
    net.layer4.add_module("reduce", nn.Conv2d(net.out_channels[-1], 5, 1))
    return 3


def with_a_finer_last_stage(net):
    net.layer4[0].conv1.stride = net.layer4[0].downsample[0].stride = (1, 1)
    return 3


def with_an_upsampled_stage(net):
    net.layer4 = nn.Sequential(net.layer4, nn.Upsample(scale_factor=2))
    return 3


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
    with_a_weight_for_four_channels,
    with_another_last_stage,
    with_another_stage_in_the_middle,
    with_a_projection_after_a_stage,
    with_a_finer_last_stage,
    with_an_upsampled_stage,
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
def operated(randomize_norms):
    """A net after surgery, in eval mode, and images for it."""

    def build(operate, case="ResNet", **options):
        net = randomize_norms(make(case, **options))
        channels = operate(net)
        return net.eval(), torch.randn(2, channels, 64, 64)

    return build


def assert_close(outs, expected):
    assert len(outs) == len(expected)
    for out, reference in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, reference, rtol=1e-3, atol=1e-3 * reference.abs().max().item())


@every_class
@torch.no_grad()
def test_a_first_convolution_for_four_channels(operated, case):
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
def test_surgery_and_what_is_made_of_the_net_then(operated, tmp_path, operate):
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
def test_surgery_and_training(operated, operate):
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


def test_weights_for_three_channels_are_adapted_to_the_layer_that_is_there(randomize_norms, tmp_path):
    net = randomize_norms(ResNet(18, base_channels=8))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    other = ResNet(18, base_channels=8)
    for_four_channels(other)
    load_checkpoint(other, tmp_path / "net.pth")
    assert other.conv1.weight.shape[1] == 4
    assert torch.equal(other.layer4[1].conv2.weight, net.layer4[1].conv2.weight)


def test_a_layer_that_is_no_convolution_takes_what_it_likes(images):
    class Normalized(nn.Module):
        def forward(self, x):
            return x.float() / 255

    net = ResNet(18, base_channels=8).eval()
    bytes_ = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    expected = net(bytes_.float() / 255)
    net.conv1 = nn.Sequential(Normalized(), net.conv1)
    assert all(map(torch.equal, net(bytes_), expected))
    assert_close(optimize(net)(bytes_), expected)


def test_a_lazy_convolution_finds_its_channels(images):
    net = ResNet(18, base_channels=8)
    net.conv1 = nn.LazyConv2d(8, 7, 2, 3, bias=False)
    net(images.repeat(1, 2, 1, 1))
    assert net.in_channels == 6
    with pytest.raises(ValueError, match=r"\(N, 6, H, W\)"):
        net(images)


def widened_by_its_weight(net, channels=4):
    conv = net.stem[0] if net.deep_stem else net.conv1
    shape = conv.weight.shape
    conv.weight = nn.Parameter(torch.randn(shape[0], channels // conv.groups, *shape[2:]) / 10)
    return channels


@every_class
@torch.no_grad()
def test_a_weight_for_four_channels(operated, case):
    net, images = operated(widened_by_its_weight, case)
    assert net.in_channels == 4
    assert_close(optimize(net)(images), net(images))
    with pytest.raises(ValueError, match=r"takes images of shape \(N, 4, H, W\), got \(2, 3, 64, 64\)"):
        net(images[:, :3])


@torch.no_grad()
def test_a_weight_of_a_grouped_convolution():
    net = ResNet(18, base_channels=8).eval()
    net.conv1 = nn.Conv2d(4, 8, 7, 2, 3, groups=2, bias=False)
    assert net.in_channels == 4
    net.conv1.weight = nn.Parameter(torch.randn(8, 3, 7, 7))
    assert net.in_channels == 6
    net(torch.randn(1, 6, 64, 64))


@pytest.mark.filterwarnings("ignore:.*(spectral|weight)_norm:FutureWarning")
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    ],
    ids=["parametrized", "two parts", "hook", "pruned"],
)
def test_a_weight_that_is_computed(change, channels):
    net = ResNet(18, base_channels=8)
    if channels != 3:
        widened_by_its_weight(net, channels)
    change(net.conv1)
    vector = {name: value.clone() for name, value in net.conv1.state_dict().items()}
    assert net.in_channels == channels
    assert all(torch.equal(value, vector[name]) for name, value in net.conv1.state_dict().items())
    net(torch.randn(2, channels, 64, 64))
    with pytest.raises(ValueError, match=rf"\(N, {channels}, H, W\)"):
        net(torch.randn(2, 5, 64, 64))


def test_a_parametrization_may_make_more_channels_of_a_weight():
    class Gray(nn.Module):
        def forward(self, weight):
            return weight.expand(-1, 3, -1, -1)

        def right_inverse(self, weight):
            return weight.mean(1, keepdim=True)

    net = ResNet(18, base_channels=8)
    nn.utils.parametrize.register_parametrization(net.conv1, "weight", Gray())
    net(torch.randn(2, 3, 64, 64))


@torch.no_grad()
def test_a_weight_for_four_channels_in_a_graph(operated, tmp_path):
    net, images = operated(widened_by_its_weight)
    torch.save(ResNet(18, base_channels=8).state_dict(), tmp_path / "net.pth")
    expected = net(images)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for run in (compiled, torch.jit.trace(net, images), torch.export.export(net, (images,)).module()):
        assert_close(run(images), expected)


@every_class
def test_a_net_that_nobody_changed_is_not_measured(monkeypatch, case):
    net = make(case)
    monkeypatch.setattr(resnet, "shapes_only", None)
    for same in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)), optimize(net.eval())):
        assert same.feature_info == net.feature_info
        assert same.out_channels == net.out_channels


@every_class
def test_what_is_measured_is_what_was_built(case):
    net = make(case)
    assert net._measure_levels() == net._levels()


@every_class
@torch.no_grad()
def test_another_last_stage_in_every_class(operated, case):
    def replace(net):
        last = net.res_layers[-1]
        channels = net._levels()[len(net.res_layers) - 2].channels
        setattr(net, last, nn.Sequential(nn.Conv2d(channels, 7, 3, 2, 1), nn.ReLU()))
        if getattr(net, "final_norm_name", None):
            setattr(net, net.final_norm_name, nn.BatchNorm2d(7))
        return 3

    net, images = operated(replace, case)
    assert [out.shape[1] for out in net(images)] == list(net.out_channels)
    assert [64 // out.shape[2] for out in net(images)] == list(net.out_strides)
    assert copy.deepcopy(net).feature_info == pickle.loads(pickle.dumps(net)).feature_info == net.feature_info


def test_measuring_runs_nobodys_hooks_and_changes_nothing():
    net = ResNet(18, base_channels=8)
    seen = []
    net.layer1.register_forward_hook(lambda *_: seen.append("hook"))
    net.layer4 = nn.Sequential(nn.Conv2d(32, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert net.out_channels == (8, 16, 32, 4)
    assert net.out_strides == (4, 8, 16, 16)
    assert not seen
    assert net.layer4.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net(torch.randn(2, 3, 64, 64))
    assert seen == ["hook"]


def test_a_stage_that_does_not_run_without_memory_says_itself_what_it_returns():
    class ByValue(nn.Module):
        def __init__(self, **told):
            super().__init__()
            vars(self).update(told)

        def forward(self, x):
            return x[:, : 4 if x.sum().item() else 5, ::2, ::2]

    net = ResNet(18, base_channels=8)
    net.layer4 = ByValue(out_channels=4, stride=2)
    assert (net.out_channels, net.out_strides) == ((8, 16, 32, 4), (4, 8, 16, 32))
    net.layer4 = ByValue()
    assert net.out_channels == (8, 16, 32, 64)


def test_other_norms_leave_what_is_told_of_the_maps():
    net = ResNet(18, base_channels=8)
    expected = net.feature_info
    assert nn.SyncBatchNorm.convert_sync_batchnorm(net).feature_info == expected
    assert net.half().feature_info == expected
