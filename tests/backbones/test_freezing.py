"""``frozen_stages``, ``norm_eval``, ``train()`` and ``eval()``: what is frozen, and stays so."""

import copy

import pytest
import torch
from cases import batch_norms
from torch import nn

from resbackbone import ResNet

TINY = {"base_channels": 8}


def test_train_and_eval_return_the_backbone():
    net = ResNet(18, frozen_stages=1, **TINY)
    assert net.train() is net
    assert net.train(False) is net
    assert net.eval() is net
    assert net.training is False


@pytest.mark.parametrize("deep_stem", [False, True])
@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 2, 3, 4])
def test_frozen_parts_have_no_gradient_and_stay_in_eval_mode(images, deep_stem, frozen_stages):
    net = ResNet(18, deep_stem=deep_stem, frozen_stages=frozen_stages, norm_eval=False, **TINY)
    stem = net.stem if deep_stem else nn.ModuleList([net.conv1, net.norm1])
    parts = [stem, *(getattr(net, name) for name in net.res_layers)]
    for switch in (lambda: None, net.train, net.eval, net.train):
        switch()
        for index, part in enumerate(parts):
            frozen = index <= frozen_stages
            assert {parameter.requires_grad for parameter in part.parameters()} == {not frozen}
            assert {norm.training for norm in batch_norms(part)} == {net.training and not frozen}
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    outs = net(images)
    if frozen_stages < 4:
        sum(out.mean() for out in outs[max(frozen_stages, 0) :]).backward()
    for index, part in enumerate(parts):
        assert {parameter.grad is None for parameter in part.parameters()} == {index <= frozen_stages}
    moved = {name for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])}
    still = {f"layer{index}" for index in range(1, frozen_stages + 1)}
    assert {name.split(".")[0] for name in before} - {name.split(".")[0] for name in moved} == still | (
        {"stem" if deep_stem else "bn1"} if frozen_stages >= 0 else set()
    )


def test_a_fully_frozen_net_hands_out_features_without_gradient(images):
    net = ResNet(18, frozen_stages=4, **TINY).train()
    assert not any(out.requires_grad for out in net(images))


def test_train_freezes_again_what_was_thawed():
    net = ResNet(18, frozen_stages=1, norm_eval=False, **TINY)
    for part in (net.conv1, net.norm1, net.layer1):
        part.requires_grad_(True).train()
    net.train()
    for part in (net.conv1, net.norm1, net.layer1):
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(norm.training for norm in batch_norms(part))


def test_frozen_stages_can_grow_during_training():
    net = ResNet(18, frozen_stages=-1, norm_eval=False, **TINY)
    net.frozen_stages = 2
    net.train()
    assert not any(parameter.requires_grad for parameter in net.layer2.parameters())
    assert all(parameter.requires_grad for parameter in net.layer3.parameters())


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_norm_eval_keeps_batch_norms_in_eval_mode_and_their_affine_parameters_training(images, norm):
    net = ResNet(18, norm_cfg={"type": norm}, norm_eval=True, **TINY)
    net.train()
    assert net.training
    assert net.layer1[0].training
    assert not any(bn.training for bn in batch_norms(net))
    before = copy.deepcopy(dict(net.named_buffers()))
    sum(out.mean() for out in net(images)).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert all(bn.weight.grad is not None for bn in batch_norms(net))


def test_without_norm_eval_batch_norms_train(images):
    net = ResNet(18, norm_eval=False, **TINY)
    net.train()
    assert all(bn.training for bn in batch_norms(net))
    net(images)
    assert {int(bn.num_batches_tracked) for bn in batch_norms(net)} == {1}
    assert not any(bn.training for bn in batch_norms(net.eval()))
