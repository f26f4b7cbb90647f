"""Weight-standardised and switchable atrous convolutions: what they compute, and what checkpoints make of them."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict
from torch import nn
from torch.nn import functional as F

from resbackbone import ResNet
from resbackbone.layers import ConvAWS2d, ConvWS2d, Module, SAConv2d, build_conv_layer

GEOMETRY = {"kernel_size": 3, "stride": 2, "padding": 1}
SAC_KEYS = {
    "weight", "weight_diff", "weight_gamma", "weight_beta",
    "switch.weight", "switch.bias",
    "pre_context.weight", "pre_context.bias",
    "post_context.weight", "post_context.bias",
}  # fmt: skip
OFFSET_KEYS = {"offset_s.weight", "offset_s.bias", "offset_l.weight", "offset_l.bias"}


def lively(layer):
    """Draw everything that starts at zero or one, the offsets at up to a pixel or two."""
    with torch.no_grad():
        for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
            if name == "weight_gamma":
                value.uniform_(0.1, 0.3)
            elif value.dim() == 4:
                value.normal_(0, 1 / math.sqrt(value[0].numel()))
            else:
                value.normal_(0, 0.3)
    return layer


def standardized(weight, *, deviation_eps=0.0, variance_eps=0.0):
    """By hand, filter by filter, in double precision."""
    filters = [kernel.double() for kernel in weight.detach()]
    return torch.stack([(k - k.mean()) / ((k.var() + variance_eps) ** 0.5 + deviation_eps) for k in filters])


def sac(**options):
    return SAConv2d(**{"in_channels": 4, "out_channels": 6, **GEOMETRY, "bias": False, **options})


every_layer = pytest.mark.parametrize(
    "make",
    [
        lambda: ConvWS2d(4, 6, **GEOMETRY),
        lambda: ConvAWS2d(4, 6, **GEOMETRY),
        lambda: sac(),
        lambda: sac(use_deform=True),
    ],
    ids=["ConvWS", "ConvAWS", "SAC", "deformable SAC"],
)


# ConvWS


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 3, "dilation": 3}, {"groups": 2, "bias": False}])
def test_conv_ws_convolves_with_standardised_filters(options):
    layer = ConvWS2d(4, 6, 3, **options)
    x = torch.randn(2, 4, 9, 11)
    plain = nn.Conv2d(4, 6, 3, **options).double()
    plain.load_state_dict(layer.state_dict())
    plain.weight.data = standardized(layer.weight, deviation_eps=1e-5)
    torch.testing.assert_close(layer(x).double(), plain(x.double()), rtol=1e-5, atol=1e-5)
    assert list(layer.state_dict()) == list(plain.state_dict())


def test_conv_ws_is_blind_to_scale_and_shift_of_its_weight():
    layer = ConvWS2d(4, 6, 3, eps=0)
    other = copy.deepcopy(layer)
    other.weight.data.mul_(50).add_(2)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(other(x), layer(x), rtol=1e-4, atol=1e-4)


def test_conv_ws_eps_comes_from_the_config():
    layer = build_conv_layer({"type": "ConvWS", "eps": 0.5}, 4, 6, 3)
    assert type(layer) is ConvWS2d
    torch.testing.assert_close(layer.standardized_weight().double(), standardized(layer.weight, deviation_eps=0.5))


def test_names_mean_our_layers_also_beside_those_of_mmcv():
    pytest.importorskip("mmcv.cnn")  # registers its own under the same names, in mmengine's root
    for name, layer_class in (("ConvWS", ConvWS2d), ("ConvAWS", ConvAWS2d), ("SAC", SAConv2d)):
        assert type(build_conv_layer({"type": name}, 4, 6, 3, padding=1, bias=False)) is layer_class


@pytest.mark.parametrize("layer_class", [ConvWS2d, ConvAWS2d])
def test_a_filter_of_one_number_is_refused(layer_class):
    """It has no deviation: mmcv's layers compute NaN."""
    with pytest.raises(ValueError, match=rf"{layer_class.__name__} needs filters of at least 2 numbers.*`groups`=4"):
        layer_class(4, 4, 1, groups=4)


# ConvAWS


def test_a_new_conv_aws_is_standardised_to_mean_0_and_deviation_1():
    layer = ConvAWS2d(16, 6, 3)
    expected = standardized(layer.weight, variance_eps=1e-5)
    torch.testing.assert_close(layer.standardized_weight().double(), expected, rtol=1e-5, atol=1e-6)
    assert list(layer.state_dict()) == ["weight", "bias", "weight_gamma", "weight_beta"]


def test_gamma_and_beta_are_deviation_and_mean():
    layer = ConvAWS2d(16, 6, 3)
    layer.weight_gamma.uniform_(0.5, 2)
    layer.weight_beta.normal_()
    expected = standardized(layer.weight, variance_eps=1e-5) * layer.weight_gamma + layer.weight_beta
    torch.testing.assert_close(layer.standardized_weight().double(), expected, rtol=1e-5, atol=1e-6)


def load_torch(layer, state_dict):
    return layer.load_state_dict(state_dict)


def load_mmengine(layer, state_dict):
    return mmengine_load_state_dict(layer, state_dict, strict=True)


@pytest.mark.parametrize("load", [load_torch, load_mmengine])
@pytest.mark.parametrize("prefix", ["", "0."])
def test_an_ordinary_checkpoint_keeps_what_it_computes(load, prefix):
    plain = nn.Conv2d(8, 6, 3).requires_grad_(False)
    plain.weight.add_(0.3).mul_(5)
    adaptive = ConvAWS2d(8, 6, 3)
    checkpoint = {prefix + key: value for key, value in plain.state_dict().items()}
    before = dict(checkpoint)
    load(nn.Sequential(adaptive) if prefix else adaptive, checkpoint)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(adaptive(x), plain(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(adaptive.weight_beta.flatten(), plain.weight.mean((1, 2, 3)))
    torch.testing.assert_close(adaptive.weight_gamma.flatten(), (plain.weight.flatten(1).var(1) + 1e-5).sqrt())
    assert checkpoint.keys() == before.keys()


def test_a_checkpoint_of_its_own_is_loaded_as_it_is():
    trained, layer = lively(ConvAWS2d(8, 6, 3)), ConvAWS2d(8, 6, 3)
    trained.weight_gamma.neg_()  # mmcv takes gammas of a mean below zero for missing and replaces them
    layer.load_state_dict(trained.state_dict())
    for key, value in trained.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key


def test_a_checkpoint_without_the_layer_leaves_it_alone():
    """In mmcv any load, even of nothing, replaces gamma and beta."""
    layer = lively(ConvAWS2d(8, 6, 3))
    before = copy.deepcopy(layer.state_dict())
    report = layer.load_state_dict({}, strict=False)
    assert report.missing_keys == list(before)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("gone", ["weight_gamma", "weight_beta"])
def test_half_of_the_two_is_a_missing_key(gone):
    layer = ConvAWS2d(8, 6, 3)
    state_dict = layer.state_dict()
    del state_dict[gone]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{gone}"'):
        layer.load_state_dict(state_dict)


def test_a_weight_of_another_shape_is_reported_by_torch():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        ConvAWS2d(8, 6, 3).load_state_dict(nn.Conv2d(8, 6, 1).state_dict())


def test_a_checkpoint_in_half_precision_is_measured_in_the_layers():
    plain, layer = nn.Conv2d(8, 6, 3).half(), ConvAWS2d(8, 6, 3)
    layer.load_state_dict(plain.state_dict())
    assert layer.weight_gamma.dtype == torch.float32
    torch.testing.assert_close(layer.standardized_weight(), plain.weight.float(), rtol=1e-5, atol=1e-6)


def test_an_ordinary_checkpoint_can_be_assigned_to_a_layer_on_meta():
    plain = nn.Conv2d(8, 6, 3)
    with torch.device("meta"):
        layer = ConvAWS2d(8, 6, 3)
    layer.load_state_dict(plain.state_dict(), assign=True)
    torch.testing.assert_close(layer.standardized_weight(), plain.weight, rtol=1e-5, atol=1e-6)


def test_constant_filters_have_a_gradient():
    layer = ConvAWS2d(2, 3, 3)
    layer.load_state_dict({"weight": torch.ones(3, 2, 3, 3), "bias": torch.zeros(3)})
    torch.testing.assert_close(layer.standardized_weight(), torch.ones(3, 2, 3, 3))
    layer(torch.randn(1, 2, 5, 5)).sum().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("conv_type", ["ConvWS", "ConvAWS", "SAC"])
def test_init_cfg_draws_the_weight_as_it_does_a_plain_one(conv_type):
    """By mmengine's rule a layer is found by its class's name or a direct base's, which `SAC` must pass too."""

    class Net(Module):
        def __init__(self):
            super().__init__({"type": "Kaiming", "layer": "Conv2d"})
            self.conv = build_conv_layer({"type": conv_type}, 16, 64, 3, padding=1, bias=False)

    net = Net()
    net.init_weights()
    deviation = (2 / (64 * 9)) ** 0.5  # He's, by fan-out
    assert float(net.conv.weight.detach().std()) == pytest.approx(deviation, rel=0.05)
    if conv_type != "ConvWS":
        torch.testing.assert_close(net.conv.standardized_weight(), net.conv.weight, rtol=1e-4, atol=1e-6)
    if conv_type == "SAC":
        assert not net.conv.pre_context.weight.any()
        assert not net.conv.switch.weight.any()
        assert net.conv.switch.bias.item() == 1


@pytest.mark.parametrize("conv_type", ["ConvWS", "ConvAWS"])
def test_a_resnet_of_standardised_convolutions_trains(images, conv_type):
    net = ResNet(50, base_channels=8, conv_cfg={"type": conv_type}, norm_eval=False)
    net.init_weights()
    sum(out.square().mean() for out in net.train()(images)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


# SAC


@pytest.mark.parametrize("use_deform", [False, True])
def test_sac_has_the_keys_of_mmcv(use_deform):
    assert set(sac(use_deform=use_deform).state_dict()) == SAC_KEYS | (OFFSET_KEYS if use_deform else set())


@pytest.mark.parametrize("use_deform", [False, True])
def test_a_new_sac_is_the_standardised_convolution(use_deform):
    layer, plain = sac(use_deform=use_deform), ConvAWS2d(4, 6, **GEOMETRY, bias=False)
    plain.load_state_dict({key: layer.state_dict()[key] for key in plain.state_dict()})
    x = torch.randn(2, 4, 9, 12)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)


def sac_by_hand(layer, x):
    """The formula, in double precision, with numpy's reflection, which takes images of any size."""
    layer, x = copy.deepcopy(layer).double(), x.double()
    with torch.no_grad():
        x = x + layer.pre_context(x.mean((2, 3), keepdim=True))
        padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect"))
        share = layer.switch(padded.unfold(2, 5, 1).unfold(3, 5, 1).mean((-1, -2)))
        weight = layer.standardized_weight()
        near = F.conv2d(x, weight, stride=layer.stride, padding=1, groups=layer.groups)
        far = F.conv2d(x, weight + layer.weight_diff, stride=layer.stride, padding=3, dilation=3, groups=layer.groups)
        out = share * near + (1 - share) * far
        return out + layer.post_context(out.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("size", [(14, 17), (3, 5), (3, 2), (2, 2), (1, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"stride": 1}, {"groups": 2}], ids=str)
def test_sac_is_its_formula(options, size):
    layer = lively(sac(**options))
    x = torch.randn(2, 4, *size)
    torch.testing.assert_close(layer(x).double(), sac_by_hand(layer, x), rtol=1e-4, atol=1e-5)


def test_a_deformable_sac_without_offsets_is_a_plain_one():
    deformable, plain = lively(sac(use_deform=True)), sac()
    for layer in (deformable.offset_s, deformable.offset_l):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    plain.load_state_dict(deformable.state_dict(), strict=False)
    x = torch.randn(2, 4, 14, 17)
    torch.testing.assert_close(deformable(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["offset_s", "offset_l"])
@pytest.mark.parametrize(("entry", "axis"), [(0, 2), (1, 3)])
def test_offsets_come_in_pairs_of_down_and_right(which, entry, axis):
    """Moving all points of one of the two kernels by a pixel is looking at a moved image, away from the border."""
    layer = sac(use_deform=True, stride=1)
    nn.init.constant_(layer.switch.bias, float(which == "offset_s"))
    x = torch.randn(1, 4, 16, 16)
    expected = layer(x.roll(-1, axis))
    with torch.no_grad():
        getattr(layer, which).bias[entry::2] = 1.0
    torch.testing.assert_close(layer(x)[..., 4:-4, 4:-4], expected[..., 4:-4, 4:-4], rtol=1e-4, atol=1e-4)


def test_every_parameter_of_a_sac_gets_a_gradient():
    layer = lively(sac(use_deform=True))
    layer(torch.randn(2, 4, 9, 9)).square().mean().backward()
    assert [name for name, parameter in layer.named_parameters() if not parameter.grad.any()] == []


def test_the_bias_of_a_sac_is_a_key_that_does_nothing_and_does_not_train():
    """In mmcv it would train, and never gets a gradient, which distributed training stumbles over."""
    layer = sac(bias=True)
    x = torch.randn(2, 4, 9, 9)
    before = layer(x)
    nn.init.constant_(layer.bias, 5.0)
    assert torch.equal(layer(x), before)
    assert not layer.bias.requires_grad
    assert "bias" in SAConv2d(4, 6, 3, padding=1).state_dict()  # as in mmcv, by default


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"padding": 0}, ValueError, r"`padding` .* must be `dilation` \* \(`kernel_size` - 1\) / 2.*got \(0, 0\)"),
        ({"dilation": 2}, ValueError, r"`padding` .* got \(1, 1\) for `dilation` \(2, 2\)"),
        ({"kernel_size": 2}, ValueError, "`padding` of a switchable atrous convolution"),
        ({"padding": "same", "stride": 1}, TypeError, "`padding` must be a list or tuple, got 'same'"),
        ({"kernel_size": 5, "padding": 2, "use_deform": True}, ValueError, r"`kernel_size` must be 3.*got \(5, 5\)"),
        ({"use_deform": 1}, TypeError, "`use_deform` must be True or False"),
        ({"backend": "cuda"}, ValueError, "`backend` must be one of .*'torch'; got 'cuda'"),
    ],
)
def test_sac_refuses(options, error, text):
    with pytest.raises(error, match=text):
        sac(**options)


def test_a_sac_of_another_kernel_and_dilation():
    layer = lively(sac(kernel_size=(1, 5), padding=(0, 4), dilation=(1, 2), stride=(1, 2)))
    assert layer(torch.randn(1, 4, 9, 9)).shape == (1, 6, 9, 5)


# All of them


@every_layer
def test_channels_last_agrees_with_contiguous(make):
    """In mmcv a weight in channels-last order cannot be standardized."""
    layer = lively(make())
    x = torch.randn(2, 4, 9, 12)
    expected = layer(x)
    layer = layer.to(memory_format=torch.channels_last)
    out = layer(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@every_layer
def test_bfloat16_autocast_runs(make):
    layer = lively(make())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.randn(2, 4, 9, 9))
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert layer.weight.grad.isfinite().all()


@every_layer
def test_every_tracer_follows_them(make):
    layer = lively(make()).eval()
    x, other = torch.randn(2, 4, 14, 17), torch.randn(3, 4, 33, 20)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(layer, (x,), dynamic_shapes=(dynamic,)).module()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # its users know; a TracerWarning is ours
        traced = torch.jit.trace(layer, x)
    for graph in (torch.fx.symbolic_trace(layer), exported, traced):
        torch.testing.assert_close(graph(other), layer(other), rtol=1e-5, atol=1e-5)
