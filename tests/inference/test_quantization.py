"""`quantize`: int8 outputs approximate the net's, calibration, saving and restoring."""

import copy
import json
import math
import pickle

import matplotlib
import pytest
import torch
from cases import every_case, make
from mmcv.cnn.bricks.context_block import ContextBlock
from PIL import Image
from torch import nn
from torch.nn.functional import cosine_similarity

from resbackbone import ResNet
from resbackbone.data.preprocessing import CAFFE, TORCHVISION
from resbackbone.inference import quantize
from resbackbone.inference.quantized_conv import QuantizedConv2d
from resbackbone.necks import FPN


@pytest.fixture(scope="module")
def photograph():
    with Image.open(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg") as picture:
        return TORCHVISION(picture.convert("RGB").resize((96, 112)))


@pytest.fixture
def net():
    return ResNet(50, base_channels=8).eval()


def similarities(outs, expected):
    assert [out.shape for out in outs] == [reference.shape for reference in expected]
    assert all(out.isfinite().all() for out in outs)
    return [cosine_similarity(a.flatten(), b.flatten(), 0).item() for a, b in zip(outs, expected, strict=True)]


@every_case
def test_every_backbone_computes_approximately_the_same(case, photograph):
    net = make(case).eval()
    fast = quantize(net, [photograph.flip(3)])
    with torch.no_grad():
        expected = net(photograph)
    for _ in range(3):  # prepacked for any size, prepacking, prepacked
        outs = fast(photograph)
        assert {out.dtype for out in outs} == {torch.float32}
        # Without ReLU in the trunk and with standardized filters, the range is wide and symmetric.
        assert min(similarities(outs, expected)) > (0.97 if case == "ResNetV2-BiT" else 0.99)
    assert fast.feature_info == net.feature_info


def test_all_convolutions_of_a_resnet_are_quantized(net, images):
    fast = quantize(net, [images])
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert sum(isinstance(module, QuantizedConv2d) for module in fast.modules()) == len(convolutions)
    assert not any(isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)) for module in fast.modules())


def test_backbone_with_fpn(net, photograph):
    model = nn.Sequential(net, FPN(net.out_channels, 16, num_outs=5)).eval()
    with torch.no_grad():
        assert min(similarities(quantize(model, [photograph])(photograph), model(photograph))) > 0.99


@pytest.mark.parametrize("size", [32, 96])  # 32: one pixel in the last stage, where the shapes are equal
def test_addition_that_broadcasts(randomize_norms, photograph, size):
    plugin = {"cfg": {"type": "ContextBlock", "ratio": 1 / 4}, "stages": (True,) * 4, "position": "after_conv3"}
    net = randomize_norms(ResNet(50, base_channels=8, plugins=[plugin])).eval()
    for module in net.modules():
        if isinstance(module, ContextBlock):
            nn.init.normal_(module.channel_add_conv[-1].weight, std=0.1)  # zeros would add nothing
    fast = quantize(net, [photograph[:, :, :size, :size]])
    images = photograph[:, :, :64, :64]
    with torch.no_grad():
        expected = net(images)
    for _ in range(3):
        assert min(similarities(fast(images), expected)) > 0.99


def test_residual_addition_of_an_output(photograph):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            x = self.stem(x)
            return (self.conv(x) + x).relu(), x

    net = Residual().eval()
    with torch.no_grad():
        assert min(similarities(quantize(net, [photograph])(photograph), net(photograph))) > 0.99


def test_calibration_on_a_folder_of_pictures(net, photograph, tmp_path):
    with Image.open(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg") as picture:
        picture.convert("RGB").resize((96, 112)).save(tmp_path / "grace.png")
    outs = quantize(net, tmp_path)(photograph)
    assert all(torch.equal(*pair) for pair in zip(outs, quantize(net, [photograph])(photograph), strict=True))


def test_unreadable_pictures_are_left_out_with_a_warning(net, photograph, tmp_path):
    with Image.open(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg") as picture:
        picture.convert("RGB").resize((96, 112)).save(tmp_path / "grace.png")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "cut\n.png").write_bytes((tmp_path / "grace.png").read_bytes()[:2000])
    with pytest.warns(UserWarning, match=r"cannot read picture '.*(bad\.jpg|cut\\n\.png)'.*; skipped$") as caught:
        outs = quantize(net, tmp_path)(photograph)
    assert len(caught) == 2
    assert all(torch.equal(*pair) for pair in zip(outs, quantize(net, [photograph])(photograph), strict=True))
    (tmp_path / "grace.png").unlink()
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="none of the 2 pictures in '"):
        quantize(net, tmp_path)


def test_unsupported_pictures_are_named_in_a_warning(net, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "in").mkdir()
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save(tmp_path / "far/a.ppm")
    (tmp_path / "in/linked").symlink_to(tmp_path / "far")
    (tmp_path / "in/b.heic").touch()
    with pytest.warns(UserWarning, match=r"1 skipped, as Pillow cannot read \.heic here.*b\.heic'"):
        quantize(net, tmp_path / "in")


@pytest.mark.parametrize("own", [None, CAFFE.gray()])
def test_pictures_are_normalized_as_the_backbone_expects(own, tmp_path):
    net = ResNet(18, base_channels=8, style="caffe", in_channels=3 if own is None else 1).eval()
    if own is not None:
        net.preprocessing = own
    with Image.open(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg") as picture:
        picture = picture.convert("RGB" if own is None else "L").resize((96, 112))
    picture.save(tmp_path / "grace.png")
    model = nn.Sequential(net, FPN(net.out_channels, 16, num_outs=4)).eval()
    images = (own or CAFFE)(picture)
    outs = quantize(model, tmp_path)(images)
    assert all(torch.equal(*pair) for pair in zip(outs, quantize(model, [images])(images), strict=True))


def test_values_out_of_range_are_clipped(net, photograph):
    fast = quantize(net, [photograph])
    for factor in (1e6, 1e30):
        assert all(out.isfinite().all() for out in fast(factor * photograph))


def test_outputs_belong_to_the_caller(net, photograph):
    fast = quantize(net, [photograph])
    kept = [out.clone() for out in fast(photograph)]
    for out in fast(photograph):
        out.zero_()
    assert all(torch.equal(*pair) for pair in zip(fast(photograph), kept, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_nan_out(net, images, value):
    fast = quantize(net, [images])
    images[0, 0, 0, 0] = value
    outs = fast(images)
    assert all(out[0].isnan().all() and out[1].isfinite().all() for out in outs)


def test_outputs_in_a_dict(net, images):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return dict(zip("abcd", self.net(x), strict=True))

    fast = quantize(Named().eval(), images)
    images[0, 0, 5, 5] = math.nan
    outs = fast(images)
    assert list(outs) == list("abcd")
    assert all(out[0].isnan().all() and out[1].isfinite().all() for out in outs.values())


def test_calibration_on_one_tensor(net, images):
    outs = quantize(net, images)(images)
    assert all(torch.equal(*pair) for pair in zip(outs, quantize(net, [images])(images), strict=True))


def test_pickle(net, photograph):
    fast = quantize(net, [photograph])
    copied = pickle.loads(pickle.dumps(fast))
    assert all(torch.equal(*pair) for pair in zip(copied(photograph), fast(photograph), strict=True))


@pytest.mark.parametrize(
    ("calibration", "text"),
    [
        ([], "`calibration` is empty"),
        (torch.zeros(3, 64, 64), r"`calibration` must be .* of shape \(N, in_channels, H, W\), got \(3, 64, 64\)"),
        ([torch.full((1, 3, 64, 64), math.nan)], "gives NaN or infinity at"),
    ],
)
def test_refuses(net, calibration, text):
    with pytest.raises(ValueError, match=text):
        quantize(net, calibration)


@pytest.mark.parametrize("with_neck", [False, True])
def test_saved_as_weights_and_ranges(net, photograph, tmp_path, with_neck):
    def make(net):
        return nn.Sequential(net, FPN(net.out_channels, 8, num_outs=5)).eval() if with_neck else net

    model = make(net)
    quantized = quantize(model, photograph)
    torch.save({"ranges": quantized.ranges, "weights": quantized.state_dict()}, tmp_path / "int8.pth")
    saved = torch.load(tmp_path / "int8.pth", weights_only=True)
    other = make(copy.deepcopy(net))
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    restored = quantize(other, saved["ranges"])
    restored.load_state_dict(saved["weights"])
    assert all(map(torch.equal, restored(photograph), quantized(photograph)))
    assert restored.ranges == quantized.ranges


def test_ranges_survive_json(net, photograph):
    quantized = quantize(net, photograph)
    again = quantize(net, json.loads(json.dumps(quantized.ranges)))
    assert all(map(torch.equal, again(photograph), quantized(photograph)))


@every_case
def test_every_backbone_is_restored(case, photograph):
    net = make(case).eval()
    quantized = quantize(net, photograph)
    restored = quantize(make(case), quantized.ranges)
    restored.load_state_dict(quantized.state_dict())
    assert all(map(torch.equal, restored(photograph), quantized(photograph)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda ranges: ranges | {"layer9": (0.0, 1.0)}, "a range of 'layer9', which is no tensor of this net"),
        (lambda ranges: ranges | {next(iter(ranges)): (0.0, math.inf)}, "must be two finite numbers, got"),
        (lambda ranges: ranges | {next(iter(ranges)): "wide"}, "must be two finite numbers, got 'wide'"),
        (lambda ranges: {}, "holds no range of"),
    ],
)
def test_refuses_invalid_ranges(net, photograph, change, text):
    ranges = quantize(net, photograph).ranges
    with pytest.raises(ValueError, match=text):
        quantize(net, change(ranges))
