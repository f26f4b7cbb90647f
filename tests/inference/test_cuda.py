"""`optimize` on a CUDA device: the same feature maps, CUDA graphs for repeated sizes, half precision."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from resbackbone import ResNet
from resbackbone.inference import optimize

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("exact_products"),
]


@pytest.fixture
def net(randomize_norms):
    return randomize_norms(ResNet(50, base_channels=8)).eval().cuda()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 4e-2), ("float16", 1e-2)])
def test_captured_graphs_compute_the_same(net, dtype, tolerance):
    fast = optimize(net, dtype)
    for size in ((64, 64), (65, 97)):
        for _ in range(4):  # not captured, capturing, captured
            x = torch.randn(2, 3, *size, device="cuda")
            outs = fast(x)
            with torch.no_grad():
                for out, expected in zip(outs, net(x), strict=True):
                    assert (out.float() - expected).abs().max() <= tolerance * expected.abs().max()
    assert fast.cached_shapes == ((2, 3, 64, 64), (2, 3, 65, 97))


def test_outputs_belong_to_the_caller(net):
    fast = optimize(net)
    x = torch.randn(1, 3, 64, 64, device="cuda")
    for _ in range(2):
        fast(x)
    kept = [out.clone() for out in fast(x)]
    held = fast(x)
    fast(torch.randn_like(x))
    assert all(torch.equal(*pair) for pair in zip(held, kept, strict=True))
    for out in held:
        out.zero_()
    assert all(torch.equal(*pair) for pair in zip(fast(x), kept, strict=True))


def test_captured_graphs_follow_the_weights_and_the_device(net):
    fast = optimize(net)
    other = optimize(ResNet(50, base_channels=8).eval().cuda())
    x = torch.randn(1, 3, 64, 64, device="cuda")
    for _ in range(3):
        fast(x)
    assert {out.device.type for out in fast.cpu()(x.cpu())} == {"cpu"}
    fast.cuda().load_state_dict(other.state_dict())
    for _ in range(3):
        for out, expected in zip(fast(x), other(x), strict=True):
            assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_threads_get_the_same_outputs(net):
    nets = [optimize(net), optimize(net)]
    inputs = [torch.randn(1, 3, 32 + 32 * (index % 3), 64, device="cuda") for index in range(6)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]

    def work(index):
        for _ in range(8):
            for out, reference in zip(nets[index % 2](inputs[index]), expected[index], strict=True):
                assert (out - reference).abs().max() <= 1e-5 * reference.abs().max()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert all(len(fast.cached_shapes) == 3 for fast in nets)


def test_a_net_that_cannot_be_captured_runs_uncaptured(net):
    class Waiting(nn.ReLU6):
        __module__ = "torch.nn"  # so it is a leaf module of the trace

        def forward(self, x):
            torch.cuda.synchronize()  # not allowed during capture
            return super().forward(x)

    class Leaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last = net, Waiting()

        def forward(self, x):
            return self.last(self.net(x)[-1])

    fast = optimize(Leaf().eval())
    x = torch.randn(1, 3, 64, 64, device="cuda")
    expected = fast(x)
    with pytest.warns(UserWarning, match="this net cannot be captured as a CUDA graph and runs without"):
        fast(x)
    for _ in range(3):
        assert torch.equal(fast(x), expected)


def test_compile_backend_computes_the_same(net):
    x = torch.randn(1, 3, 64, 64, device="cuda")
    with torch.no_grad():
        for out, expected in zip(optimize(net, backend="compile")(x), net(x), strict=True):
            assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
