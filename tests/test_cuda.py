"""On a CUDA device: the same feature maps, captured sizes, half precision."""

import pytest
import torch

from resbackbone import ResNet
from resbackbone.inference import optimize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def net(shake):
    return shake(ResNet(50, base_channels=8)).eval().cuda()


@pytest.fixture(autouse=True)
def _exact_products():
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 4e-2), ("float16", 1e-2)])
def test_captured_sizes_compute_the_same(net, dtype, tolerance):
    fast = optimize(net, dtype)
    for size in ((64, 64), (65, 97)):
        for _ in range(4):  # as it is, capturing, captured
            x = torch.randn(2, 3, *size, device="cuda")
            outs = fast(x)
            with torch.no_grad():
                for out, expected in zip(outs, net(x), strict=True):
                    assert (out.float() - expected).abs().max() <= tolerance * expected.abs().max()
    assert fast.packed_sizes == ((2, 3, 64, 64), (2, 3, 65, 97))


def test_the_caller_may_keep_and_change_what_it_gets(net):
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


def test_compiled_it_computes_the_same(net):
    x = torch.randn(1, 3, 64, 64, device="cuda")
    with torch.no_grad():
        for out, expected in zip(optimize(net, backend="compile")(x), net(x), strict=True):
            assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
