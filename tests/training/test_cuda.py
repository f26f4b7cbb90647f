"""Training on a CUDA device: folded norms under autocast, recomputed norms, synchronized norms."""

import copy

import pytest
import torch
from torch import nn

from resbackbone import ResNetV1d
from resbackbone.training import fold_frozen_norms, sync_batch_norms

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("exact_products"),
]


def gradients(net, images, dtype):
    with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
        outs = net(images)
    sum(out.float().square().mean() for out in outs).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def nets(randomize_norms, memory_format=torch.contiguous_format):
    """Return two copies of a net, without and with folding."""
    torch.manual_seed(0)
    net = randomize_norms(ResNetV1d(50, base_channels=16, frozen_stages=1)).train().cuda()
    return net, fold_frozen_norms(copy.deepcopy(net)).to(memory_format=memory_format)


def assert_close(got, expected, tolerance):
    assert list(got) == list(expected)
    for name, reference in expected.items():
        assert (got[name] - reference).abs().max() <= tolerance * reference.abs().max(), name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_folded_norms_have_equal_gradients(randomize_norms, memory_format):
    plain, folding = nets(randomize_norms, memory_format)
    images = torch.randn(2, 3, 64, 96, device="cuda")
    assert_close(gradients(folding, images, torch.float32), gradients(plain, images, torch.float32), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folded_norms_under_autocast(randomize_norms, dtype):
    images = torch.randn(2, 3, 64, 96, device="cuda")
    exact = gradients(nets(randomize_norms)[0], images, torch.float32)
    errors = []
    for net in nets(randomize_norms):
        got = gradients(net, images, dtype)
        errors.append(sum((got[name] - reference).norm() / reference.norm() for name, reference in exact.items()))
    assert errors[1] <= 1.3 * errors[0]


def test_recomputed_norms_have_equal_gradients(randomize_norms):
    net = randomize_norms(ResNetV1d(50, base_channels=16, norm_eval=False)).train().cuda()
    recomputing = copy.deepcopy(net)
    recomputing.with_cp = "norms"
    images = torch.randn(2, 3, 64, 96, device="cuda")
    expected = gradients(net, images, torch.float32)
    kept = torch.cuda.memory_allocated()
    outs = net(images)
    plain, kept = torch.cuda.memory_allocated() - kept, torch.cuda.memory_allocated()
    again = recomputing(images)
    assert torch.cuda.memory_allocated() - kept < 0.75 * plain
    del outs, again
    recomputing.load_state_dict(net.state_dict())
    assert_close(gradients(recomputing, images, torch.float32), expected, 1e-4)


def test_one_process_uses_plain_norms():
    net = sync_batch_norms(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)).cuda())
    assert not isinstance(net[1], nn.SyncBatchNorm)
    assert net(torch.randn(2, 3, 4, 4, device="cuda")).is_cuda
