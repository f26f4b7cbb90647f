"""Freezing and unfreezing stages during training."""

import pytest
import torch
from distributed_steps import build
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resbackbone.training import freeze, param_groups


def test_frozen_parameters_are_not_updated_by_gradients_or_momentum():
    net = build()
    optimizer = torch.optim.SGD(param_groups(net, 0.01, weight_decay=1e-3, with_frozen=True), momentum=0.9)
    for _ in range(2):
        net(torch.randn(2, 3, 64, 64))[-1].square().mean().backward()
        optimizer.step()
    freeze(net, 1)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    optimizer.step()  # with gradients that were not cleared yet
    moved = {name.split(".")[0] for name, parameter in net.named_parameters() if not parameter.equal(before[name])}
    assert moved == {"layer2", "layer3", "layer4"}


@pytest.mark.usefixtures("group_of_one")
def test_freezing_keeps_communication_hooks():
    seen = []

    def double(state, bucket):
        state.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer() * 2)
        return future

    images = torch.randn(2, 3, 64, 64)
    plain, hooked = build(frozen_stages=1), DistributedDataParallel(build(frozen_stages=2))
    hooked.register_comm_hook(seen, double)
    for _ in range(2):  # the second time, the hook that the first one registered again
        freeze(hooked, 1)
    for net in (plain, hooked):
        sum(out.square().mean() for out in net(images)).backward()
    assert sum(seen) == sum(parameter.numel() for parameter in plain.parameters() if parameter.requires_grad)
    torch.testing.assert_close(hooked.module.layer4[0].conv1.weight.grad, plain.layer4[0].conv1.weight.grad * 2)


def test_freezes_every_backbone():
    model = nn.ModuleDict({"one": build(), "other": build(frozen_stages=2)})
    freeze(model, 1)
    assert [net.frozen_stages for net in model.values()] == [1, 1]
    assert model["one"].layer1[0].conv1.weight.requires_grad is False
    assert model["other"].layer2[0].conv1.weight.requires_grad is True
    with pytest.raises(ValueError, match="there is no backbone of resbackbone in this Conv2d to freeze"):
        freeze(nn.Conv2d(3, 3, 1), 1)
