"""``with_cp="norms"``: norms, ReLUs and sums are computed again in the backward pass, convolutions are not."""

import copy
import gc
import pickle

import pytest
import torch
from cases import every_class, make
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from resbackbone import ResNet, ResNetV1d, SharedHead
from resbackbone.layers.activation_checkpointing import needs_backward

TINY = {"base_channels": 8, "norm_eval": False}


class Convolutions(TorchDispatchMode):
    """Counts the convolutions of maps of more than one pixel, which squeeze-and-excitation has."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default and args[0].shape[2:].numel() > 1
        return func(*args, **(kwargs or {}))


class Overwriting(nn.Module):
    """A plugin whose convolution's output is overwritten in place."""

    def __init__(self, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x):
        return self.conv(x).mul_(0.5).add_(x)


def loss(outs):
    return sum(out.square().mean() for out in outs)


def pair(randomize_norms, build=ResNetV1d, depth=26, **options):
    """The same net twice, the second one recomputing."""
    nets = [build(depth, with_cp=with_cp, **{**TINY, **options}) for with_cp in (False, "norms")]
    nets[1].load_state_dict(randomize_norms(nets[0]).state_dict())
    return [net.train() for net in nets]


def assert_same(net, reference):
    for name, parameter in net.named_parameters():
        expected = reference.get_parameter(name).grad
        assert parameter.grad is expected is None or torch.equal(parameter.grad, expected), name
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, reference.get_buffer(name)), name


@every_class
def test_convolutions_run_once(images, case):
    counts = []
    for with_cp in (False, "norms"):
        net = make(case, with_cp=with_cp)
        with Convolutions() as convolutions:
            loss(net(images)).backward()
        counts.append(convolutions.count)
    assert counts[0] == counts[1] > 0


def kept_bytes(net, images):
    """What lies in memory behind the forward pass that was not there before it, the outputs with it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        outs = net(images)
    return sum(event.self_cpu_memory_usage for event in events.key_averages()), outs


@pytest.mark.parametrize(
    "size", [(128, 192), pytest.param((800, 1216), marks=pytest.mark.slow)], ids=lambda size: "x".join(map(str, size))
)
def test_at_most_065_of_the_memory_is_kept(size):
    images = torch.randn(2, 3, *size)
    plain, recomputing = (
        kept_bytes(ResNet(50, norm_eval=False, with_cp=with_cp), images)[0] for with_cp in (False, "norms")
    )
    assert 0.5 * plain < recomputing <= 0.65 * plain  # half of it would be the convolutions' outputs alone


def test_what_was_kept_is_free_behind_the_backward_pass():
    net = ResNet(50, with_cp="norms", **TINY)
    loss(net(torch.randn(2, 3, 64, 64))).backward()  # makes the gradients
    gc.disable()  # it must not take the collector
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
            loss(net(torch.randn(2, 3, 64, 64))).backward()
    finally:
        gc.enable()
    assert sum(event.self_cpu_memory_usage for event in events.key_averages()) == 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_bfloat16_autocast_gives_the_same_bits(randomize_norms, images, channels_last):
    plain, recomputing = pair(randomize_norms)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        plain, recomputing = (net.to(memory_format=torch.channels_last) for net in (plain, recomputing))
    for net in (plain, recomputing):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs = net(images)
        loss(outs).backward()
    assert_same(recomputing, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_eval": True},
        {"frozen_stages": 2},
        {"norm_cfg": {"type": "SyncBN"}},
        {"norm_cfg": {"type": "BN", "momentum": None}},
        {"plugins": [{"cfg": {"type": Overwriting}, "position": "after_conv2"}]},
        {"conv_cfg": {"type": "ConvWS"}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_gradients_and_statistics_are_the_same_bits(randomize_norms, images, options):
    plain, recomputing = pair(randomize_norms, **options)
    for net in (plain, recomputing):
        loss(net(images)).backward()
    assert_same(recomputing, plain)


def test_a_graph_goes_backward_twice_and_its_input_has_a_gradient(randomize_norms, images):
    gradients = []
    for net in pair(randomize_norms):
        x = images.clone().requires_grad_()
        value = loss(net(x))
        value.backward(retain_graph=True)
        value.backward()
        gradients.append([x.grad, *(parameter.grad for parameter in net.parameters())])
    assert all(torch.equal(*gradient) for gradient in zip(*gradients, strict=True))


def test_blocks_recompute_all_or_norms_but_never_both():
    assert {block.with_cp for block in ResNet(18, with_cp=True, **TINY).layer1} == {True}
    assert {block.with_cp for block in ResNet(18, with_cp="norms", **TINY).layer1} == {False}
    assert {block.with_cp for block in SharedHead(18, with_cp="norms").layer4} == {False}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_recompute_too(randomize_norms, images, copied):
    plain, recomputing = pair(randomize_norms)
    twin = copied(recomputing)
    assert list(twin.state_dict()) == list(plain.state_dict())
    calls = []
    twin.layer4[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    for net in (plain, twin):
        loss(net(images)).backward()
    assert_same(twin, plain)
    assert len(calls) == 2


def test_nothing_is_recomputed_where_nothing_is_kept_or_no_norm_is_left(images):
    net = ResNet(18, with_cp="norms", **TINY)
    for stage in (net.layer3, net.layer4):
        for name, layer in list(stage.named_modules()):
            if isinstance(layer, nn.BatchNorm2d):
                parent, _, child = name.rpartition(".")
                setattr(stage.get_submodule(parent), child, nn.Identity())
    calls = []
    convs = [net.layer1[0].conv1, net.layer3[0].conv1]
    for conv in convs:
        conv.register_forward_hook(lambda conv, *_: calls.append(conv))
    with torch.no_grad():
        net(images)
    assert calls == convs
    loss(net(images)).backward()
    assert calls == [*convs, *convs, convs[0]]


def test_a_backward_pass_is_foreseen():
    layer, x = nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4)
    assert needs_backward(x, [layer])
    assert needs_backward([x, x], [nn.Identity(), layer])
    with torch.no_grad():
        assert not needs_backward(x, [layer])
    layer.requires_grad_(False)
    assert not needs_backward([x, x], [layer])
    assert needs_backward([x, x.clone().requires_grad_()], [layer])
