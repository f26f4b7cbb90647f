"""``with_cp``: activation checkpointing changes no output, gradient or statistic, and keeps less memory."""

import pytest
import torch
from cases import batch_norms

from resbackbone import ResNet, ResNetV1d, ResNeXt

TINY = {"base_channels": 8}
GROUPED = {"groups": 4, "base_width": 4}


def step(net, x):
    """One training step's outputs and gradients, from a fixed state of the random numbers."""
    torch.manual_seed(1)
    outs = net(x)
    sum(out.square().mean() for out in outs).backward()
    return outs, {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize(
    ("net_class", "options"),
    [
        (ResNet, {"depth": 18}),
        (ResNet, {"depth": 50}),
        (ResNet, {"depth": 50, "style": "caffe", "norm_cfg": {"type": "GN", "num_groups": 4}}),
        (ResNet, {"depth": 18, "drop_path_rate": 0.5}),
        (ResNet, {"depth": 18, "frozen_stages": 1}),
        (ResNetV1d, {"depth": 18, "frozen_stages": 0}),
        (ResNet, {"depth": 18, "norm_cfg": {"type": "IN", "affine": True, "track_running_stats": True}}),
        (ResNet, {"depth": 18, "norm_eval": True}),
        (ResNeXt, {"depth": 50, **GROUPED}),
    ],
    ids=["18", "50", "gn", "drop_path", "frozen", "v1d_frozen_stem", "in_running", "norm_eval", "resnext"],
)
def test_checkpointing_changes_no_output_gradient_or_statistic(randomize_norms, images, net_class, options):
    options = {"norm_eval": False, **options, **TINY}
    plain = randomize_norms(net_class(**options)).train()
    checkpointed = net_class(with_cp=True, **options).train()
    checkpointed.load_state_dict(plain.state_dict())
    (outs, grads), (expected_outs, expected_grads) = step(checkpointed, images), step(plain, images)
    assert all(torch.equal(*pair) for pair in zip(outs, expected_outs, strict=True))
    for name, expected in expected_grads.items():
        frozen = not dict(plain.named_parameters())[name].requires_grad
        assert grads[name] is None if frozen else torch.equal(grads[name], expected), name
    for name, buffer in checkpointed.named_buffers():
        assert torch.equal(buffer, dict(plain.named_buffers())[name]), name
    counts = {int(bn.num_batches_tracked) for bn in batch_norms(checkpointed) if bn.training}
    assert counts <= {1}


def test_checkpointing_repeats_the_dropout_of_a_plugin(randomize_norms, images, gate):
    plugins = [{"cfg": {**gate, "dropout": 0.5}, "position": "after_conv1"}]
    nets = [randomize_norms(ResNet(18, plugins=plugins, with_cp=with_cp, **TINY)).train() for with_cp in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    (outs, grads), (same_outs, same_grads) = (step(net, images) for net in nets)
    assert all(torch.equal(*pair) for pair in zip(outs, same_outs, strict=True))
    assert all(torch.equal(grad, same_grads[name]) for name, grad in grads.items())


@pytest.mark.parametrize(("with_cp", "runs"), [(False, 1), (True, 2)])
def test_checkpointing_recomputes_each_block_once(images, with_cp, runs):
    net = ResNet(18, with_cp=with_cp, **TINY).train()
    calls = []
    net.layer2[1].conv1.register_forward_hook(lambda *_: calls.append(1))
    step(net, images)
    assert len(calls) == runs
    with torch.no_grad():
        net(images)
    assert len(calls) == runs + 1


def test_checkpointing_reaches_the_first_block_behind_frozen_ones(images):
    net = ResNet(18, with_cp=True, frozen_stages=1, **TINY).train()
    calls = []
    for block in (net.layer1[1], net.layer2[0]):
        block.conv1.register_forward_hook(lambda module, *_: calls.append(module))
    step(net, images)
    assert calls == [net.layer1[1].conv1, net.layer2[0].conv1, net.layer2[0].conv1]  # its input has no gradient


def test_checkpointing_keeps_less(images):
    def kept(with_cp):
        sizes = []
        net = ResNet(50, with_cp=with_cp, **TINY).train()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            net(images)
        return sum(sizes)

    assert kept(True) < kept(False) / 3
