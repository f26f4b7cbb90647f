"""The contract over the registry: ``check_backbone``, autocast, compiling, exporting and tracing of every class."""

import copy
import inspect
import warnings

import pytest
import torch
from cases import CASES, CLASSES, arguments_of, every_case, every_class, make, one_block_per_stage, small
from mmcv.cnn import fuse_conv_bn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone.config import check_arguments
from resbackbone.testing import check_backbone

SIZES = [(64, 64), (65, 97), (33, 47)]

# Where a case takes seconds, a quick run has these classes only.
QUICK = ("ResNet", "ResNetV1d", "ResNeXt")
every_class_in_time = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CLASSES]
)


@pytest.fixture
def build(randomize_norms):
    """Build a case with lively norms that train."""
    return lambda case, **options: randomize_norms(make(case, **options))


@pytest.fixture
def _shallow(monkeypatch):
    one_block_per_stage(monkeypatch)


def assert_equal(outs, expected):
    assert len(outs) == len(expected)
    for out, reference in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, reference, rtol=0, atol=0)


def loss(outs):
    return sum(out.square().mean() for out in outs)


def test_the_classes_are_all_here():
    assert {"ResNet", "ResNetV1b", "ResNetV1c", "ResNetV1d", "ResNeXt", "WideResNet"} <= set(CLASSES)


@every_case
def test_every_backbone_keeps_the_contract(case):
    # A new switchable atrous convolution gives its farther half the weight zero, and with it all that is only there.
    farther = ("weight_diff", "offset_l.weight", "offset_l.bias")
    check_backbone({"type": CASES[case][0], **arguments_of(case)}, zero_gradients=farther)


@every_case
def test_channels_last_is_kept(build, images, case):
    if "DCN" in case:
        pytest.skip("deformable convolution returns contiguous maps")
    net = build(case).eval().to(memory_format=torch.channels_last)
    last = net(images.contiguous(memory_format=torch.channels_last))[-1]
    assert last.is_contiguous(memory_format=torch.channels_last)


@every_class
def test_bfloat16_autocast_runs(build, images, case):
    net = build(case).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = net(images)
    loss(outs).backward()
    assert all(out.isfinite().all() for out in outs)
    assert {parameter.grad.dtype for parameter in net.parameters()} == {torch.float32}


@pytest.mark.usefixtures("_shallow")
@every_class_in_time
def test_compiled_without_graph_breaks_equals_eager(build, images, case):
    net = build(case).eval()
    expected = net(images)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_equal(compiled(images), [out.detach() for out in expected])


@pytest.mark.usefixtures("_shallow")
@pytest.mark.parametrize("with_cp", [False, True, "norms"])
def test_a_compiled_training_step_equals_eager(build, images, with_cp):
    eager, compiled = build("ResNetV1d", with_cp=with_cp), build("ResNetV1d", with_cp=with_cp)
    compiled.load_state_dict(eager.state_dict())
    torch.compiler.reset()
    for net in (eager, torch.compile(compiled, fullgraph=True, backend="aot_eager")):
        loss(net.train()(images)).backward()
    for (name, parameter), (_, same) in zip(eager.named_parameters(), compiled.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, buffer), (_, same) in zip(eager.named_buffers(), compiled.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, same, msg=name)


@pytest.mark.usefixtures("_shallow")
@every_class_in_time
def test_exported_with_dynamic_batch_and_size_equals_eager(build, images, case):
    net = build(case).eval()
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(net, (images,), dynamic_shapes=(dynamic,)).module()
    for shape in ((2, 3, 64, 64), (1, 3, 65, 97), (3, 3, 96, 33)):  # torch exports no map of 1 pixel beside larger ones
        x = torch.randn(shape)
        assert_equal(exported(x), net(x))


# torch.fx cannot follow the sizes that deformable convolution computes with.
@pytest.mark.parametrize("case", [case for case in CASES if "DCN" not in case])
def test_fx_traces_it(build, case):
    net = build(case).eval()
    traced = torch.fx.symbolic_trace(net)
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        assert_equal(traced(x), net(x))


@pytest.mark.usefixtures("_shallow")
@every_class
def test_jit_traces_it(build, images, case):
    net = build(case).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # its users know; a TracerWarning is ours
        traced = torch.jit.trace(net, images)
    x = torch.randn(3, 3, 65, 97)
    assert_equal(traced(x), net(x))


# mmcv takes a convolution that standardizes its filters for a plain one.
@pytest.mark.parametrize("case", [case for case in CASES if "SAC" not in case])
def test_defect_17_fusing_batch_norms_changes_no_output(build, images, case):
    """In mmcv, fuse_conv_bn fuses each batch norm with the convolution registered before it.

    Here, in every backbone that is the preceding convolution, or the norm is not fused (in Res2Net's splits), so the
    outputs do not change.
    """
    net = build(case).eval()
    fused = fuse_conv_bn(copy.deepcopy(net))
    norms, left = (sum(isinstance(module, _BatchNorm) for module in root.modules()) for root in (net, fused))
    assert left < norms or norms == 0
    for out, reference in zip(fused(images), net(images), strict=True):
        torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-4)


@every_class
def test_every_argument_is_annotated_and_known_by_name(case):
    for base in inspect.getmro(CLASSES[case]):
        if base is nn.Module:
            break
        if "__init__" in vars(base):
            parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
            assert all(parameter.annotation is not parameter.empty for parameter in parameters), base
    check_arguments(CLASSES[case], {**small(case), "in_channels": 3, "init_cfg": None, "with_cp": False})


@every_class
def test_norm_eval_is_the_default(case):
    net = CLASSES[case](**small(case)).train()
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
