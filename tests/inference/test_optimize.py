"""`optimize`: outputs equal the net's, belong to the caller, and follow no later change of the net."""

import copy
import math
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from cases import every_case, make
from mmcv.cnn.bricks import NonLocal2d
from torch import nn

from resbackbone import ResNet, build_backbone
from resbackbone.inference import optimize
from resbackbone.necks import FPN

STATM = Path("/proc/self/statm")
SIZES = [(64, 64), (65, 97), (33, 47)]


@pytest.fixture
def build(randomize_norms):
    """Build a small net of a case with random norms, in eval mode."""
    return lambda case, **options: randomize_norms(make(case, **options)).eval()


@pytest.fixture
def net(randomize_norms):
    return randomize_norms(ResNet(50, base_channels=8)).eval()


def worst(outs, expected):
    """Return the largest difference of any level, relative to the level's largest value; NaN if there is one."""
    assert [out.shape for out in outs] == [reference.shape for reference in expected]
    return torch.stack(
        [
            (out.float() - reference).abs().max() / reference.abs().max().clamp_min(1e-12)
            for out, reference in zip(outs, expected, strict=True)
        ]
    ).max()


@pytest.mark.parametrize("backend", ["onednn", "eager"])
@every_case
def test_every_backbone_computes_the_same(build, case, backend):
    net = build(case)
    fast = optimize(net, backend=backend)
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        for _ in range(3):  # not prepacked, prepacking, prepacked
            outs = fast(x)
            assert isinstance(outs, tuple)
            with torch.no_grad():
                assert worst(outs, net(x)) < 1e-5
    assert (fast.feature_info, fast.out_channels, fast.out_strides) == (
        net.feature_info,
        net.out_channels,
        net.out_strides,
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compile_backend_computes_the_same(randomize_norms):
    net = randomize_norms(
        ResNet(18, base_channels=8, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
    ).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert worst(optimize(net, backend="compile")(x), net(x)) < 1e-5


@every_case
def test_bfloat16_is_as_exact_as_the_net_in_bfloat16(build, images, case):
    net = build(case)
    outs = optimize(net, "bfloat16")(images)
    assert {out.dtype for out in outs} == {torch.bfloat16}
    with torch.no_grad():
        expected = net(images)
        own = worst(net.bfloat16()(images.bfloat16()), expected)
    assert worst(outs, expected) < max(1e-2, 2 * own)  # rounded elsewhere


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "regnetx_400mf"])
def test_bfloat16_is_close_for_nets_of_common_width(name, images):
    net = build_backbone(name).eval()
    with torch.no_grad():
        assert worst(optimize(net, "bfloat16")(images), net(images)) < 1e-2


def test_backbone_with_fpn(net, images):
    model = nn.Sequential(net, FPN(net.out_channels, 16, num_outs=5)).eval()
    with torch.no_grad():
        assert worst(optimize(model)(images), model(images)) < 1e-5


def test_norms_additions_and_relus_are_fused(net):
    fast = optimize(net, backend="onednn")
    left = [type(module).__name__ for module in fast.modules()]
    assert "BatchNorm2d" not in left
    assert "ReLU" not in left
    assert sum(module.overwrite for module in fast.modules() if hasattr(module, "overwrite")) >= 12


def test_outputs_belong_to_the_caller(net, images):
    fast = optimize(net)
    first = fast(images)
    kept = [out.clone() for out in first]
    fast(torch.randn_like(images))
    assert all(torch.equal(*pair) for pair in zip(first, kept, strict=True))
    for out in first:
        out.zero_()
    assert all(torch.equal(*pair) for pair in zip(fast(images), kept, strict=True))


def test_the_net_is_not_changed(net, images):
    net.train()
    state = copy.deepcopy(net.state_dict())
    fast = optimize(net)
    for _ in range(2):
        before = fast(images)
    assert fast.cached_shapes == (tuple(images.shape),)
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    nn.init.zeros_(net.conv1.weight)
    assert all(torch.equal(*pair) for pair in zip(fast(images), before, strict=True))


class ThreeConvs(nn.Module):
    """Three 3x3 convolutions and a norm, of models that use a tensor after it could be overwritten by a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(channels, 4, 3, padding=1) for channels in (3, 4, 4))
        self.norm = nn.BatchNorm2d(4)


class AddedInput(ThreeConvs):
    def forward(self, x):
        y = self.a(x)
        return (self.b(y) + y).relu()


class UserAfterTheSum(ThreeConvs):
    def forward(self, x):
        y = self.a(x)
        b, c = self.b(y), self.c(y)
        total = b + y
        return total, self.norm(c)


class ViewUsedLater(ThreeConvs):
    def forward(self, x):
        y = self.a(x)
        halves = y.chunk(2, 1)
        total = self.b(self.c(y)) + y
        return total, self.b(torch.cat(halves, 1))


class ReturnedView(ThreeConvs):
    def forward(self, x):
        y = self.a(x)
        part = y[:, :2]
        return self.b(self.c(y)) + y, part


class ModifiedInPlace(ThreeConvs):
    def forward(self, x):
        y = self.a(x)
        same = y.relu_()
        return self.b(self.c(y)) + y, same


class ModifiedBeforeTheNorm(ThreeConvs):
    def forward(self, x):
        y = self.a(x)
        b = self.b(y)
        same = y.relu_()
        return self.norm(b), same


class ModifiedBeforeTheSum(ThreeConvs):
    def forward(self, x):
        y = self.a(x)
        b = self.b(y)
        same = y.relu_()
        return self.c(b + y), same


@pytest.mark.parametrize(
    "kind",
    [
        AddedInput,
        UserAfterTheSum,
        ViewUsedLater,
        ReturnedView,
        ModifiedInPlace,
        ModifiedBeforeTheNorm,
        ModifiedBeforeTheSum,
    ],
)
def test_no_tensor_is_overwritten_that_is_used_later(kind, randomize_norms, images):
    net = randomize_norms(kind()).eval()
    with torch.no_grad():
        expected = net(images)
    for backend in ("onednn", "eager"):
        outs = optimize(net, backend=backend)(images)
        assert worst(*((outs, expected) if isinstance(outs, tuple) else ([outs], [expected]))) < 1e-5


def test_images_are_not_changed(net, images):
    kept = images.clone()
    optimize(net)(images)
    assert torch.equal(images, kept)


@pytest.mark.parametrize("fill", [0.0, 1e4, -1e4])
def test_degenerate_images(net, fill):
    x = torch.full((1, 3, 64, 64), fill)
    with torch.no_grad():
        assert worst(optimize(net)(x), net(x)) < 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["onednn", "eager"])
def test_nan_propagates_as_in_the_net(net, images, backend, value):
    images[0, 0, 5, 5] = value
    with torch.no_grad():
        expected = net(images)
    fast = optimize(net, backend=backend)
    for _ in range(3):
        for out, reference in zip(fast(images), expected, strict=True):
            assert reference[0].isnan().any()
            assert torch.equal(out.isnan(), reference.isnan())
            assert worst([out[1:]], [reference[1:]]) < 1e-5


def test_images_that_become_infinite_inside(net, images):
    with torch.no_grad():
        expected = net(images * 1e38)
    outs = optimize(net)(images * 1e38)
    assert all(
        reference.isnan().all() and out.isnan().all() for out, reference in zip(outs[1:], expected[1:], strict=True)
    )


@pytest.mark.parametrize(("name", "value"), [("weight", math.nan), ("bias", math.inf), ("running_var", -1.0)])
def test_refuses_nonfinite_weights(net, images, name, value):
    with torch.no_grad():
        getattr(net.layer2[0].bn1, name)[0] = value
    with pytest.raises(ValueError, match="ResNet has weights or statistics that are NaN, infinite"):
        optimize(net, backend="onednn")
    assert optimize(net, backend="eager")(images)[-1].isnan().all()


def test_repeated_sizes_are_prepacked_within_the_limit(net, images):
    weights = sum(p.numel() * 4 for name, p in net.named_parameters() if p.dim() == 4)
    fast = optimize(net, backend="onednn", prepack_bytes=2 * weights + 1000)
    assert fast.cached_shapes == ()
    sizes = [(1, 3, 32 * side, 64) for side in (1, 2, 3)]
    for size in sizes:
        fast(torch.zeros(size))
    assert fast.cached_shapes == ()
    for size in sizes:
        fast(torch.zeros(size))
    assert fast.cached_shapes == tuple(sizes[:2])  # the third evicts none of them: both were used since its last use
    for size in 2 * sizes[1:]:
        fast(torch.zeros(size))
    assert fast.cached_shapes == tuple(sizes[1:])  # the least recently used was evicted
    not_prepacked = optimize(net, backend="onednn", prepack_bytes=0)
    for _ in range(3):
        not_prepacked(images)
    assert not_prepacked.cached_shapes == ()


def test_threads_get_the_same_outputs(net):
    weights = sum(p.nbytes for p in net.parameters() if p.dim() == 4)
    fast = optimize(net, backend="onednn", prepack_bytes=2 * weights - 1)  # room for one size
    inputs = [torch.randn(1, 3, 32 + 32 * (index % 3), 64) for index in range(6)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]
    are_close, cached = [], set()

    def work(first):
        for index in (*range(first, 6), *range(first)):
            for _ in range(4):
                are_close.append(worst(fast(inputs[index]), expected[index]) < 1e-5)
                cached.update(fast.cached_shapes)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(are_close) == 6 * 6 * 4
    assert all(are_close)
    assert len(cached) == 3  # so each was evicted in turn
    assert len(fast.cached_shapes) == 1


def test_pickle_and_deepcopy(net, images):
    fast = optimize(net)
    expected = fast(images)
    fast(images)
    for other in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
        assert all(torch.equal(*pair) for pair in zip(other(images), expected, strict=True))


def test_copies_are_compiled(net, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    fast = optimize(net, backend="compile")
    others = [pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)]
    assert list(map(id, compiled)) == [id(each.net) for each in (fast, *others)]


@pytest.mark.parametrize("inside", [False, True])
def test_loading_weights_clears_the_cache(net, randomize_norms, images, inside):
    fast = optimize(net, backend="onednn")
    for _ in range(2):
        fast(images)
    other = optimize(randomize_norms(ResNet(50, base_channels=8)).eval(), backend="onednn")
    if inside:
        nn.Sequential(fast).load_state_dict(nn.Sequential(other).state_dict())
    else:
        fast.load_state_dict(other.state_dict())
    for _ in range(3):
        assert worst(fast(images), other(images)) < 1e-5


@pytest.mark.parametrize("backend", ["onednn", "eager"])
def test_the_dtype_cannot_change(net, images, backend):
    fast = optimize(net, backend=backend)
    expected = fast(images)
    for change in (nn.Module.bfloat16, nn.Module.double):
        with pytest.raises(TypeError, match=r"was optimized for torch\.float32 and cannot be converted to torch\.\w+"):
            change(nn.Sequential(fast))
    assert worst(fast.float().cpu()(images), expected) < 1e-5


def test_onednn_stays_on_the_cpu(net):
    with pytest.raises(TypeError, match="computes on CPUs, and cannot move to meta; optimize the original there"):
        optimize(net, backend="onednn").to("meta")


@pytest.mark.parametrize("backend", ["onednn", "eager", "compile"])
def test_it_stays_in_eval_mode(net, backend, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    fast = optimize(net, backend=backend)
    for detector in (nn.Sequential(fast), nn.Sequential(fast).train()):
        assert not any(module.training for module in detector[0].modules())


@pytest.mark.parametrize("backend", ["onednn", "eager"])
def test_statistics_are_frozen_in_a_model_that_trains(build, images, backend):
    fast = optimize(build("ResNetV2"), backend=backend)  # pre-activation norms are not folded
    expected = fast(images)
    nn.Sequential(fast).train()
    for _ in range(2):
        assert worst(fast(images), expected) < 1e-5


@pytest.mark.parametrize("case", ["ResNet", "ResNet-DCNv2"])
@pytest.mark.parametrize("backend", ["onednn", "eager"])
def test_dtype_is_not_changed_by_autocast(build, images, case, backend):
    net = build(case)
    expected = optimize(net, backend=backend)(images)
    with torch.autocast("cpu", torch.bfloat16):
        outs = optimize(net, backend=backend)(images)
    assert {out.dtype for out in outs} == {torch.float32}
    assert worst(outs, expected) < 1e-5


def test_gradients_are_not_recorded(net, images):
    outs = optimize(net)(images.requires_grad_())
    assert not any(out.requires_grad for out in outs)


@pytest.mark.parametrize("backend", ["onednn", "eager"])
def test_untraceable_layers_run_unchanged(randomize_norms, images, backend):
    plugin = {"cfg": {"type": "NonLocal2d"}, "stages": (False, True, True, False), "position": "after_conv2"}
    net = randomize_norms(ResNet(50, base_channels=8, plugins=[plugin])).eval()
    for module in net.modules():
        if isinstance(module, NonLocal2d):
            nn.init.normal_(module.conv_out.conv.weight)  # zeros would add nothing
    fast = optimize(net, backend=backend)
    with torch.no_grad():
        assert worst(fast(images), net(images)) < 1e-5
    assert sum(isinstance(module, nn.BatchNorm2d) for module in fast.modules()) == 0


class Branching(ResNet):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.parametrize("inside", [False, True])
def test_refuses_untraceable_backbones(inside):
    net = Branching(18, base_channels=8)
    with pytest.raises(ValueError, match=r"(Branching|Sequential) cannot be traced: "):
        optimize(nn.Sequential(net) if inside else net)


@pytest.mark.parametrize("name", ["layer1.0.conv1", "layer2", ""])
def test_hooks_are_dropped_with_a_warning(net, images, name):
    called = []
    net.get_submodule(name).register_forward_hook(lambda module, args, out: called.append(module))
    with pytest.warns(UserWarning, match=f"hooks of ResNet are dropped.*: of '{name}' and 0 others"):
        fast = optimize(net)
    fast(images)
    assert called == []
    net(images)
    assert len(called) == 1


def test_outputs_in_a_dict(net, images):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return dict(zip("abcd", self.net(x), strict=True))

    images[0, 0, 5, 5] = math.nan
    model = Named().eval()
    with torch.no_grad():
        expected = model(images)
    outs = optimize(model)(images)
    assert list(outs) == list(expected)
    assert all(torch.equal(outs[key].isnan(), expected[key].isnan()) for key in expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "int4"}, "`dtype` must be one of 'float32', 'bfloat16', 'float16'; got 'int4'"),
        ({"dtype": "float16"}, "`dtype`='float16' needs a net on a CUDA device"),
        ({"backend": "tensorrt"}, "`backend` must be one of"),
        ({"prepack_bytes": -1}, "`prepack_bytes` must be at least 0, got -1"),
    ],
)
def test_refuses(net, options, text):
    with pytest.raises(ValueError, match=text):
        optimize(net, **options)


def test_images_are_checked_with_the_same_errors(net):
    fast = optimize(build_backbone("resnet18"))
    for wrong in (torch.zeros(3, 64, 64), torch.zeros(1, 4, 64, 64)):
        with pytest.raises(ValueError, match=r"ResNet takes images of shape \(N, 3, H, W\)"):
            fast(wrong)


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="reads the resident memory from Linux")
def test_ten_thousand_calls_of_changing_sizes_leak_no_memory():
    net = ResNet(18, base_channels=8, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1)).eval()
    weights = sum(p.nbytes for p in net.parameters() if p.dim() == 4)
    fast = optimize(net, prepack_bytes=4 * weights)  # prepacked weights are evicted in turn
    resident = []
    for call in range(10_000):
        fast(torch.zeros(1, 3, 32 + 8 * (call // 3 % 7), 32 + 8 * (call // 21 % 5)))
        if call % 1000 == 999:
            resident.append(int(STATM.read_text().split()[1]) * 4096)
    assert max(resident[3:]) - min(resident[1:4]) < 2**21
