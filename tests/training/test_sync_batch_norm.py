"""Synchronized batch norm: which layers are replaced, and by what."""

import warnings

import pytest
import torch
from distributed_steps import build
from torch import distributed, nn

from resbackbone.training import sync_batch_norms
from resbackbone.training.sync_batch_norm import AllReduceBatchNorm, BatchNormNd


@pytest.fixture
def log(monkeypatch, caplog):
    """The log of resbackbone, without mmengine's logger."""
    monkeypatch.setattr("resbackbone.utils.logs._run_logger", lambda: None)  # may exist from other tests
    caplog.set_level("INFO")
    return caplog


@pytest.mark.usefixtures("group_of_one")
def test_sync_bn_trains_on_cpu_in_a_group_of_one(images):
    net = build(norm_cfg={"type": "SyncBN"}, norm_eval=False)
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        net(images)
    sync_batch_norms(net)
    net(images)


def test_one_process_uses_plain_norms(randomize_norms, images, log):
    net = randomize_norms(build(norm_cfg={"type": "SyncBN"}, norm_eval=False, frozen_stages=1))
    plain = build(norm_eval=False, frozen_stages=1)
    plain.load_state_dict(net.state_dict())
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert sync_batch_norms(plain) is plain
    assert log.messages == []  # nothing was changed
    assert sync_batch_norms(net) is net
    assert log.messages == ["replaced 31 synchronized batch norms by plain ones, as there is one process"]
    assert {type(norm) for norm in net.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)} == {BatchNormNd}
    assert all(tensors[name] is tensor for name, tensor in (*net.named_parameters(), *net.named_buffers()))
    assert list(net.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(*outs) for outs in zip(net(images), plain(images), strict=True))
    assert torch.equal(net.layer4[1].bn3.running_var, plain.layer4[1].bn3.running_var)


def test_only_plain_batch_norms_are_synchronized(monkeypatch, log):
    class WithReLU(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    net = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3), WithReLU(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3))
    monkeypatch.setattr("resbackbone.training.sync_batch_norm.num_processes", lambda: 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sync_batch_norms(net)
    assert [type(layer) for layer in net] == [
        AllReduceBatchNorm,
        AllReduceBatchNorm,
        WithReLU,
        nn.GroupNorm,
        nn.InstanceNorm2d,
    ]
    x = torch.randn(4, 3)
    assert torch.equal(net[0].eval()(x), nn.BatchNorm1d(3).eval()(x))  # no communication, as in a frozen stage
    assert log.messages == ["synchronizing 2 batch norms over 2 processes"]
    monkeypatch.setattr("resbackbone.training.sync_batch_norm.num_processes", lambda: 1)
    sync_batch_norms(net)
    assert [type(layer) for layer in list(net)[:2]] == [BatchNormNd, BatchNormNd]


def test_only_rank_0_logs(monkeypatch, log):
    monkeypatch.setattr("resbackbone.training.sync_batch_norm.num_processes", lambda: 2)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        sync_batch_norms(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    assert log.messages == ["synchronizing 2 batch norms over 2 processes"]


def test_net_without_batch_norms():
    assert len(sync_batch_norms(nn.Sequential(nn.Conv2d(3, 3, 1)))) == 1


def test_new_layers_keep_tensors_mode_and_hooks(monkeypatch):
    monkeypatch.setattr("resbackbone.training.sync_batch_norm.num_processes", lambda: 2)
    norm = nn.BatchNorm2d(3).eval().requires_grad_(False)
    called = []
    hook = norm.register_forward_hook(lambda module, *_: called.append(module))
    net = sync_batch_norms(nn.ModuleDict({"one": norm, "other": nn.Sequential(norm)}))
    new = net["one"]
    assert type(new) is AllReduceBatchNorm
    assert net["other"][0] is new  # a shared layer stays shared
    assert (new.training, new.weight.requires_grad) == (False, False)
    for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
        assert getattr(new, name) is tensor
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(new(x), norm(x))
    assert called == [new, norm]
    hook.remove()
    new(x)
    assert called == [new, norm]


def test_a_single_norm_is_returned_as_a_new_layer():
    assert type(sync_batch_norms(nn.SyncBatchNorm(3))) is BatchNormNd
