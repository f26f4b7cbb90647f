"""IBN-Net: its keys, and its numbers against a plain reading of the paper and of the authors' layout."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resbackbone import ResNetIBN, build_backbone
from resbackbone.layers import IBN

# What the blocks of each stage have, and the stem.
EARLY = {"a": (True, True, True, False), "b": (True, True, False, False)}


def batch_norm(state, key, x):
    mean, var, weight, bias = (state[f"{key}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    shape = (1, -1, 1, 1)
    return (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)


def instance_norm(state, key, x):
    mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
    weight, bias = (state[f"{key}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def reference(state, x, blocks, ibn, num_convs, groups):
    """ResNet-IBN in formulas, from a state dict alone; returns the features of every stage."""
    stem_norm = instance_norm if ibn == "b" else batch_norm
    x = stem_norm(state, "bn1", F.conv2d(x, state["conv1.weight"], stride=2, padding=3)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    features = []
    for stage, num_blocks in enumerate(blocks):
        for index in range(num_blocks):
            key = f"layer{stage + 1}.{index}"
            stride = 2 if stage and not index else 1
            out, shortcut = x, x
            for number in range(1, num_convs + 1):
                weight = state[f"{key}.conv{number}.weight"]
                side = weight.shape[-1]
                strides = number == (1 if num_convs == 2 else 2)
                grouped = groups if side == 3 and num_convs == 3 else 1
                out = F.conv2d(out, weight, stride=stride if strides else 1, padding=side // 2, groups=grouped)
                norm = f"{key}.bn{number}"
                if number == 1 and ibn == "a" and EARLY["a"][stage]:
                    half = out.shape[1] // 2
                    parts = (
                        instance_norm(state, f"{norm}.IN", out[:, :half]),
                        batch_norm(state, f"{norm}.BN", out[:, half:]),
                    )
                    out = torch.cat(parts, 1)
                else:
                    out = batch_norm(state, norm, out)
                out = out.relu() if number < num_convs else out
            if f"{key}.downsample.0.weight" in state:
                shortcut = F.conv2d(x, state[f"{key}.downsample.0.weight"], stride=stride)
                shortcut = batch_norm(state, f"{key}.downsample.1", shortcut)
            out = out + shortcut
            if ibn == "b" and EARLY["b"][stage] and index == num_blocks - 1:
                out = instance_norm(state, f"{key}.IN", out)
            x = out.relu()
        features.append(x)
    return features


@pytest.mark.parametrize(
    ("net_class", "options"),
    [
        (ResNetIBN, {"depth": 18}),
        (ResNetIBN, {"depth": 18, "ibn": "b"}),
        (ResNetIBN, {"depth": 50}),
        (ResNetIBN, {"depth": 50, "ibn": "b"}),
        (ResNetIBN, {"depth": 50, "groups": 4, "base_width": 4}),
    ],
    ids=["18-a", "18-b", "50-a", "50-b", "next"],
)
def test_features_are_those_of_the_formulas(randomize_norms, images, net_class, options):
    net = randomize_norms(net_class(base_channels=16, **options)).double().eval()
    for module in net.modules():
        if isinstance(module, nn.InstanceNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    state = net.state_dict()
    with torch.no_grad():
        features = net(images.double())
        expected = reference(
            state, images.double(), net.stage_blocks, net.ibn, net.block.num_convs, options.get("groups", 1)
        )
    for feature, out in zip(features, expected, strict=True):
        assert feature.std() > 0.01
        torch.testing.assert_close(feature, out, rtol=1e-9, atol=1e-9)


def test_the_keys_are_the_authors():
    """What `IBN-Net` has beside the keys of a plain ResNet, read off its code."""
    with torch.device("meta"):
        plain = set(build_backbone("resnet50").state_dict())
        net_a, net_b = (build_backbone(f"resnet50_ibn_{ibn}") for ibn in "ab")
    buffers = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    early = [f"layer{stage}.{block}.bn1" for stage, blocks in ((1, 3), (2, 4), (3, 6)) for block in range(blocks)]
    keys = plain - {f"{norm}.{name}" for norm in early for name in buffers}
    keys |= {f"{norm}.IN.{name}" for norm in early for name in ("weight", "bias")}
    keys |= {f"{norm}.BN.{name}" for norm in early for name in buffers}
    assert set(net_a.state_dict()) == keys
    assert net_a.layer1[0].bn1.IN.weight.shape == net_a.layer1[0].bn1.BN.weight.shape == (32,)
    keys = plain - {f"bn1.{name}" for name in buffers[2:]}
    keys |= {f"{block}.IN.{name}" for block in ("layer1.2", "layer2.3") for name in ("weight", "bias")}
    assert set(net_b.state_dict()) == keys
    assert net_b.layer2[3].IN.weight.shape == (512,)


@pytest.mark.parametrize("ibn", ["a", "b"])
def test_it_has_as_many_parameters_as_a_resnet_and_where_in_is_added_more(ibn):
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in build_backbone(name).parameters()) for name in ("resnet50", f"resnet50_ibn_{ibn}")
        ]
    assert counts[1] - counts[0] == {"a": 0, "b": 2 * (256 + 512)}[ibn]


def test_an_odd_channel_is_batch_normed(images):
    layer = IBN(5).train()
    x = torch.randn(4, 5, 6, 6) * 3 + 1
    out = layer(x)
    torch.testing.assert_close(out[:, :2].mean((2, 3)), torch.zeros(4, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, 2:].mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert out[:, 2:].mean((2, 3)).abs().max() > 0.01


def test_instance_norm_is_torchs():
    layer, theirs = IBN(8).eval(), nn.InstanceNorm2d(4, affine=True)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    layer.IN.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 5, 6)
    assert torch.equal(layer(x)[:, :4], theirs(x[:, :4]))


def test_norm_settings_reach_both_halves():
    net = ResNetIBN(18, base_channels=8, norm_cfg={"type": "BN", "requires_grad": False, "eps": 1e-3})
    norm = net.layer1[0].bn1
    assert not any(parameter.requires_grad for parameter in norm.parameters())
    assert norm.BN.eps == 1e-3
    assert type(ResNetIBN(18, base_channels=8, norm_cfg={"type": "SyncBN"}).layer1[0].norm1.BN) is nn.SyncBatchNorm
    net = ResNetIBN(18, base_channels=16, norm_cfg={"type": "GN", "num_groups": 4})
    assert type(net.layer1[0].norm1.BN) is nn.GroupNorm
    assert net.layer1[0].norm2 is net.layer1[0].gn2
    assert net(torch.randn(2, 3, 64, 64))[0].shape == (2, 16, 16, 16)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"ibn": "c"}, ValueError, "`ibn` must be one of 'a', 'b'; got 'c'"),
        ({"ibn": None}, ValueError, "`ibn` must be one of 'a', 'b'; got None"),
        ({"ibn": "b", "deep_stem": True}, ValueError, "leave `deep_stem` out"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(built_convs, options, error, text):
    with pytest.raises(error, match=text):
        build_backbone({"type": "ResNetIBN", "depth": 18, **options})
    assert not built_convs


def test_a_single_channel_has_no_half():
    with pytest.raises(ValueError, match="`num_features` must be at least 2, got 1"):
        IBN(1)
