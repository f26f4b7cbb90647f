"""How a net is called: by position or keyword, through every wrapper and compiler, in every class."""

import io
import warnings

import pytest
import torch
from cases import CASES, every_case, every_class, make, one_block_per_stage
from torch import nn

from resbackbone import ResNet
from resbackbone.backbones import DetectoRS_ResNet, SharedHead
from resbackbone.inference import optimize, quantize
from resbackbone.necks import FPN
from resbackbone.training.classification import ImageClassifier


@pytest.fixture
def build(randomize_norms):
    return lambda case, **options: randomize_norms(make(case, **options)).eval()


@pytest.fixture
def _shallow(monkeypatch):
    one_block_per_stage(monkeypatch)


def assert_equal(outs, expected):
    assert len(outs) == len(expected)
    assert all(map(torch.equal, outs, expected))


@every_case
@torch.no_grad()
def test_images_by_keyword(build, images, case):
    net = build(case)
    expected = net(images)
    assert_equal(net(x=images), expected)
    assert_equal(nn.DataParallel(net)(x=images), expected)
    assert_equal(torch.func.functional_call(net, dict(net.named_parameters()), (), {"x": images}), expected)


@pytest.mark.usefixtures("_shallow")
@every_class
@torch.no_grad()
def test_recorded_by_keyword(build, images, case):
    net = build(case)
    expected = net(images)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        assert_equal(torch.jit.trace(net, example_kwarg_inputs={"x": images})(x=images), expected)
    assert_equal(torch.export.export(net, (), {"x": images}).module()(x=images), expected)


@pytest.mark.usefixtures("_shallow")
@pytest.mark.parametrize("case", ["ResNet", "ResNetV1d", "RegNet", "DetectoRS_ResNet"])
@torch.no_grad()
def test_compiled_by_keyword_without_a_graph_break(build, images, case):
    net = build(case)
    torch.compiler.reset()
    assert_equal(torch.compile(net, fullgraph=True, backend="eager")(x=images), net(images))


@pytest.mark.parametrize("options", [{"dynamo": True, "verbose": False}, {"dynamo": False}], ids=["dynamo", "script"])
def test_onnx_by_keyword(build, images, tmp_path, options):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    net = build("ResNet", out_indices=(0,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        torch.onnx.export(net, (), tmp_path / "net.onnx", kwargs={"x": images}, **options)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    out = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(out), net(images)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if "DCN" not in case])
@torch.no_grad()
def test_optimized_nets_by_keyword(build, images, case):
    fast = optimize(build(case))
    assert_equal(fast(x=images), fast(images))


@torch.no_grad()
def test_quantized_and_compiled_nets_by_keyword(build, images):
    net = build("ResNet")
    for fast in (quantize(net, images), optimize(net, backend="compile"), optimize(net, backend="eager")):
        assert_equal(fast(x=images), fast(images))


@torch.no_grad()
def test_what_is_built_on_a_backbone_by_keyword(build, images):
    net = build("ResNet")
    fpn = FPN(in_channels=net.out_channels, out_channels=8, num_outs=5)
    assert_equal(fpn(inputs=net(x=images)), fpn(net(images)))
    head, regions = SharedHead(18), torch.randn(2, 256, 7, 7)
    assert torch.equal(head(x=regions), head(regions))
    classifier = ImageClassifier({"type": "ResNet", "depth": 18, "base_channels": 8}, num_classes=3).eval()
    assert torch.equal(classifier(inputs=images), classifier(images))
    detectors = DetectoRS_ResNet(50, base_channels=8, rfp_inplanes=4).eval()
    feats = [torch.randn(2, 4, side, side) for side in (16, 8, 4, 2)]
    assert_equal(detectors.rfp_forward(x=images, rfp_feats=feats), detectors.rfp_forward(images, feats))


WRONG = [
    (torch.zeros(2, 4, 32, 32), ValueError, r"ResNet takes images of shape \(N, 3, H, W\), got \(2, 4, 32, 32\)"),
    (torch.zeros(3, 32, 32), ValueError, "add the batch dimension"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, r"takes floating-point images, got torch\.uint8"),
    (torch.zeros(2, 3, 0, 32), ValueError, "at least 1x1 pixels, got 0x32"),
    ([torch.zeros(3, 32, 32)], TypeError, "takes a tensor of images .*, got list"),
    (None, TypeError, "got NoneType"),
]


@pytest.mark.parametrize(("images", "error", "text"), WRONG)
@pytest.mark.parametrize("optimized", [False, True])
def test_wrong_images_are_refused_by_keyword_too(build, images, error, text, optimized):
    net = build("ResNet")
    net = optimize(net) if optimized else net
    with pytest.raises(error, match=text):
        net(x=images)


def test_images_are_checked_in_the_features_that_are_fed_back(images):
    net = DetectoRS_ResNet(50, base_channels=8, rfp_inplanes=4)
    with pytest.raises(ValueError, match=r"DetectoRS_ResNet takes images of shape \(N, 3, H, W\)"):
        net.rfp_forward(images[:, :2], [None] * 4)


def test_a_users_hook_comes_before_the_check(build):
    net = build("ResNet")
    bytes_ = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    net.register_forward_pre_hook(lambda _, inputs: (inputs[0].float() / 255,))
    assert_equal(net(bytes_), build_like(net)(bytes_.float() / 255))


def build_like(net):
    twin = ResNet(18, base_channels=8).eval()
    twin.load_state_dict(net.state_dict())
    return twin


@torch.no_grad()
def test_the_check_lets_through_what_stands_for_images(build, images):
    net = build("ResNetV1d", deep_stem=False)
    assert_equal(torch.fx.symbolic_trace(net)(images), net(images))
    assert torch.func.vmap(net)(images[None])[0].shape == (1, 2, *net(images)[0].shape[1:])
    on_meta = make("ResNetV1d").to("meta")
    assert on_meta(images.to("meta"))[0].shape == net(images)[0].shape
    primal, tangent = torch.func.jvp(lambda x: net(x)[0], (images,), (images,))
    assert primal.shape == tangent.shape
    buffer = io.BytesIO()
    torch.save(net, buffer)
    assert b"_check_input" not in buffer.getvalue()  # no hook of ours is pickled
