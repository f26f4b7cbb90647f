"""Folding frozen batch norms into convolutions during training: equal outputs and gradients, less memory."""

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import CLASSES, every_case, make, one_block_per_stage
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from resbackbone import RegNet, ResNet, ResNetV1d, SharedHead, build_backbone
from resbackbone.blocks import Bottleneck
from resbackbone.inference import optimize
from resbackbone.layers import ConvAWS2d, ConvNormAct, ConvWS2d, FrozenBatchNorm2d, Sequential, StdConv2d
from resbackbone.layers.conv_norm import set_folding
from resbackbone.necks import FPN
from resbackbone.training import fold_frozen_norms

CL = torch.channels_last
# Norms that cannot be folded: before convolutions (each block's first), after half of the channels (IBN), and after
# deformable and switchable atrous convolutions.
NUM_UNFOLDED = {
    "ResNetV2": 8,
    "ResNetIBN": 6,
    "ResNetIBN-groups": 6,
    "ResNetV2-tiered": 8,
    "ResNet-DCNv2": 4,
    "DetectoRS-SAC": 13,
}
NO_BATCH_NORM = ("ResNet-GN", "ResNetV2-BiT")


class BatchNorms(TorchDispatchMode):
    """Counts batch norms in eval mode."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("aten::native_batch_norm", "aten::cudnn_batch_norm") and not args[5]
        return func(*args, **(kwargs or {}))


def batch_norms(net, images):
    with BatchNorms() as norms:
        net(images)
    return norms.count


def loss(outs):
    return sum(out.square().mean() for out in outs)


def pair(randomize_norms, build=ResNetV1d, *, dtype=torch.float32, **options):
    """Return two copies of a net, without and with folding."""
    net = randomize_norms(build(**{"depth": 18, "base_channels": 8, **options})).to(dtype).train()
    return net, fold_frozen_norms(copy.deepcopy(net))


def backward(net, images):
    """Run a forward and a backward pass; return the outputs, and the gradients by name."""
    net.zero_grad()
    outs = net(images)
    loss(outs).backward()
    return outs, {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def assert_close(got, expected, tolerance):
    """Compare each tensor, relative to its largest absolute value."""
    assert list(got) == list(expected)
    for name, reference in expected.items():
        difference = (got[name] - reference).abs().max()
        assert difference <= tolerance * reference.abs().max(), name


def assert_same(got, expected):
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], reference) for name, reference in expected.items())


def numbered(outs):
    return dict(enumerate(outs))


@every_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.filterwarnings("ignore:folding has no effect:UserWarning")
def test_outputs_and_gradients_equal_the_plain_net(randomize_norms, images, case, dtype, tolerance):
    net, folding = pair(randomize_norms, lambda **_: make(case, norm_eval=True), dtype=dtype)
    (expected, gradients), (outs, folded) = (backward(n, images.to(dtype)) for n in (net, folding))
    assert_close(numbered(outs), numbered(expected), tolerance)
    if case == "ResNetIBN-b":  # a bias before instance norm has no effect; its gradients are rounding errors
        vain = [results.pop(f"layer{i}.1.bn2.bias") for i in (1, 2) for results in (gradients, folded)]
        assert all(gradient.abs().max() < 1e-6 for gradient in vain)
    assert_close(folded, gradients, tolerance)
    if case in NO_BATCH_NORM:
        assert all(torch.equal(*outs) for outs in zip(outs, expected, strict=True))


@every_case
@pytest.mark.filterwarnings("ignore:folding has no effect:UserWarning")
def test_every_norm_after_a_convolution_is_folded(images, case):
    net = make(case, norm_eval=True).train()
    before = batch_norms(net, images)
    left = batch_norms(fold_frozen_norms(net), images)
    assert left == NUM_UNFOLDED.get(case, 0)
    assert (before > left) is (case not in NO_BATCH_NORM)


CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "oblong": {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
    "with bias": {"kernel_size": 3, "bias": True},
    "1x1": {"kernel_size": 1, "bias": True},
    "1x1 strided": {"kernel_size": 1, "stride": (2, 3)},
    "1x1 padded": {"kernel_size": 1, "padding": 1},
    "1x1 grouped": {"kernel_size": 1, "groups": 2},
}


def unit(randomize_norms, conv_class=nn.Conv2d, norm_class=nn.BatchNorm2d, **options):
    conv = conv_class(4, 6, **{"bias": False, **options})
    both = randomize_norms(Sequential(conv, norm_class(6))).double().eval()
    set_folding(both, True)
    return both


def check_gradients(check, both, x):
    """Check the gradients of a layer with respect to its input and all parameters."""
    parameters = dict(both.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(both, dict(zip(parameters, values, strict=True)), (x,))

    assert batch_norms(both, x) == 0
    return check(function, (x.requires_grad_(), *parameters.values()))


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_equal_finite_differences(randomize_norms, options, check):
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    assert check_gradients(check, unit(randomize_norms, **options), x)


@pytest.mark.parametrize(
    ("conv_class", "norm_class"),
    [
        (ConvWS2d, nn.BatchNorm2d),
        (StdConv2d, nn.BatchNorm2d),
        (ConvAWS2d, nn.BatchNorm2d),
        (nn.Conv2d, nn.SyncBatchNorm),
        (nn.Conv2d, FrozenBatchNorm2d),
        (nn.Conv2d, lambda channels: nn.BatchNorm2d(channels, affine=False)),
    ],
)
def test_gradients_of_other_layers(randomize_norms, conv_class, norm_class):
    both = unit(randomize_norms, conv_class, norm_class, kernel_size=3, bias=True)
    assert check_gradients(torch.autograd.gradcheck, both, torch.randn(2, 4, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("trains", ["0.weight", "0.bias", "1.weight", "1.bias"])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_one_trainable_parameter(randomize_norms, trains, kernel_size):
    both = unit(randomize_norms, kernel_size=kernel_size, bias=True)
    plain = copy.deepcopy(both)
    set_folding(plain, False)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    gradients = []
    for layers in (plain, both):
        for name, parameter in layers.named_parameters():
            parameter.requires_grad = name == trains
        gradients.append(backward(layers, x)[1])
    assert list(gradients[0]) == [trains]
    assert_close(gradients[1], gradients[0], 1e-11)


def saved_bytes(net, images, dtype):
    """Return the memory that a forward pass allocates and keeps, including its outputs."""
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events, autocast:
        outs = net(images)
    del outs  # after the measurement
    return sum(event.self_cpu_memory_usage for event in events.key_averages())


@pytest.mark.parametrize(
    "size", [(128, 192), pytest.param((800, 1216), marks=pytest.mark.slow)], ids=lambda size: "x".join(map(str, size))
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_saves_at_most_055_of_the_memory_for_backward(size, dtype):
    images = torch.randn(2, 3, *size)
    net = ResNet(50, frozen_stages=1, norm_eval=True).train()
    plain, folding = saved_bytes(net, images, dtype), saved_bytes(fold_frozen_norms(net), images, dtype)
    assert 0.1 * plain < folding <= 0.55 * plain


def test_saves_only_inputs_and_parameters_for_backward(randomize_norms):
    both = unit(randomize_norms, kernel_size=3, padding=1)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64).contiguous(memory_format=CL)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: None):
        both(x)
    own = [x, both[0].weight, both[1].weight, both[1].running_mean, both[1].running_var]
    assert sorted(kept) == sorted(tensor.data_ptr() for tensor in own)


def test_norm_in_train_mode_uses_batch_statistics(randomize_norms, images):
    net, folding = pair(randomize_norms, norm_eval=False, frozen_stages=1)
    frozen = sum(isinstance(m, nn.BatchNorm2d) and not m.training for m in net.modules())
    assert 0 < frozen == batch_norms(net, images)
    for _ in range(2):
        folding.load_state_dict(net.state_dict())
        assert batch_norms(folding, images) == 0
        folding.load_state_dict(net.state_dict())
        for n in (net, folding):
            torch.manual_seed(0)
            n(images)
        for name, buffer in net.named_buffers():
            torch.testing.assert_close(folding.get_buffer(name), buffer, rtol=1e-5, atol=1e-6, msg=name)
        for n in (net, folding):
            n.norm_eval = True
            n.train()
        assert batch_norms(folding, images) == 0 < batch_norms(net, images)
        statistics = copy.deepcopy(dict(folding.named_buffers()))
        outs, expected = folding(images), net(images)
        assert_close(numbered(outs), numbered(expected), 1e-5)
        assert_same(dict(folding.named_buffers()), statistics)
        for n in (net, folding):
            n.norm_eval = False
            n.train()


def test_all_norms_in_train_mode(randomize_norms, images):
    net, folding = pair(randomize_norms, norm_eval=False)
    results = [backward(n, images) for n in (net, folding)]
    assert all(torch.equal(*outs) for outs in zip(*(outs for outs, _ in results), strict=True))
    assert_same(results[1][1], results[0][1])
    assert_same(folding.state_dict(), net.state_dict())


def test_norm_without_running_statistics(images):
    net = fold_frozen_norms(ResNet(18, base_channels=8, norm_cfg={"type": "BN", "track_running_stats": False}))
    plain = copy.deepcopy(net)
    set_folding(plain, False)
    assert all(torch.equal(*outs) for outs in zip(net.eval()(images), plain.eval()(images), strict=True))


def test_parameters_and_keys_do_not_change(randomize_norms, images):
    net, _ = pair(randomize_norms, frozen_stages=0)
    folding = copy.deepcopy(net)
    before = dict(folding.named_parameters()), list(folding.state_dict()), str(folding)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9) for n in (net, folding)]
    assert fold_frozen_norms(folding) is folding
    assert (list(folding.state_dict()), str(folding)) == before[1:]
    assert all(parameter is before[0][name] for name, parameter in folding.named_parameters())
    for _ in range(3):
        for n, optimizer in zip((net, folding), optimizers, strict=True):
            backward(n, images)
            optimizer.step()
    assert_close(folding.state_dict(), net.state_dict(), 1e-4)
    twin = ResNetV1d(18, base_channels=8).train()
    twin.load_state_dict(folding.state_dict())
    assert_close(numbered(twin(images)), numbered(folding(images)), 1e-5)


@pytest.mark.parametrize("layer", ["layer2.0.conv1", "layer2.0.bn1", "layer2.0.downsample.1", "stem.3"])
def test_hooks_of_a_layer(randomize_norms, images, layer):
    net, folding = pair(randomize_norms)
    seen = {}
    for n in (net, folding):
        calls = seen.setdefault(n, [])
        watched = n.get_submodule(layer)
        watched.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args[0].detach().clone()))
        watched.register_forward_hook(lambda module, args, out, calls=calls: calls.append(out.detach().clone()))
        if isinstance(
            watched, nn.Conv2d
        ):  # other layers are followed by in-place operations, which such hooks do not allow
            watched.register_full_backward_hook(lambda module, _, grads, calls=calls: calls.append(grads[0]))
        backward(n, images)
    assert len(seen[net]) == 2 + isinstance(watched, nn.Conv2d)
    assert_close(numbered(seen[folding]), numbered(seen[net]), 1e-5)
    assert batch_norms(folding, images) == 1


def test_global_module_hooks(randomize_norms, images):
    _, folding = pair(randomize_norms)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    folding(images)
    handle.remove()
    assert seen.count(nn.BatchNorm2d) == sum(isinstance(module, nn.BatchNorm2d) for module in folding.modules())


def test_replaced_forward_of_a_layer(randomize_norms, images):
    net, folding = pair(randomize_norms)
    for n in (net, folding):
        block = n.layer1[0]
        block.conv2.forward = lambda x, conv=block.conv2: nn.Conv2d.forward(conv, x) + 1
    (expected, gradients), (outs, folded) = (backward(n, images) for n in (net, folding))
    assert_close(numbered(outs), numbered(expected), 1e-5)
    assert_close(folded, gradients, 1e-5)
    assert batch_norms(folding, images) == 1


def test_parametrized_weights(randomize_norms, images):
    net, _ = pair(randomize_norms)
    weight_norm(net.layer1[0].conv1)
    folding = fold_frozen_norms(copy.deepcopy(net))
    (_, gradients), (_, folded) = (backward(n, images) for n in (net, folding))
    assert_close(folded, gradients, 1e-5)
    assert batch_norms(folding, images) == 0


def test_subclass_with_its_own_forward(randomize_norms):
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    both = unit(randomize_norms, norm_class=Activated, kernel_size=3)
    assert both(torch.randn(2, 4, 5, 6, dtype=torch.float64)).min() == 0


@pytest.mark.parametrize("with_cp", [True, "norms"])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_with_checkpointing(randomize_norms, images, with_cp, norm_eval):
    net, folding = pair(randomize_norms, with_cp=with_cp, norm_eval=norm_eval, drop_path_rate=0.2)
    if not norm_eval:  # norms in both modes
        for n in (net, folding):
            n.layer2.eval()
    results = []
    for n in (net, folding):
        torch.manual_seed(1)
        results.append(backward(n, images))
    assert_close(results[1][1], results[0][1], 1e-5)
    assert_close(dict(folding.named_buffers()), dict(net.named_buffers()), 1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_bfloat16_autocast_is_as_accurate_as_without_folding(randomize_norms, images, channels_last):
    net, folding = pair(randomize_norms)
    if channels_last:
        net, folding, images = (thing.to(memory_format=CL) for thing in (net, folding, images))
    _, exact = backward(net, images)
    errors = []
    for n in (net, folding):
        n.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs = n(images)
        loss(out.float() for out in outs).backward()
        assert {out.dtype for out in outs} == {torch.bfloat16}
        assert {parameter.grad.dtype for parameter in n.parameters()} == {torch.float32}
        errors.append(
            torch.stack([(n.get_parameter(name).grad - grad).norm() / grad.norm() for name, grad in exact.items()])
        )
    assert errors[1].median() < 1.2 * errors[0].median()
    assert errors[1].max() < 1.5 * errors[0].max()


def test_backward_under_autocast(randomize_norms, images):
    _, folding = pair(randomize_norms, ResNet, depth=50)
    _, expected = backward(folding, images)
    folding.zero_grad(set_to_none=True)
    value = loss(folding(images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value.backward()
    assert_same({name: parameter.grad for name, parameter in folding.named_parameters()}, expected)


@pytest.mark.parametrize("weights", [torch.contiguous_format, CL])
@pytest.mark.parametrize("format_", [torch.contiguous_format, CL])
def test_memory_formats(randomize_norms, images, weights, format_):
    net, folding = (each.to(memory_format=weights) for each in pair(randomize_norms))
    images = images.contiguous(memory_format=format_)
    (expected, gradients), (outs, folded) = (backward(each, images) for each in (net, folding))
    assert [out.stride() for out in outs] == [out.stride() for out in expected]
    assert_close(numbered(outs), numbered(expected), 1e-5)
    assert_close(folded, gradients, 1e-5)
    for name, parameter in folding.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_training_step(monkeypatch, randomize_norms, images, dtype):
    one_block_per_stage(monkeypatch)
    net, folding = pair(randomize_norms)
    torch.compiler.reset()
    compiled: Any = torch.compile(folding, fullgraph=True, backend="aot_eager")
    results = []
    for n in (folding if dtype is torch.bfloat16 else net, compiled):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is torch.bfloat16):
            results.append({name: grad.clone() for name, grad in backward(n, images)[1].items()})
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in results[1].items()}
    assert_close(gradients, results[0], 1e-5 if dtype == torch.float32 else 2e-2)
    folding.norm_eval = net.norm_eval = False
    for out, expected in zip(compiled.train()(images), net.train()(images), strict=True):
        assert torch.equal(out, expected)


def test_exported_and_traced_graphs(randomize_norms, images):
    net, folding = (n.eval() for n in pair(randomize_norms))
    expected = net(images)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    recorded = [
        torch.export.export(folding, (images,), dynamic_shapes=(dynamic,)).module(),
        torch.fx.symbolic_trace(folding),
        optimize(folding, backend="eager"),
    ]
    for graph in recorded[:2]:
        assert all(torch.equal(*outs) for outs in zip(graph(images), expected, strict=True))
    plain, fused = optimize(net)(images), optimize(folding)(images)
    assert all(torch.equal(*outs) for outs in zip(fused, plain, strict=True))


def test_functional_transforms(randomize_norms, images):
    net, folding = pair(randomize_norms)
    _, expected = backward(net, images)
    parameters = dict(folding.named_parameters())

    def value(parameters, images):
        return loss(torch.func.functional_call(folding, parameters, (images,)))

    assert_close(torch.func.grad(value)(parameters, images), expected, 1e-5)
    one_by_one = torch.func.vmap(torch.func.grad(value), (None, 0))(parameters, images[:, None])
    whole = torch.func.vmap(torch.func.grad(value), (None, 0))(parameters, images[None])
    assert_close({name: each[0] for name, each in whole.items()}, expected, 1e-5)
    assert all(len(each) == len(images) for each in one_by_one.values())
    _, slope = torch.func.jvp(lambda x: value(parameters, x), (images,), (torch.ones_like(images),))
    x = images.clone().requires_grad_()
    loss(net(x)).backward()
    torch.testing.assert_close(slope, x.grad.sum(), rtol=1e-3, atol=1e-6)


def test_meta_device(randomize_norms, images):
    _, folding = pair(randomize_norms)
    shapes = [out.shape for out in folding(images)]
    assert [out.shape for out in folding.to("meta")(images.to("meta"))] == shapes


class Double(nn.Module):
    def forward(self, x):
        return x.double()


@pytest.mark.parametrize("shortcut", [None, nn.AdaptiveAvgPool2d(1), Double()], ids=["same", "broadcast", "double"])
@pytest.mark.parametrize("trains", [True, False])
def test_shortcut_addition(randomize_norms, shortcut, trains):
    """The fused addition of oneDNN requires equal shapes and dtypes."""
    block = randomize_norms(Bottleneck(16, 4, downsample=shortcut)).eval().requires_grad_(trains)
    folding = fold_frozen_norms(copy.deepcopy(block))
    x = torch.randn(2, 16, 6, 5)
    ends = []
    for each in (block, folding):
        entering = x.clone().requires_grad_(trains)
        out = each(entering)
        if trains:
            out.square().sum().backward()
        ends.append({"out": out, "x": entering.grad} if trains else {"out": out})
        assert batch_norms(each, x) == (0 if each is folding else 3)
    assert_close(ends[1], ends[0], 1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies(randomize_norms, images, copied):
    _, folding = pair(randomize_norms)
    twin = copied(folding)
    assert batch_norms(twin, images) == 0
    assert all(torch.equal(*outs) for outs in zip(twin(images), folding(images), strict=True))
    assert batch_norms(fold_frozen_norms(twin, False), images) > 0


def test_backward_twice_and_input_gradient(randomize_norms, images):
    gradients = []
    for net in pair(randomize_norms, ResNet, depth=50):
        x = images.clone().requires_grad_()
        value = loss(net(x))
        value.backward(retain_graph=True)
        value.backward()
        gradients.append({"x": x.grad, **{name: p.grad for name, p in net.named_parameters()}})
    assert_close(gradients[1], gradients[0], 1e-5)


def test_frozen_stages_have_no_graph(randomize_norms, images):
    _, folding = pair(randomize_norms, frozen_stages=2)
    outs = folding(images)
    assert [out.requires_grad for out in outs] == [False, False, True, True]


@pytest.mark.parametrize("where", ["image", "weight", "shift"])
def test_nan_propagates(randomize_norms, images, where):
    _, folding = pair(randomize_norms, frozen_stages=1)
    if where == "image":
        images[1, 0, 30, 30] = torch.nan
    elif where == "weight":
        folding.layer1[0].conv1.weight.data[0, 0, 0, 0] = torch.nan
    else:
        folding.layer2[0].bn1.bias.data[0] = torch.nan
    assert folding(images)[-1].isnan().any()


def test_empty_batch():
    head = fold_frozen_norms(SharedHead(50)).train()
    x = torch.zeros(0, 1024, 14, 14, requires_grad=True)
    out = head(x)
    assert out.shape == (0, 2048, 7, 7)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert not head.layer4[0].conv1.weight.grad.any()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision(randomize_norms, images, half):
    _, folding = pair(randomize_norms)
    outs = folding.to(half)(images.to(half))
    loss(outs).backward()
    assert {out.dtype for out in outs} == {parameter.grad.dtype for parameter in folding.parameters()} == {half}


def test_input_dtype_mismatch(images):
    net = fold_frozen_norms(ResNet(18, base_channels=8)).train()
    with pytest.raises(RuntimeError, match="type"):
        net(images.double())
    with pytest.raises(RuntimeError, match="type"), torch.autocast("cpu", torch.bfloat16, enabled=False):
        net(images.bfloat16())


def test_necks_and_single_layers(randomize_norms):
    fpn = fold_frozen_norms(randomize_norms(FPN([8, 16], 8, 3, norm_cfg={"type": "BN"})).eval())
    maps = [torch.randn(1, 8, 16, 16), torch.randn(1, 16, 8, 8)]
    folded = fpn(maps)
    expected = fold_frozen_norms(fpn, False)(maps)
    assert_close(numbered(folded), numbered(expected), 1e-5)
    layer = ConvNormAct(4, 6, 3, norm_cfg={"type": "BN"}).eval()
    set_folding(layer, True)
    assert batch_norms(layer, torch.randn(1, 4, 8, 8)) == 0


def test_without_folding_the_layers_are_called():
    conv, norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval()
    pair = Sequential(conv, norm)
    x = torch.randn(1, 3, 2, 2)
    assert torch.equal(pair(x), norm(conv(x)))
    assert batch_norms(pair, x) == 1
    set_folding(pair, True)
    assert batch_norms(pair, x) == 0


@pytest.mark.parametrize(
    "net",
    [
        lambda: ResNet(18, fold_frozen_norms=True),
        lambda: RegNet("regnetx_200mf", fold_frozen_norms=True),
        lambda: build_backbone("resnet18", fold_frozen_norms=True),
        lambda: build_backbone({"type": "ResNetV1d", "depth": 18, "fold_frozen_norms": True}),
    ],
)
def test_config_option(images, net):
    folding = net().train()
    assert batch_norms(folding, images) == 0 < batch_norms(fold_frozen_norms(folding, False), images)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_the_option(images, name):
    assert batch_norms(make(name, fold_frozen_norms=True, norm_eval=True).train(), images) == NUM_UNFOLDED.get(name, 0)


def test_shared_head_option():
    head = SharedHead(18, fold_frozen_norms=True).train()
    assert batch_norms(head, torch.randn(2, 256, 4, 4)) == 0


def test_net_without_resbackbone_modules():
    with pytest.raises(ValueError, match="`net` must be or contain a backbone of resbackbone, got a Conv"):
        fold_frozen_norms(nn.Conv2d(3, 4, 1))
    with pytest.raises(TypeError, match="`enabled` must be True or False, got 1"):
        fold_frozen_norms(ResNet(18), 1)


def test_warns_without_batch_norms():
    norm_cfg = {"type": "GN", "num_groups": 4}
    with pytest.warns(UserWarning, match="folding has no effect in a ResNet without batch norms"):
        ResNet(18, norm_cfg=norm_cfg, fold_frozen_norms=True)


def test_narrow_net_trains_after_a_folded_stem():
    # In a subprocess: PyTorch 2.13 may crash with so few channels in channels_last.
    code = """
import torch
from resbackbone import ResNet_CIFAR
net = ResNet_CIFAR(18, base_channels=8, strides=(2, 2, 2, 2), frozen_stages=0, norm_eval=False, fold_frozen_norms=True)
for _ in range(5):
    sum(out.square().mean() for out in net.train()(torch.randn(2, 3, 64, 64))).backward()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
