"""The command line: what it prints, what it writes, how it ends."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from resbackbone import build_backbone, list_backbones
from resbackbone.cli import app
from resbackbone.cli.features import Extractor
from resbackbone.cli.pyramid import BACKGROUND, Level, draw_pyramid, heat_colours
from resbackbone.images import read_image
from resbackbone.necks import FPN
from resbackbone.preprocessing import CAFFE, TORCHVISION

LEVELS = ["layer1", "layer2", "layer3", "layer4"]
SMALL = {"type": "ResNet", "depth": 18, "base_channels": 8}


@pytest.fixture(autouse=True)
def _nobody_watches(monkeypatch):
    """No terminal, whatever the environment pretends (FORCE_COLOR)."""
    monkeypatch.setattr(Console, "is_terminal", False)


def plain(text):
    """Text without colours, which some CI services ask for."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def run(*arguments, status=0):
    """Run the command in this process; no run may end in a traceback."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    return SimpleNamespace(stdout=plain(result.stdout), stderr=plain(result.stderr))


def fails(*arguments):
    """Run a command that the user got wrong: the one line that says so, without "error: "."""
    result = run(*arguments, status=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").rstrip()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a small backbone's config."""
    monkeypatch.chdir(tmp_path)
    write_config("small.yaml")
    return tmp_path


def write_config(path, **arguments):
    Path(path).write_text(json.dumps({**SMALL, **arguments}))  # JSON is YAML


def make_picture(path, size=(70, 50), mode="RGB"):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 80).convert(mode).save(path)
    return path


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def maps(folder):
    return {path.stem: np.load(path) for path in sorted(Path(folder).glob("*.npy"))}


def net_and_checkpoint(shake, path, **arguments):
    """A backbone of weights that are no one's initialisation, and the file of them."""
    net = shake(build_backbone({**SMALL, **arguments})).eval()
    torch.save(net.state_dict(), path)
    return net


class TestTop:
    def test_the_installed_command_shows_help(self):
        command = [sys.executable, "-c", "from resbackbone.cli import main; main()", "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        assert all(
            word in plain(shown.stdout) for word in ("Usage: resbackbone", "list", "info", "extract", "--version")
        )
        assert shown.stderr == ""

    def test_version(self):
        assert run("--version").stdout.strip().count(".") == 2

    def test_unknown_commands_and_options_are_bad_usage(self):
        assert "No such command" in run("extrct", status=2).stderr
        assert "--sise" in run("info", "resnet50", "--sise", "3", status=2).stderr


class TestList:
    def test_every_backbone_is_in_the_table_by_family(self):
        shown = run("list").stdout
        lines = shown.splitlines()
        assert all(sum(f" {name} " in line for line in lines) == 1 for name in list_backbones())
        (line,) = [line for line in lines if " resnext50_32x4d " in line]
        assert line.split() == ["resnext", "resnext50_32x4d", "ResNeXt", "25.0", "M", "4.23", "G"]

    def test_the_table_fits_a_narrow_terminal_whole(self):
        shown = run("list").stdout
        assert "…" not in shown
        assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80

    def test_costs_are_read_and_not_counted(self, monkeypatch, tmp_path):
        files = {name: tmp_path / "mine" / f"{name}.yaml" for name in ("recorded", "new")}
        files["new"].parent.mkdir()
        files["recorded"].write_text("{backbone: {type: Nothing}, params: 12345678, macs: 9876543210}")
        files["new"].write_text("{backbone: {type: Anything}}")
        monkeypatch.setattr("resbackbone.config.config_files", lambda: files)
        lines = [line.split() for line in run("list").stdout.splitlines() if "thing" in line]
        assert lines == [["mine", "new", "Anything"], ["recorded", "Nothing", "12.3", "M", "9.88", "G"]]

    def test_names_for_scripts(self):
        assert run("list", "--names").stdout.splitlines() == list_backbones()

    @pytest.mark.parametrize(
        ("pattern", "meaning"), [("wide*", "wide*"), ("wide", "*wide*"), ("resnet?8", "resnet?8"), ("*_v1d", "*_v1d")]
    )
    def test_patterns(self, pattern, meaning):
        names = run("list", pattern, "--names").stdout.splitlines()
        assert names == list_backbones(meaning) != []

    def test_small_ones_come_first(self):
        words = run("list", "resnet*_v1d").stdout.split()
        assert [word for word in words if word.startswith("resnet") and word.endswith("v1d")][1:4] == [
            "resnet18_v1d",
            "resnet26_v1d",
            "resnet34_v1d",
        ]

    def test_no_match(self):
        assert fails("list", "wide_resnet50_3") == (
            "no backbone's name matches 'wide_resnet50_3'; did you mean 'wide_resnet50_2'? `resbackbone list` shows all"
        )


class TestInfo:
    def test_table(self):
        shown = run("info", "resnet50").stdout
        rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.split()}
        assert rows["layer3"] == ["1024", "16", "14x14", "7,098,368", "1,464,336,384", "yes"]
        assert rows["stem"][-1] == "no"
        assert rows["backbone"] == ["23,508,032", "4,087,136,256"]
        assert rows["+"] == ["classifier", "25,557,032", "4,089,184,256"]
        assert rows["source:"] == ["https://arxiv.org/abs/1512.03385"]
        assert "resnet50: ResNet(depth=50)" in shown

    def test_json_of_a_file(self, folder):
        write_config("dilated.yaml", strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), out_indices=(1, 3))
        facts = json.loads(run("info", "dilated.yaml", "--size", "64x96", "--json").stdout)
        assert (facts["type"], facts["size"], facts["config"]["out_indices"]) == ("ResNet", [64, 96], [1, 3])
        assert [part["output"] for part in facts["parts"]] == [False, False, True, False, True]
        assert [part["stride"] for part in facts["parts"]] == [4, 4, 8, 16, 16]
        assert [facts["parts"][-1][side] for side in ("height", "width")] == [4, 6]
        assert facts["with_classifier"]["params"] - facts["backbone"]["params"] == 65 * 1000

    def test_python_config_of_a_detector(self, folder):
        Path("detector.py").write_text(f"model = dict(type='Detector', backbone=dict({SMALL!r}))")
        assert "ResNet(depth=18, base_channels=8)" in run("info", "detector.py").stdout

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("resnt50", "unknown backbone 'resnt50'; did you mean 'resnet50'?"),
            ("gone.yaml", "no config file at 'gone.yaml'"),
            ("broken.yaml", "'broken.yaml' is no valid YAML"),
            ("typo.yaml", "ResNet has no argument 'dept'; did you mean 'depth'?"),
        ],
    )
    def test_wrong_configs(self, folder, config, message):
        Path("broken.yaml").write_text("type: [")
        Path("typo.yaml").write_text("{type: ResNet, dept: 50}")
        assert fails("info", config).startswith(message)

    def test_wrong_size(self):
        assert fails("info", "resnet18", "--size", "big").endswith("got 'big'")


class TestExtract:
    def test_a_real_photograph(self, tmp_path):
        photograph = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
        result = run("extract", "resnet18", photograph, "--out", tmp_path / "out")
        features = maps(tmp_path / "out/grace_hopper.jpg")
        shapes = {name: values.shape for name, values in features.items()}
        expected = [(64, 150, 128), (128, 75, 64), (256, 38, 32), (512, 19, 16)]
        assert shapes == dict(zip(LEVELS, expected, strict=True))
        assert all(values.std() > 0 and np.isfinite(values).all() for values in features.values())
        assert "weights: random (no checkpoint given)\n" in result.stdout
        assert "1 of 1 picture extracted" in result.stdout
        assert str(tmp_path / "out/grace_hopper.jpg/pyramid.png") in result.stdout
        assert result.stderr == ""  # no progress bar where nobody watches

    def test_features_are_the_backbones(self, folder, shake):
        net = net_and_checkpoint(shake, "small.pth")
        picture = make_picture("a.png")
        result = run("extract", "small.yaml", picture, "--out", "out", "--checkpoint", "small.pth")
        with torch.inference_mode():
            expected = net(TORCHVISION(read_image(picture)))
        features = maps("out/a.png")
        assert list(features) == LEVELS
        for values, tensor in zip(features.values(), expected, strict=True):
            assert np.array_equal(values, tensor[0].numpy())
        assert "weights: small.pth (" in result.stdout
        assert "tensors loaded" in result.stdout
        assert "random" not in result.stdout

    def test_caffe_style_takes_bgr(self, folder, shake):
        write_config("caffe.yaml", style="caffe")
        net = net_and_checkpoint(shake, "caffe.pth", style="caffe")
        picture = make_picture("a.png")
        run("extract", "caffe.yaml", picture, "--out", "out", "--checkpoint", "caffe.pth")
        with torch.inference_mode():
            expected = net(CAFFE(read_image(picture)))[0][0]
        assert np.array_equal(maps("out/a.png")["layer1"], expected.numpy())

    def test_random_weights_are_the_same_in_every_run(self, folder):
        make_picture("a.png")
        for out in ("one", "two"):
            run("extract", "small.yaml", "a.png", "--out", out, "--fpn")
            torch.rand(3)
        assert all(
            Path("one/a.png", name).read_bytes() == Path("two/a.png", name).read_bytes()
            for name in written("one/a.png")
        )

    def test_fpn(self, folder, shake):
        net = net_and_checkpoint(shake, "small.pth")
        make_picture("a.png", size=(96, 64))
        result = run("extract", "small.yaml", "a.png", "--out", "out", "--fpn", "--checkpoint", "small.pth")
        shapes = {name: values.shape for name, values in maps("out/a.png").items()}
        sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
        assert shapes == {f"p{level}": (256, *size) for level, size in zip(range(2, 7), sizes, strict=True)}
        assert "weights of the FPN: random\n" in result.stdout
        torch.manual_seed(0)
        fpn = FPN(in_channels=net.out_channels, out_channels=256, num_outs=5)
        fpn.init_weights()
        with torch.inference_mode():
            expected = fpn(net(TORCHVISION(read_image("a.png"))))[2][0]
        assert np.array_equal(maps("out/a.png")["p4"], expected.numpy())

    def test_fpn_levels_are_named_by_stride(self, folder):
        write_config("retina.yaml", out_indices=(1, 2, 3))
        make_picture("a.png")
        run("extract", "retina.yaml", "a.png", "--out", "out", "--fpn")
        assert list(maps("out/a.png")) == ["p3", "p4", "p5", "p6", "p7"]
        extractor = Extractor("retina.yaml", checkpoint=None, device="cpu", dtype="float32", fpn=True)
        assert extractor.levels == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}

    @pytest.mark.parametrize(
        ("dtype", "in_npy"),
        [("float32", "float32"), ("float64", "float64"), ("float16", "float16"), ("bfloat16", "float32")],
    )
    def test_dtypes(self, folder, dtype, in_npy):
        make_picture("a.png")
        run("extract", "small.yaml", "a.png", "--out", "out", "--dtype", dtype)
        run("extract", "small.yaml", "a.png", "--out", "out", "--dtype", dtype, "--format", "safetensors")
        tensors = load_file("out/a.png/features.safetensors")
        assert list(tensors) == LEVELS
        for name, values in maps("out/a.png").items():
            assert tensors[name].dtype is getattr(torch, dtype)
            assert values.dtype == in_npy
            assert torch.equal(torch.from_numpy(values), tensors[name].to(getattr(torch, in_npy)))

    def test_safetensors_is_one_file(self, folder):
        make_picture("a.png")
        run("extract", "small.yaml", "a.png", "--out", "out", "--format", "safetensors")
        assert written("out") == ["a.png/features.safetensors", "a.png/pyramid.png"]

    @pytest.mark.parametrize(("size", "layer1"), [("32", (8, 16)), ("64x32", (16, 8))])
    def test_size(self, folder, size, layer1):
        make_picture("a.png", size=(100, 50))
        run("extract", "small.yaml", "a.png", "--out", "out", "--size", size)
        assert maps("out/a.png")["layer1"].shape == (8, *layer1)

    def test_one_channel(self, folder):
        write_config("gray.yaml", in_channels=1)
        make_picture("a.png")
        run("extract", "gray.yaml", "a.png", "--out", "out")
        assert len(maps("out/a.png")) == 4

    def test_a_bad_picture_does_not_stop_the_others(self, folder):
        for name in ("a.png", "z.png"):
            make_picture(folder / "in" / name)
        Path("in/cut.png").write_bytes(Path("in/a.png").read_bytes()[:999])
        Path("in/empty.jpg").touch()
        result = run("extract", "small.yaml", "in", "--out", "out", status=1)
        assert sorted(path.name for path in Path("out").iterdir()) == ["a.png", "z.png"]
        assert "cannot read picture 'in/empty.jpg': the file is empty\n" in result.stderr
        assert "cannot read picture 'in/cut.png': " in result.stderr
        assert "2 skipped" in result.stderr
        assert "2 of 4 pictures extracted to out" in result.stdout

    def test_folders_and_odd_names(self, folder):
        odd = "in/über uns [bold]/猫 1.JPG"
        for path in ("in/cat.jpg", "in/cat.png", odd):
            make_picture(path)
        result = run("extract", "small.yaml", "in", "--out", "out dir/x")
        names = {"cat.jpg", "cat.png", odd.removeprefix("in/")}
        assert {str(path.parent.relative_to("out dir/x")) for path in Path("out dir/x").rglob("layer4.npy")} == names
        assert "extracted to out dir/x" in result.stdout

    def test_same_name_in_two_folders(self, folder):
        for path in ("x/cat.jpg", "y/cat.jpg"):
            make_picture(path)
        run("extract", "small.yaml", "x/cat.jpg", "y/cat.jpg", "--out", "out")
        assert {str(path.parent) for path in Path("out").rglob("layer1.npy")} == {"out/x/cat.jpg", "out/y/cat.jpg"}

    def test_a_second_run_does_not_take_the_results_for_pictures(self, folder):
        make_picture("in/a.png")
        for _ in range(2):
            run("extract", "small.yaml", "in", "--out", "in/features")
        assert [path.name for path in Path("in/features").iterdir()] == ["a.png"]

    def test_an_interrupted_write_leaves_nothing(self, folder, monkeypatch):
        make_picture("a.png")

        def fill_the_disk(file, array):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "save", fill_the_disk)
        result = run("extract", "small.yaml", "a.png", "--out", "out", status=1)
        assert written("out") == []
        assert "skipped: a.png: [Errno 28] No space left on device" in result.stderr
        assert "0 of 1 picture extracted" in result.stdout

    def test_infinities_are_mentioned(self, folder, shake):
        net = net_and_checkpoint(shake, "small.pth")
        net.layer4[1].bn2.weight.data.fill_(1e30)
        torch.save(net.state_dict(), "small.pth")
        make_picture("a.png")
        arguments = ("extract", "small.yaml", "a.png", "--out", "out", "--checkpoint", "small.pth")
        assert "a.png: infinite or NaN in layer4; try another --dtype" in run(*arguments, "--dtype", "float16").stderr
        assert run(*arguments, "--dtype", "float64").stderr == ""

    def test_pretrained_weights_of_the_config_are_named(self, folder, shake):
        net_and_checkpoint(shake, "own.pth")
        write_config("pretrained.yaml", init_cfg={"type": "Pretrained", "checkpoint": "own.pth"})
        make_picture("a.png")
        result = run("extract", "pretrained.yaml", "a.png", "--out", "out")
        assert "weights: own.pth (named by the config)" in result.stdout
        run("extract", "small.yaml", "a.png", "--out", "given", "--checkpoint", "own.pth")
        assert np.array_equal(maps("out/a.png")["layer4"], maps("given/a.png")["layer4"])


class TestExtractRefuses:
    @pytest.fixture(autouse=True)
    def _picture(self, folder):
        make_picture("a.png")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("resnt18", "a.png"), "unknown backbone 'resnt18'; did you mean 'resnet18'?"),
            (("small.yaml", "gone.png"), "no picture or folder at 'gone.png'"),
            (("small.yaml", "void"), "no pictures in 'void'; looked for .jpg"),
            (("small.yaml", "a.png", "--size", "0"), "a size is one side in pixels or HEIGHTxWIDTH"),
            (("small.yaml", "a.png", "--device", "warp9"), "device 'warp9' is not there; available: cpu"),
            (("small.yaml", "a.png", "--device", "cuda:99"), "device 'cuda:99' is not there; available: cpu"),
            (("small.yaml", "a.png", "--checkpoint", "gone.pth"), "no checkpoint at 'gone.pth'"),
            (("small.yaml", "a.png", "--checkpoint", "a.png"), "'a.png' begins with b'\\x89PNG"),
            (
                ("resnet18", "a.png", "--checkpoint", "small.pth"),
                "'small.pth' does not fit ResNet, nothing was changed",
            ),
            (("five.yaml", "a.png"), "pictures have 1 or 3 channels, the backbone's `in_channels` is 5"),
            (("small.yaml", "a.png", "--out", "small.yaml"), "[Errno 17] File exists: 'small.yaml'"),
            (("small.yaml", "a.png", "--out", "."), "the results of a.png need a folder a.png, which is a file"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_before_anything_is_written(self, folder, arguments, message):
        write_config("five.yaml", in_channels=5)
        Path("void").mkdir()
        torch.save(build_backbone(SMALL).state_dict(), "small.pth")
        before = written(folder)
        assert fails("extract", *arguments, *(() if "--out" in arguments else ("--out", "out"))).startswith(message)
        assert written(folder) == before

    def test_bad_usage(self):
        assert "--out" in run("extract", "small.yaml", "a.png", status=2).stderr
        assert "int8" in run("extract", "small.yaml", "a.png", "--out", "out", "--dtype", "int8", status=2).stderr
        assert "PICTURE" in run("extract", "small.yaml", "--out", "out", status=2).stderr


class TestConvert:
    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".npz", ".pkl", ".pdparams"])
    def test_there_and_back(self, shake, folder, suffix):
        net = net_and_checkpoint(shake, "small.pth")
        there = run("convert", "small.pth", f"there{suffix}", "--to", "detectron2")
        assert there.stdout == f"120 tensors, native to detectron2: there{suffix}\n"
        back = run("convert", f"there{suffix}", "back.pth", "--to", "native", "--from", "detectron2")
        assert "120 tensors, detectron2 to native: back.pth" in back.stdout
        for key, value in torch.load("back.pth").items():
            assert torch.equal(value, net.state_dict()[key]), key
        assert written(folder) == sorted(["small.yaml", "small.pth", "back.pth", f"there{suffix}"])

    def test_heads_are_left_out_and_said_to_be(self, shake, folder):
        net = net_and_checkpoint(shake, "small.pth")
        detector = {f"backbone.{key}": value for key, value in net.state_dict().items()}
        torch.save(detector | {"neck.weight": torch.zeros(1)}, "detector.pth")
        assert (
            "1 left out that are no backbone's, such as neck.weight"
            in run("convert", "detector.pth", "out.pth", "--to", "timm").stdout
        )
        assert torch.load("out.pth").keys() == net.state_dict().keys()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("gone.pth", "out.pth", "--to", "timm"), "no checkpoint at 'gone.pth'"),
            (("small.pth", "out.pth", "--to", "tim"), "unknown layout 'tim'; did you mean 'timm'"),
            (("small.pth", "out.onnx", "--to", "timm"), "cannot write '.onnx' files"),
            (("small.pth", "out.pth", "--to", "timm", "--from", "paddle"), "no paddle backbone is among the keys"),
            (("small.pth", "void/out.pth", "--to", "timm"), "no folder 'void' to write out.pth into"),
        ],
    )
    def test_refuses(self, shake, folder, arguments, message):
        net_and_checkpoint(shake, "small.pth")
        assert message in fails("convert", *arguments)
        assert written(folder) == ["small.pth", "small.yaml"]


class TestLoadReport:
    def test_what_fits(self, shake, folder):
        net = net_and_checkpoint(shake, "small.pth")
        torch.save({**net.state_dict(), "fc.weight": torch.zeros(10, 64)}, "full.pth")
        shown = run("load-report", "small.yaml", "full.pth").stdout
        assert re.search(r"loaded +│ 120", shown)
        assert re.search(r"ignored +│ 1 +│ fc\.weight", shown)

    def test_what_does_not(self, shake, folder):
        net_and_checkpoint(shake, "small.pth")
        write_config("deep.yaml", depth=34)
        shown = run("load-report", "deep.yaml", "small.pth", status=1).stdout
        assert re.search(r"missing +│ 80 +│ layer1\.2\.conv1\.weight", shown)
        assert "no checkpoint at 'gone.pth'" in fails("load-report", "small.yaml", "gone.pth")


class TestPyramid:
    def levels(self, count, height, width):
        rng = np.random.default_rng(0)
        shapes = [(-(-height // 2**i), -(-width // 2**i)) for i in range(2, 2 + count)]
        return [Level(f"layer{i}", 64, 4, rng.random(shape, dtype=np.float32)) for i, shape in enumerate(shapes, 1)]

    @pytest.mark.parametrize("size", [(640, 480), (480, 640), (3000, 90), (90, 3000), (1, 1), (32, 32)])
    @pytest.mark.parametrize("count", [1, 4, 5])
    def test_every_shape_of_picture_fits(self, size, count):
        picture = Image.new("RGB", size, (0, 255, 0))
        drawn = np.asarray(draw_pyramid(picture, levels=self.levels(count, *size[::-1]), title="a title " * 40))
        height, width = drawn.shape[:2]
        assert 300 <= height <= 2000
        assert 300 <= width <= 2800
        assert (drawn == (0, 255, 0)).all(-1).sum() == pytest.approx(400 * 400, rel=0.01)
        frame = np.concatenate([drawn[:8].reshape(-1, 3), drawn[-8:].reshape(-1, 3), drawn[:, -8:].reshape(-1, 3)])
        assert (frame == BACKGROUND).all()  # nothing is cut off

    def test_feature_pixels_are_blocks_of_one_colour(self):
        heat = np.array([[0, 1], [1, 0]], dtype=np.float32)
        drawn = np.asarray(draw_pyramid(Image.new("RGB", (64, 64)), levels=[Level("layer4", 8, 32, heat)], title=""))
        low, high = heat_colours(np.array([0, 1], dtype=np.float32))
        for colour in (low, high):
            assert (drawn == colour).all(-1).sum() >= 2 * 200 * 200

    @pytest.mark.parametrize("value", [0.0, 3.0, np.nan, np.inf])
    def test_flat_and_broken_maps_are_drawn(self, value):
        level = Level("layer4", 8, 32, np.full((2, 2), value, dtype=np.float32))
        assert draw_pyramid(Image.new("L", (64, 64)), levels=[level], title="").mode == "RGB"

    def test_colours_grow_lighter_throughout(self):
        luminance = heat_colours(np.linspace(0, 1, 200, dtype=np.float32)) @ (0.2126, 0.7152, 0.0722)
        assert (np.diff(luminance) > 0).all()
