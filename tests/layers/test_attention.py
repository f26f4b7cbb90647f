"""Attention layers as plugins: what they compute, that they work in every block, stage and position."""

import copy

import pytest
import torch
from cases import blocks, every_class, make, stages
from mmcv.cnn.bricks.context_block import ContextBlock
from torch import nn

from resbackbone import ResNet, ResNetV1d, ResNeXt, WideResNet, build_backbone
from resbackbone.layers import CBAM, ECALayer

LAYERS = {"ECALayer": ECALayer, "CBAM": CBAM, "ContextBlock": ContextBlock}
NAMES = {"ECALayer": "eca_layer", "CBAM": "cbam", "ContextBlock": "context_block"}
REQUIRED = {"ContextBlock": {"ratio": 1 / 4}}  # arguments without a default
# A ResNet by class, its block's number of convolutions.
NETS = {
    "basic": (ResNet, {"depth": 18}, 2),
    "bottleneck": (ResNet, {"depth": 50, "style": "caffe"}, 3),
    "deep": (ResNetV1d, {"depth": 50}, 3),
    "wide": (WideResNet, {"depth": 50}, 3),
    "grouped": (ResNeXt, {"depth": 50, "groups": 4, "base_width": 4}, 3),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def plugin(name, position, **options):
    return {"cfg": {"type": name, **REQUIRED.get(name, {})}, "position": position, **options}


# ECA


@pytest.mark.parametrize(
    ("channels", "kernel_size"), [(1, 3), (16, 3), (64, 3), (128, 5), (256, 5), (1024, 5), (2048, 7), (4096, 7)]
)
def test_eca_looks_as_far_as_the_paper_says(channels, kernel_size):
    # (log2(C) + 1) / 2, rounded down and then up to an odd number.
    layer = ECALayer(channels)
    assert layer.kernel_size == kernel_size
    assert layer.conv.weight.shape == (1, 1, kernel_size)
    assert layer.conv.bias is None


def test_eca_weighs_each_channel_by_its_neighbours_means():
    layer = ECALayer(6, kernel_size=3)
    x = torch.randn(2, 6, 4, 5)
    left, middle, right = layer.conv.weight.flatten().tolist()
    means = x.mean((2, 3)).tolist()
    expected = x.clone()
    for image, values in enumerate(means):
        padded = [0.0, *values, 0.0]
        for channel in range(6):
            summed = left * padded[channel] + middle * padded[channel + 1] + right * padded[channel + 2]
            expected[image, channel] *= torch.sigmoid(torch.tensor(summed))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"kernel_size": 4}, ValueError, "`kernel_size` must be odd, got 4"),
        ({"kernel_size": 0}, ValueError, "`kernel_size` must be at least 1, got 0"),
        ({"kernel_size": 3.0}, TypeError, "`kernel_size` must be an integer, got 3.0"),
        ({"slope": 0}, ValueError, "`slope` must be above 0, got 0"),
        ({"in_channels": 0}, ValueError, "`in_channels` must be at least 1, got 0"),
    ],
)
def test_eca_refuses_what_does_not_fit(options, error, text):
    with pytest.raises(error, match=text):
        ECALayer(**{"in_channels": 8, **options})


def test_eca_is_timms(timm):
    for channels in (8, 64, 512, 2048):
        ours, theirs = ECALayer(channels), timm.layers.EcaModule(channels)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, channels, 5, 7)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


# CBAM


def test_cbam_is_channel_then_spatial_attention(randomize_norms):
    layer = randomize_norms(CBAM(32, ratio=8, kernel_size=3)).eval()
    x = torch.randn(2, 32, 5, 6)
    first, second = (getattr(layer.channel, name).weight.flatten(1) for name in ("fc1", "fc2"))
    assert first.shape == (4, 32)
    mean, peak = ((values @ first.T).relu() @ second.T for values in (x.mean((2, 3)), x.flatten(2).max(-1).values))
    out = x * (mean + peak).sigmoid()[..., None, None]
    maps = torch.stack((out.mean(1), out.max(1).values), dim=1)
    gate = layer.spatial.bn(layer.spatial.conv(maps)).sigmoid()
    assert gate.shape == (2, 1, 5, 6)
    torch.testing.assert_close(layer(x), out * gate)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"kernel_size": 2}, ValueError, "`kernel_size` must be odd, got 2"),
        ({"ratio": 0}, ValueError, "`ratio` must be at least 1, got 0"),
        ({"ratio": 0.5}, TypeError, "`ratio` must be an integer, got 0.5"),
        ({"norm_cfg": None}, TypeError, "`norm_cfg` must be a dict, got None"),
    ],
)
def test_cbam_refuses_what_does_not_fit(options, error, text):
    with pytest.raises(error, match=text):
        CBAM(8, **options)


def test_cbam_keeps_a_channel_where_the_ratio_would_leave_none():
    assert CBAM(8, ratio=16).channel.fc1.out_channels == 1


def test_cbam_is_timms(timm, randomize_norms):
    ours, theirs = randomize_norms(CBAM(64)), timm.layers.create_attn("cbam", 64)
    state = {
        key.replace("spatial.conv", "spatial.conv.conv").replace("spatial.bn", "spatial.conv.bn"): value
        for key, value in ours.state_dict().items()
    }
    theirs.load_state_dict(state)
    x = torch.randn(2, 64, 9, 7)
    for train in (False, True):
        torch.testing.assert_close(ours.train(train)(x), theirs.train(train)(x), rtol=1e-6, atol=1e-6)


# Global context, mmcv's


@pytest.mark.parametrize("fusion", ["channel_add", "channel_mul"])
def test_global_context_is_one_vector_for_all_pixels(fusion):
    layer = ContextBlock(8, ratio=1 / 2, fusion_types=(fusion,))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 8, 5, 6)
    pixels = x.flatten(2)
    weights = torch.einsum("c,ncp->np", layer.conv_mask.weight.flatten(), pixels).softmax(-1)
    squeeze, norm, _, excite = getattr(layer, f"{fusion}_conv")
    hidden = torch.einsum("ncp,np->nc", pixels, weights) @ squeeze.weight.flatten(1).T + squeeze.bias
    hidden = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
    hidden = (hidden * norm.weight.flatten() + norm.bias.flatten()).relu()
    context = (hidden @ excite.weight.flatten(1).T + excite.bias)[..., None, None]
    torch.testing.assert_close(layer(x), x + context if fusion == "channel_add" else x * context.sigmoid())


@every_class
def test_global_context_works_in_any_stage_of_every_backbone(randomize_norms, images, case):
    plain = make(case)
    chosen = [index % 2 == 1 for index in range(plain.num_stages)]
    position = f"after_conv{plain.block.num_convs}"
    net = randomize_norms(make(case, plugins=[plugin("ContextBlock", position, stages=chosen)])).train()
    for stage, has_context in zip(stages(net), chosen, strict=True):
        assert all(hasattr(block, "context_block") is has_context for block in stage)
    layers = [module for module in net.modules() if isinstance(module, ContextBlock)]
    for layer in layers:
        nn.init.normal_(layer.channel_add_conv[-1].weight)  # zero at first, which would let no gradient through
    sum(out.square().mean() for out in net(images)).backward()
    assert layers
    assert all(layer.conv_mask.weight.grad.any() for layer in layers)


# As plugins


@every_layer
@pytest.mark.parametrize("net", NETS)
def test_a_layer_goes_behind_every_convolution_of_every_block(images, name, net):
    net_class, options, num_convs = NETS[net]
    for index in range(1, num_convs + 1):
        built = net_class(base_channels=16, plugins=[plugin(name, f"after_conv{index}")], **options).train()
        for block in blocks(built):
            attention = getattr(block, NAMES[name])
            assert type(attention) is LAYERS[name]
            width = getattr(block, f"conv{index}").out_channels
            if name == "CBAM":
                assert attention.channel.fc1.in_channels == width
            if name == "ContextBlock":
                assert attention.in_channels == width
        sum(out.square().mean() for out in built(images)).backward()
        assert all(parameter.grad is not None for parameter in built.parameters())


@every_layer
def test_a_layer_runs_behind_the_last_norm_and_before_the_sum(randomize_norms, name):
    net = randomize_norms(ResNet(50, base_channels=16, plugins=[plugin(name, "after_conv3")])).eval()
    block = net.layer2[1]
    x = torch.randn(2, block.inplanes, 8, 8)
    out = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())).relu()
    out = getattr(block, NAMES[name])(block.bn3(block.conv3(out)))
    torch.testing.assert_close(block(x), (out + x).relu())


def test_layers_are_chained_in_one_place_and_put_into_chosen_stages(images):
    plugins = [
        plugin("ECALayer", "after_conv2", stages=(False, True, False, True)),
        plugin("CBAM", "after_conv2", stages=(False, False, True, True)),
    ]
    before = copy.deepcopy(plugins)
    net = ResNet(18, base_channels=16, plugins=plugins)
    assert plugins == before
    names = [getattr(net, layer)[0].after_conv2_plugin_names for layer in net.res_layers]
    assert names == [[], ["eca_layer"], ["cbam"], ["eca_layer", "cbam"]]
    assert [out.shape[1] for out in net.eval()(images)] == [16, 32, 64, 128]


@every_layer
def test_a_checkpointed_block_with_attention_gives_the_same_gradients(images, name):
    nets = [
        ResNet(18, base_channels=8, norm_eval=False, with_cp=with_cp, plugins=[plugin(name, "after_conv1")]).train()
        for with_cp in (False, True)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        sum(out.square().mean() for out in net(images)).backward()
    for (key, parameter), same in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(parameter.grad, same.grad), key
    for (key, buffer), same in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
        assert torch.equal(buffer, same), key


def test_the_norm_in_cbam_is_frozen_and_kept_in_eval_like_any_other():
    net = ResNet(18, base_channels=8, frozen_stages=2, plugins=[plugin("CBAM", "after_conv2")]).train()
    norms = [block.cbam.spatial.bn for block in blocks(net)]
    assert not any(norm.training for norm in norms)  # by norm_eval
    assert [norm.weight.requires_grad for norm in norms] == [False] * 4 + [True] * 4
    net = ResNet(18, base_channels=8, norm_eval=False, frozen_stages=2, plugins=[plugin("CBAM", "after_conv2")]).train()
    assert [block.cbam.spatial.bn.training for block in blocks(net)] == [False] * 4 + [True] * 4


def test_cbam_takes_another_norm():
    cfg = {"type": "CBAM", "norm_cfg": {"type": "GN", "num_groups": 1}}
    net = ResNet(18, base_channels=8, plugins=[{"cfg": cfg, "position": "after_conv2"}])
    assert type(net.layer1[0].cbam.spatial.gn) is nn.GroupNorm


def test_tracers_and_compilers_follow_a_net_with_attention(randomize_norms, images):
    plugins = [plugin(name, "after_conv2") for name in LAYERS]
    one_stage = {"num_stages": 1, "strides": (1,), "dilations": (1,), "out_indices": (0,)}
    net = randomize_norms(ResNet(18, base_channels=8, plugins=plugins, **one_stage)).eval()
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(net, (images,), dynamic_shapes=(dynamic,)).module()
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((2, 3, 64, 64), (1, 3, 65, 97)):
            x = torch.randn(shape)
            for traced in (exported, torch.fx.symbolic_trace(net), compiled):
                for out, expected in zip(traced(x), net(x), strict=True):
                    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("config", ["ecaresnet50", "ecaresnet50d", "cbam_resnet50", "cbam_resnet18"])
def test_a_config_puts_attention_into_every_block(config):
    net = build_backbone(config, base_channels=8)
    attribute = "eca_layer" if config.startswith("eca") else "cbam"
    last = f"after_conv{net.block.num_convs}_plugin_names"
    assert [getattr(block, last) for block in blocks(net)] == [[attribute]] * len(blocks(net))
