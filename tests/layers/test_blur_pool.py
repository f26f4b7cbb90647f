"""Low-pass downsampling: the filter, and the ResNets whose every stride it takes over."""

import copy

import pytest
import torch
from torch import nn

from resbackbone import ResNetAA, build_backbone
from resbackbone.blocks import Bottleneck
from resbackbone.layers import BlurPool2d, DeformConv2d


@pytest.mark.parametrize("kernel_size", [2, 3, 4, 5])
@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "constant"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_pixel_is_the_binomial_mean_of_those_around_it(kernel_size, padding_mode, stride):
    row = {2: [1, 1], 3: [1, 2, 1], 4: [1, 3, 3, 1], 5: [1, 4, 6, 4, 1]}[kernel_size]
    x = torch.randn(2, 3, 9, 8)
    out = BlurPool2d(3, kernel_size=kernel_size, stride=stride, padding_mode=padding_mode)(x)
    assert out.shape == (2, 3, -(-9 // stride), -(-8 // stride))
    pads = ((kernel_size - 1) // 2, kernel_size // 2) * 2
    padded = nn.functional.pad(x, pads, mode=padding_mode)
    expected = torch.zeros_like(out)
    for top in range(out.shape[2]):
        for left in range(out.shape[3]):
            for i, down in enumerate(row):
                for j, across in enumerate(row):
                    pixel = padded[:, :, top * stride + i, left * stride + j]
                    expected[:, :, top, left] += pixel * (down * across / sum(row) ** 2)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("padding_mode", ["reflect", "constant"])
def test_the_filter_is_timms(timm, kernel_size, padding_mode):
    theirs = timm.layers.BlurPool2d(4, filt_size=kernel_size, stride=2, pad_mode=padding_mode)
    x = torch.randn(1, 4, 11, 8)
    assert torch.equal(BlurPool2d(4, kernel_size=kernel_size, padding_mode=padding_mode)(x), theirs(x))


def test_the_filter_is_no_parameter_and_has_no_key():
    layer = BlurPool2d(4)
    assert layer.state_dict() == {}
    assert list(layer.parameters()) == []
    assert layer.double()(torch.randn(1, 4, 8, 8, dtype=torch.float64)).dtype == torch.float64
    assert copy.deepcopy(layer).filter.sum() == 4


def test_a_net_built_without_memory_gets_its_filters_on_loading(images):
    net = ResNetAA(18, base_channels=8).eval()
    for materialise in (False, True):
        with torch.device("meta"):
            twin = ResNetAA(18, base_channels=8).eval()
        if materialise:
            twin.to_empty(device="cpu")
        twin.load_state_dict(net.state_dict(), assign=not materialise)
        assert all(torch.equal(*pair) for pair in zip(twin(images), net(images), strict=True))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"channels": 0}, ValueError, "`channels` must be at least 1, got 0"),
        ({"kernel_size": 1}, ValueError, "`kernel_size` must be at least 2, got 1"),
        ({"stride": 2.0}, TypeError, "`stride` must be an integer, got 2.0"),
        ({"padding_mode": "zeros"}, ValueError, "`padding_mode` must be one of 'reflect', 'replicate', 'constant'"),
    ],
)
def test_what_does_not_fit_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        BlurPool2d(**{"channels": 4, **options})


def test_an_unknown_filter_is_refused_before_anything_is_built(built_convs):
    with pytest.raises(ValueError, match="`anti_aliasing` must be one of 'blur', 'average'; got 'gauss'"):
        build_backbone({"type": "ResNetAA", "depth": 18, "anti_aliasing": "gauss"})
    assert not built_convs


@pytest.mark.parametrize("anti_aliasing", ["blur", "average"])
@pytest.mark.parametrize(
    ("net_class", "options"),
    [
        (ResNetAA, {"depth": 18}),
        (ResNetAA, {"depth": 50, "style": "caffe"}),
        (ResNetAA, {"depth": 50, "deep_stem": True, "avg_down": True}),
        (ResNetAA, {"depth": 50, "groups": 4, "base_width": 4}),
    ],
    ids=["basic", "caffe", "deep", "grouped"],
)
def test_nothing_strides_but_stem_filters_and_shortcuts(anti_aliasing, net_class, options):
    net = net_class(base_channels=8, anti_aliasing=anti_aliasing, **options).eval()
    filter_class = BlurPool2d if anti_aliasing == "blur" else nn.AvgPool2d
    for name in ("layer2", "layer3", "layer4"):
        first, *others = getattr(net, name)
        filters = [child for key, child in first.named_children() if key.startswith("low_pass")]
        assert [type(layer) for layer in filters] == [filter_class]
        branch = [module for key, module in first.named_modules() if not key.startswith(("downsample", "low_pass"))]
        assert {conv.stride for conv in branch if isinstance(conv, nn.Conv2d)} == {(1, 1)}
        assert not [key for block in others for key, _ in block.named_children() if key.startswith("low_pass")]
    strided = "low_pass1" if options["depth"] < 50 or options.get("style") == "caffe" else "low_pass2"
    assert isinstance(getattr(net.layer2[0], strided), filter_class)
    pools = [module for module in net.maxpool.modules() if isinstance(module, nn.MaxPool2d)]
    assert [pool.stride for pool in pools] == ([1] if anti_aliasing == "blur" else [])
    assert net.out_strides == (4, 8, 16, 32)
    for size in ((64, 64), (65, 97)):
        shapes = [tuple(out.shape[2:]) for out in net(torch.randn(1, 3, *size))]
        assert shapes == [tuple(-(-side // stride) for side in size) for stride in net.out_strides]


def test_the_filter_runs_behind_the_relu_of_the_convolution_that_would_stride(randomize_norms):
    block = Bottleneck(32, 8, stride=2, anti_aliasing="blur", downsample=nn.AvgPool2d(2))
    block = randomize_norms(block).eval()
    x = torch.randn(2, 32, 8, 8)
    out = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())).relu()
    out = block.bn3(block.conv3(BlurPool2d(8)(out)))
    torch.testing.assert_close(block(x), (out + nn.functional.avg_pool2d(x, 2)).relu())


def test_a_shift_by_a_pixel_changes_less_than_in_a_resnet(randomize_norms):
    """What the filters are for: the classes' mean features hardly move."""

    def moved(config):
        torch.manual_seed(1)
        net = build_backbone(config, base_channels=16).eval()
        wave = torch.rand(4, 3, 80, 80)
        with torch.no_grad():
            first, second = (net(wave[..., s : s + 64, s : s + 64])[1] for s in (8, 9))
        return ((first - second).norm() / first.norm()).item()

    assert moved("resnetblur18") < 0.8 * moved("resnet18")


def test_no_convolution_falls_back_for_a_stride_that_is_not_there():
    dcn = {"type": "DCN", "deform_groups": 1, "fallback_on_stride": True, "backend": "torch"}
    net = ResNetAA(50, base_channels=8, dcn=dcn, stage_with_dcn=(False, True, False, False))
    assert [type(block.conv2) for block in net.layer2] == [DeformConv2d] * 4
