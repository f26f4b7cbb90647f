"""`export`: the file computes what the net does for all batches and sizes, or is not written."""

import copy
import importlib.util
import json
import logging
import math
import shutil
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import torch
from cases import every_case, make, one_block_per_stage
from command_line import fails, run, write_config, written
from torch import nn

import resbackbone
from resbackbone import FeatureInfo, ResNet, ResNetV2
from resbackbone.analysis.cost import build_on_meta
from resbackbone.data.preprocessing import CAFFE, TORCHVISION
from resbackbone.inference import export, optimize, quantize
from resbackbone.inference.export_formats import EXPORT_FORMATS
from resbackbone.inference.progress import report_progress
from resbackbone.necks import FPN

TINY = {"depth": 18, "base_channels": 8, "num_stages": 1, "strides": (1,), "dilations": (1,), "out_indices": (0,)}
# Other shapes than those that a net is traced with and the file is checked on.
SHAPES = [(2, 3, 34, 50), (1, 3, 65, 33), (4, 3, 96, 47)]
NO_COMPILER = shutil.which("c++") is None


@pytest.fixture
def net(randomize_norms):
    return randomize_norms(ResNet(**TINY)).eval()


@pytest.fixture
def pyramid(net):
    """A backbone with an FPN of two outputs, and their levels."""
    model = nn.Sequential(net, FPN(net.out_channels, 16, num_outs=2)).eval()
    return model, (FeatureInfo("p2", 0, 16, 4), FeatureInfo("p3", 1, 16, 8))


@pytest.fixture
def change(monkeypatch):
    """Replace attributes of an export format."""
    return lambda to, **parts: monkeypatch.setitem(EXPORT_FORMATS, to, replace(EXPORT_FORMATS[to], **parts))


def onnx_session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_onnx(session, images):
    return [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]


def assert_close(outs, expected, tolerance):
    """Compare relative to the largest value of each level."""
    assert len(outs) == len(expected)
    for out, reference in zip(outs, expected, strict=True):
        assert out.shape == reference.shape
        assert (out.float() - reference).abs().max() <= tolerance * reference.abs().max()


class TestFiles:
    @torch.no_grad()
    def test_onnx(self, net, tmp_path):
        exported = export(net, tmp_path / "net.onnx", metadata={"config": "tiny"})
        session = onnx_session(exported.path)
        (images,), (level,) = session.get_inputs(), session.get_outputs()
        assert (images.name, images.shape) == ("images", ["batch", 3, "height", "width"])
        assert (level.name, level.shape[:2]) == ("layer1", ["batch", 8])
        for shape in (*SHAPES, (1, 3, 1, 1)):
            x = torch.randn(shape)
            assert_close(run_onnx(session, x), net(x), 1e-5)
        facts = session.get_modelmeta().custom_metadata_map
        assert (facts["config"], facts["type"], facts["dtype"]) == ("tiny", "ResNet", "float32")
        assert json.loads(facts["levels"]) == [{"name": "layer1", "channels": 8, "stride": 4}]
        assert json.loads(facts["preprocessing"])["mean"] == list(TORCHVISION.mean)
        assert 0 < exported.differences["layer1"] < 1e-5
        assert (
            str(Path(resbackbone.__file__).parent).encode() not in exported.path.read_bytes()
        )  # no paths of this machine
        assert written(tmp_path) == ["net.onnx"]

    @torch.no_grad()
    def test_torch_export(self, net, tmp_path):
        net.preprocessing = CAFFE
        exported = export(net, tmp_path / "net.pt2", "torch-export", metadata={"config": "tiny"})
        facts = {"metadata.json": ""}
        loaded = torch.export.load(exported.path, extra_files=facts).module()
        for shape in SHAPES:
            x = torch.randn(shape)
            assert torch.equal(loaded(x)[0], net(x)[0])
        facts = json.loads(facts["metadata.json"])
        assert facts["config"] == "tiny"
        assert (facts["preprocessing"]["order"], facts["preprocessing"]["mean"]) == ("BGR", list(CAFFE.mean))
        assert exported.levels == net.feature_info
        assert exported.differences == {"layer1": 0.0}
        assert written(tmp_path) == ["net.pt2"]

    @pytest.mark.slow
    @pytest.mark.skipif(NO_COMPILER, reason="compiling ahead of time needs a C++ compiler")
    @torch.no_grad()
    def test_aoti(self, randomize_norms, tmp_path):
        # Its shortcut pools 2x2, which Inductor gets wrong if it was traced without a remainder.
        net = randomize_norms(ResNet(**{**TINY, "strides": (2,), "stage_blocks": (1,), "avg_down": True})).eval()
        exported = export(net, tmp_path / "net.pt2", "aoti", metadata={"config": "tiny"})
        loaded = torch._inductor.aoti_load_package(str(exported.path))
        for shape in (*SHAPES, (1, 3, 1, 1)):
            x = torch.randn(shape)
            assert_close(loaded(x), net(x), 1e-5)
        facts = loaded.get_metadata()
        assert (facts["config"], facts["dtype"]) == ("tiny", "float32")
        assert json.loads(facts["levels"]) == [{"name": "layer1", "channels": 8, "stride": 8}]
        assert written(tmp_path) == ["net.pt2"]

    @pytest.mark.parametrize(
        ("to", "name"), [("torch-export", "n.pt2"), pytest.param("onnx", "n.onnx", marks=pytest.mark.slow)]
    )
    @torch.no_grad()
    def test_backbone_with_fpn(self, pyramid, tmp_path, to, name):
        model, levels = pyramid
        assert list(export(model, tmp_path / name, to, levels=levels).differences) == ["p2", "p3"]
        if to == "onnx":
            session = onnx_session(tmp_path / name)
            assert [out.name for out in session.get_outputs()] == ["p2", "p3"]
            x = torch.randn(SHAPES[0])
            assert_close(run_onnx(session, x), model(x), 1e-5)

    @torch.no_grad()
    def test_half_precision(self, net, tmp_path):
        exported = export(net, tmp_path / "net.pt2", "torch-export", dtype="bfloat16")
        x = torch.randn(SHAPES[0])
        (out,) = torch.export.load(exported.path).module()(x.bfloat16())
        assert out.dtype is torch.bfloat16
        assert_close([out], net(x), 5e-2)
        assert 1e-4 < exported.differences["layer1"] < 5e-2
        assert next(net.parameters()).dtype is torch.float32

    @pytest.mark.slow
    def test_half_precision_in_onnx(self, net, tmp_path):
        export(net, tmp_path / "net.onnx", dtype="float16")
        session = onnx_session(tmp_path / "net.onnx")
        assert session.get_inputs()[0].type == session.get_outputs()[0].type == "tensor(float16)"

    def test_a_fixed_size(self, net, tmp_path):
        export(net, tmp_path / "net.pt2", "torch-export", size=(40, 56))
        loaded = torch.export.load(tmp_path / "net.pt2").module()
        for batch in (1, 5):
            assert loaded(torch.zeros(batch, 3, 40, 56))[0].shape == (batch, 8, 10, 14)
        with pytest.raises(AssertionError, match="size"):
            loaded(torch.zeros(1, 3, 40, 64))

    def test_the_net_is_not_changed_and_exported_in_eval_mode(self, randomize_norms, tmp_path):
        net = randomize_norms(ResNet(**TINY, norm_eval=False)).train()
        state = copy.deepcopy(net.state_dict())
        export(net, tmp_path / "net.pt2", "torch-export")
        assert net.layer1[0].bn1.training
        assert all(parameter.requires_grad for parameter in net.parameters())
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        x = torch.randn(SHAPES[0])
        assert torch.equal(torch.export.load(tmp_path / "net.pt2").module()(x)[0], net.eval()(x)[0])

    @pytest.mark.slow
    @pytest.mark.parametrize("to", ["onnx", "torch-export"])
    @every_case
    def test_every_backbone(self, randomize_norms, monkeypatch, tmp_path, case, to):
        one_block_per_stage(monkeypatch)
        net = randomize_norms(make(case)).eval()
        exported = export(net, tmp_path / f"net{EXPORT_FORMATS[to].suffix}", to)
        assert tuple(exported.differences) == tuple(info.name for info in net.feature_info)


def with_fpn(net, **options):
    return nn.Sequential(net, FPN(net.out_channels, 16, **options))


class Detector(nn.Module):
    """A detector with OpenMMLab's attributes and a forward pass that needs more than images."""

    def __init__(self, net, neck=None):
        super().__init__()
        self.backbone = net
        if neck is not None:
            self.neck = neck
        self.bbox_head = nn.Conv2d(16, 4, 1)

    def extract_feat(self, images):
        maps = self.backbone(images)
        return self.neck(maps) if hasattr(self, "neck") else maps

    def forward(self, images, data_samples):
        return [self.bbox_head(level) for level in self.extract_feat(images)], data_samples


class TorchvisionDetector(nn.Module):
    """A detector of a list of images that returns a list of dicts."""

    def __init__(self, net):
        super().__init__()
        self.backbone = DictOutput(net)

    def forward(self, images, targets=None):
        return [{"boxes": self.backbone(image[None])["0"]} for image in images]


class DictOutput(nn.Module):
    """A model that returns a dict."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixel_values):
        return {str(index): level for index, level in enumerate(self.net(pixel_values))}


class TensorOutput(nn.Module):
    """A model that returns a tensor."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[-1]


PYRAMID = ["p2", "p3", "p4", "p5", "p6"]
MODELS = {
    "neck": (lambda net: with_fpn(net, num_outs=5), PYRAMID),
    "nested": (lambda net: nn.Sequential(nn.Sequential(net), with_fpn(net, num_outs=5)[1]), PYRAMID),
    "extra convolutions": (lambda net: with_fpn(net, num_outs=6, add_extra_convs="on_output"), [*PYRAMID, "p7"]),
    "from the second stage": (lambda net: with_fpn(net, num_outs=5, start_level=1), [*PYRAMID[1:], "p7"]),
    "detector": (lambda net: Detector(net, with_fpn(net, num_outs=5)[1]), PYRAMID),
    "detector without a neck": (Detector, [f"layer{index}" for index in range(1, 5)]),
    "torchvision's detector": (TorchvisionDetector, ["0", "1", "2", "3"]),
    "dict": (DictOutput, ["0", "1", "2", "3"]),
    "tensor": (TensorOutput, ["p5"]),
}


class TestModels:
    """Models around a backbone, with levels inferred from their outputs."""

    @pytest.fixture
    def net(self, randomize_norms):
        return randomize_norms(ResNet(18, base_channels=8, stage_blocks=(1, 1, 1, 1))).eval()

    @pytest.mark.parametrize("to", ["torch-export", pytest.param("onnx", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("model", MODELS)
    @torch.no_grad()
    def test_a_model_around_a_backbone(self, net, tmp_path, model, to):
        make_model, names = MODELS[model]
        whole = make_model(net).eval()
        exported = export(whole, tmp_path / f"net{EXPORT_FORMATS[to].suffix}", to)
        assert [level.name for level in exported.levels] == list(exported.differences) == names
        images = torch.randn(2, 3, 150, 290)
        if to == "onnx":
            outs = run_onnx(onnx_session(exported.path), images)
        else:
            outs = torch.export.load(exported.path).module()(images)
        for out, level in zip(outs, exported.levels, strict=True):
            assert out.shape[1] == level.channels
            assert out.shape[2] in (150 // level.stride, -(-150 // level.stride))
        if isinstance(whole, nn.Sequential):
            assert_close(outs, whole(images), 1e-5)

    @torch.no_grad()
    def test_heads_are_not_in_the_file(self, net, tmp_path):
        exported = export(Detector(net, with_fpn(net, num_outs=5)[1]), tmp_path / "net.pt2", "torch-export")
        assert not any("bbox_head" in name for name in torch.export.load(exported.path).state_dict)

    @torch.no_grad()
    def test_the_stem_output(self, randomize_norms, tmp_path):
        net = randomize_norms(ResNet(18, base_channels=8, out_indices=("stem", 0, 3))).eval()
        assert list(export(net, tmp_path / "net.pt2", "torch-export").differences) == ["stem", "layer1", "layer4"]

    @torch.no_grad()
    def test_a_classifier(self, tmp_path):
        from resbackbone.training.classification import ImageClassifier

        model = ImageClassifier({"type": "ResNet", "depth": 18, "base_channels": 8}, num_classes=7).eval()
        exported = export(model, tmp_path / "net.pt2", "torch-export")
        assert exported.levels == (FeatureInfo("logits", 0, 7, 0),)
        images = torch.randn(3, 3, 64, 96)
        assert_close(torch.export.load(exported.path).module()(images), [model(images)], 1e-5)

    def test_refuses_levels_that_do_not_match(self, net, tmp_path):
        model = with_fpn(net, num_outs=5)
        for levels, text in (
            ([FeatureInfo("p2", 0, 16, 4)], "must be as many as the net's outputs, got 1 for 5"),
            ([FeatureInfo(f"p{i}", i, 8, 4) for i in range(5)], r"`levels\[0\]` must have the 16 channels"),
        ):
            with pytest.raises(ValueError, match=text):
                export(model, tmp_path / "n.pt2", "torch-export", levels=levels)

    def test_refuses_a_model_without_tensor_outputs(self, net, tmp_path):
        class StringOutput(TensorOutput):
            def forward(self, x):
                return ["a", "b"]

        with pytest.raises(
            ValueError, match=r"StringOutput does not run on images .* must return a tensor, or a tuple"
        ):
            export(StringOutput(net), tmp_path / "n.pt2", "torch-export")


class TestProgress:
    """Progress lines."""

    @pytest.mark.parametrize("to", ["onnx", "torch-export"])
    def test_other_libraries_are_silent(self, net, tmp_path, monkeypatch, caplog, capfd, to):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name == "torchvision" else find_spec(name)
        )
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
            export(net, tmp_path / f"net{EXPORT_FORMATS[to].suffix}", to)
        assert caught == caplog.records == []
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("to", ["onnx", "torch-export", "aoti"])
    def test_each_step_is_reported(self, net, tmp_path, change, caplog, to):
        change(to, write=lambda program, path, *rest: path.touch(), load=lambda path: net)
        name = f"net{EXPORT_FORMATS[to].suffix}"
        writing = f"compiling {name}, which takes minutes for a whole net" if to == "aoti" else f"writing {name}"
        lines = []
        with torch.no_grad(), caplog.at_level(logging.INFO, "resbackbone"):
            export(net, tmp_path / name, to, report=lines.append)
            assert caplog.messages == []
            export(net, tmp_path / name, to)
        assert lines == caplog.messages == ["tracing ResNet", writing, f"checking {name}"]

    def test_a_long_step_reports_its_duration(self, monkeypatch):
        monkeypatch.setattr("resbackbone.inference.progress.INTERVAL", 0.01)
        lines, reported = [], threading.Event()

        def report(line):
            lines.append(line)
            if len(lines) == 3:
                reported.set()

        with report_progress("compiling", report):
            assert reported.wait(60)
        count = len(lines)
        assert lines[:3] == ["compiling", "compiling: 0 s so far", "compiling: 0 s so far"]
        assert len(lines) == count

    def test_the_command_reports_to_stderr(self, folder, change, net):
        write_config("tiny.yaml", **TINY)
        shown = run("export", "tiny.yaml", "--to", "torch-export")
        assert shown.stderr.splitlines() == ["tracing ResNet", "writing tiny.pt2", "checking tiny.pt2"]
        assert "tracing" not in shown.stdout


class TestCheck:
    """A file is kept only if it computes what the net does."""

    @pytest.mark.parametrize("unchanged", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_onnxruntime_does_not_pad_by_minus_infinity(self, randomize_norms, tmp_path, change, unchanged):
        """Before ONNX Runtime 1.32 it would before a max pooling, where the net pads by zeros."""
        net = randomize_norms(ResNetV2(**TINY, zero_padded_pool=True, deep_stem=False))
        if not unchanged:
            assert export(net, tmp_path / "net.onnx").differences["layer1"] < 1e-5
            return
        change("onnx", prepare=lambda net: net)
        runtime = pytest.importorskip("onnxruntime")
        if tuple(map(int, runtime.__version__.split(".")[:2])) >= (1, 32):
            assert export(net, tmp_path / "net.onnx").differences["layer1"] < 1e-5
            return
        with pytest.raises(ValueError, match=r"not kept: layer1 of images \(1, 3, 64, 96\) is .* away from the net's"):
            export(net, tmp_path / "net.onnx")
        assert written(tmp_path) == []

    def test_refuses_a_file_with_other_weights(self, net, tmp_path, change):
        def write(program, *rest):
            program.state_dict["conv1.weight"].mul_(1.0001)
            original.write(program, *rest)

        original = EXPORT_FORMATS["torch-export"]
        change("torch-export", write=write)
        (tmp_path / "net.pt2").write_text("earlier")
        with pytest.raises(ValueError, match=r"layer1 .* away from the net's, where 1\.0e-05 is allowed"):
            export(net, tmp_path / "net.pt2", "torch-export")
        assert (tmp_path / "net.pt2").read_text() == "earlier"
        assert written(tmp_path) == ["net.pt2"]

    @pytest.mark.parametrize(
        ("spoil", "text"),
        [
            (lambda outs: [out + 1e-3 for out in outs], "away from the net's"),
            (lambda outs: [out * math.nan for out in outs], "is nan of its largest value away"),
            (lambda outs: [out[:, :4] for out in outs], r"is \(1, 4, 16, 24\) torch.float32 in the file"),
            (lambda outs: [out.double() for out in outs], "torch.float64 in the file"),
            (lambda outs: outs[7], "does not run on images"),
        ],
        ids=["off", "nan", "shape", "dtype", "error"],
    )
    def test_refuses_a_file_with_other_outputs(self, net, tmp_path, change, spoil, text):
        change(
            "torch-export",
            write=lambda program, path, *rest: path.touch(),
            load=lambda path: lambda images: spoil(net(images)),
        )
        with pytest.raises(ValueError, match=text):
            export(net, tmp_path / "net.pt2", "torch-export")
        assert written(tmp_path) == []

    def test_an_interrupted_write_leaves_no_file(self, net, tmp_path, change):
        def fill_the_disk(program, path, *rest):
            path.write_text("half")
            raise OSError(28, "No space left on device")

        change("torch-export", write=fill_the_disk)
        with pytest.raises(OSError, match="No space left"):
            export(net, tmp_path / "net.pt2", "torch-export")
        assert written(tmp_path) == []


class DataDependent(nn.Module):
    """A model with control flow that depends on the images."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) if x.sum() > 0 else self.net(-x)


class TestRefuses:
    @pytest.mark.parametrize(
        ("path", "options", "error", "text"),
        [
            (
                "n.onnx",
                {"to": "tflite"},
                ValueError,
                "`to` must be one of 'onnx', 'torch-export', 'aoti'; got 'tflite'",
            ),
            ("n.onnx", {"dtype": "bfloat16"}, ValueError, "`dtype` must be one of 'float32', 'float16'; got"),
            ("n.pt2", {}, ValueError, "`path` must end in '.onnx'"),
            ("n.onnx", {"to": "aoti"}, ValueError, "`path` must end in '.pt2'"),
            ("void/n.onnx", {}, FileNotFoundError, "no folder 'void' to write n.onnx into"),
            ("n.onnx", {"size": (0, 64)}, ValueError, r"`size\[0\]` must be at least 1, got 0"),
            ("n.onnx", {"size": (64,)}, ValueError, r"`size` must have 2 entries \(height, width\)"),
            ("n.onnx", {"levels": ["p2"]}, TypeError, r"`levels\[0\]` must be a FeatureInfo, got 'p2'"),
            ("n.onnx", {"levels": [FeatureInfo("p", 0, 8, 4)] * 2}, ValueError, "a name of its own, got p, p"),
            ("n.onnx", {"levels": []}, ValueError, "`levels` must be as many as the net's outputs, got 0 for 1"),
            ("n.onnx", {"metadata": {"net": object()}}, TypeError, "not JSON serializable"),
        ],
    )
    def test_arguments(self, net, folder, path, options, error, text):
        before = written(folder)
        with pytest.raises(error, match=text):
            export(net, path, **options)
        assert written(folder) == before

    def test_a_model_without_a_backbone(self, net, tmp_path):
        with pytest.raises(ValueError, match="`net` must be a backbone or contain one, got Conv2d"):
            export(nn.Conv2d(3, 8, 3), tmp_path / "n.onnx")

    @pytest.mark.parametrize("optimized", [optimize, lambda net: quantize(net, torch.zeros(1, 3, 32, 32))])
    def test_an_optimized_net(self, net, tmp_path, optimized):
        for other in (optimized(net), nn.Sequential(optimized(net), nn.Identity())):
            with pytest.raises(
                ValueError, match="`optimize` or `quantize` returned, which cannot be exported; export the"
            ):
                export(other, tmp_path / "n.onnx")

    @pytest.mark.parametrize("package", EXPORT_FORMATS["onnx"].packages)
    def test_missing_packages_name_the_extra(self, net, tmp_path, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"needs {package}; pip install 'resbackbone\[export\]'"):
            export(net, tmp_path / "n.onnx")

    @pytest.mark.slow
    def test_aoti_without_a_compiler(self, net, tmp_path):
        without = torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "none"))})
        with without, pytest.raises(ValueError, match=r"ResNet cannot be exported to aoti: .*needs a C\+\+ compiler"):
            export(net, tmp_path / "n.pt2", "aoti")
        assert written(tmp_path) == []

    def test_data_dependent_control_flow(self, net, tmp_path):
        with pytest.raises(
            ValueError, match="DataDependent cannot be exported to torch-export: Could not guard on data-dep"
        ):
            export(DataDependent(net), tmp_path / "n.pt2", "torch-export")

    def test_infinite_outputs(self, net, tmp_path):
        net.layer1[0].bn2.weight.data[0] = 1e30
        with pytest.raises(ValueError, match=r"in torch\.float16 layer1 is infinite or NaN; choose another `dtype`"):
            export(net, tmp_path / "n.pt2", "torch-export", dtype="float16")

    def test_weights_above_the_limit_of_onnx(self, tmp_path):
        net = build_on_meta({"type": "RegNet", "arch": "regnety_256gf"})
        with pytest.raises(ValueError, match=r"\.onnx files hold at most 2 GiB, the weights of RegNet take 4\.74 GiB"):
            export(net, tmp_path / "n.onnx")


class TestCommand:
    @pytest.fixture(autouse=True)
    def _tiny(self, folder):
        write_config("tiny.yaml", **TINY)

    def test_onnx_is_the_default(self, change):
        change("onnx", write=EXPORT_FORMATS["torch-export"].write, load=EXPORT_FORMATS["torch-export"].load)  # faster
        shown = run("export", "tiny.yaml").stdout.splitlines()
        assert shown[0] == "weights: as the config initializes them (no checkpoint given)"
        assert shown[1:] == [
            "layer1: 8 channels, stride 4, at most 0.0e+00 from the backbone's",
            "tiny.onnx computes what the backbone does",
        ]
        facts = {"metadata.json": ""}
        torch.export.load("tiny.onnx", extra_files=facts)
        facts = json.loads(facts["metadata.json"])
        assert (facts["config"], facts["resbackbone"]) == ("tiny", resbackbone.__version__)

    @torch.no_grad()
    def test_weights_of_a_checkpoint(self, net, folder):
        torch.save(net.state_dict(), "tiny.pth")
        options = ("--to", "torch-export", "--checkpoint", "tiny.pth", "--out", "there.pt2")
        assert "weights: tiny.pth (" in run("export", "tiny.yaml", *options).stdout
        x = torch.randn(SHAPES[0])
        assert torch.equal(torch.export.load("there.pt2").module()(x)[0], net(x)[0])

    def test_size_and_dtype(self, folder):
        run("export", "tiny.yaml", "--to", "torch-export", "--size", "48", "--dtype", "bfloat16")
        (out,) = torch.export.load("tiny.pt2").module()(torch.zeros(3, 3, 48, 48, dtype=torch.bfloat16))
        assert (out.shape, out.dtype) == ((3, 8, 12, 12), torch.bfloat16)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("resnt50",), "unknown backbone 'resnt50'; did you mean 'resnet50'?"),
            (("tiny.yaml", "--out", "tiny.pt2"), "`path` must end in '.onnx' for this format, got 'tiny.pt2'"),
            (("tiny.yaml", "--checkpoint", "gone.pth"), "no checkpoint at 'gone.pth'"),
            (("tiny.yaml", "--dtype", "bfloat16"), "`dtype` must be one of 'float32', 'float16'; got 'bfloat16'"),
            (("tiny.yaml", "--size", "0"), "a size is one side in pixels or HEIGHTxWIDTH"),
        ],
    )
    def test_refuses(self, folder, arguments, message):
        before = written(folder)
        assert fails("export", *arguments).startswith(message)
        assert written(folder) == before

    def test_bad_usage(self):
        assert "tflite" in run("export", "tiny.yaml", "--to", "tflite", status=2).stderr
