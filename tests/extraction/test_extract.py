"""`resbackbone extract`: what it writes, what it says, what it refuses."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import LEVELS, SMALL, fails, make_picture, maps, net_and_checkpoint, run, write_config, written
from matplotlib import cbook
from safetensors.torch import load_file

from resbackbone import build_backbone
from resbackbone.data.pictures import read_picture, readable_suffixes
from resbackbone.data.preprocessing import CAFFE, TORCHVISION
from resbackbone.extraction.extractor import Extractor
from resbackbone.necks import FPN


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

    def test_features_are_the_backbones(self, folder, randomize_norms):
        net = net_and_checkpoint(randomize_norms, "small.pth")
        picture = make_picture("a.png")
        result = run(
            "extract", "small.yaml", picture, "--out", "out", "--checkpoint", "small.pth", "--backend", "plain"
        )
        with torch.inference_mode():
            expected = net(TORCHVISION(read_picture(picture)))
        features = maps("out/a.png")
        assert list(features) == LEVELS
        for values, tensor in zip(features.values(), expected, strict=True):
            assert np.array_equal(values, tensor[0].numpy())
        assert "weights: small.pth (" in result.stdout
        assert "tensors loaded" in result.stdout
        assert "random" not in result.stdout

    def test_caffe_style_takes_bgr(self, folder, randomize_norms):
        write_config("caffe.yaml", style="caffe")
        net = net_and_checkpoint(randomize_norms, "caffe.pth", style="caffe")
        picture = make_picture("a.png")
        run("extract", "caffe.yaml", picture, "--out", "out", "--checkpoint", "caffe.pth", "--backend", "plain")
        with torch.inference_mode():
            expected = net(CAFFE(read_picture(picture)))[0][0]
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

    def test_fpn(self, folder, randomize_norms):
        net = net_and_checkpoint(randomize_norms, "small.pth")
        make_picture("a.png", size=(96, 64))
        arguments = ("extract", "small.yaml", "a.png", "--fpn", "--checkpoint", "small.pth", "--backend", "plain")
        result = run(*arguments, "--out", "out")
        shapes = {name: values.shape for name, values in maps("out/a.png").items()}
        sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
        assert shapes == {f"p{level}": (256, *size) for level, size in zip(range(2, 7), sizes, strict=True)}
        assert "weights of the FPN: random\n" in result.stdout
        torch.manual_seed(0)
        fpn = FPN(in_channels=net.out_channels, out_channels=256, num_outs=5)
        fpn.init_weights()
        with torch.inference_mode():
            expected = fpn(net(TORCHVISION(read_picture("a.png"))))[2][0]
        assert np.array_equal(maps("out/a.png")["p4"], expected.numpy())

    def test_fpn_levels_are_named_by_stride(self, folder):
        write_config("retina.yaml", out_indices=(1, 2, 3))
        make_picture("a.png")
        run("extract", "retina.yaml", "a.png", "--out", "out", "--fpn")
        assert list(maps("out/a.png")) == ["p3", "p4", "p5", "p6", "p7"]
        extractor = Extractor("retina.yaml", fpn=True)
        assert extractor.levels == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}

    @pytest.mark.parametrize(
        ("dtype", "in_npy"),
        [("float32", "float32"), ("float64", "float64"), ("float16", "float16"), ("bfloat16", "float32")],
    )
    def test_dtypes(self, folder, dtype, in_npy):
        make_picture("a.png")
        backend = ("--backend", "plain") if dtype == "float16" else ()  # the others refuse it on a CPU
        arguments = ("extract", "small.yaml", "a.png", "--out", "out", "--dtype", dtype, *backend)
        run(*arguments)
        run(*arguments, "--format", "safetensors")
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

    @pytest.mark.parametrize(
        "name",
        [b"a\nb.png", b"a\rb\tc.png", b"\x1b[2Ja.png", b"caf\xe9.png", b"x" * 251 + b".png", b"\xe2\x80\xa8.png"],
        ids=["line break", "carriage return", "escape", "no UTF-8", "long", "line separator"],
    )
    def test_names_of_all_kinds(self, folder, name):
        path = Path(os.fsdecode(name))
        make_picture("a.png").rename(path)
        result = run("extract", "small.yaml", path, "--out", "out")
        assert "1 of 1 picture extracted" in result.stdout
        assert result.stderr == ""
        assert list(maps(Path("out", path))) == LEVELS
        assert result.stdout.count("\n") == 3
        assert not set(result.stdout) & {"\x1b", "\r", "\t", "\u2028"}
        path.write_bytes(b"no picture")
        said = run("extract", "small.yaml", path, "--out", "out", status=1).stderr
        assert said.startswith("skipped: cannot read picture '")
        assert said.count("\n") == 2

    def test_links_are_followed_and_what_is_left_out_is_named(self, folder):
        make_picture("far/deep/a.ppm")
        make_picture("in/b.avif" if ".avif" in readable_suffixes() else "in/b.PNG")
        Path("in/linked").symlink_to(folder / "far")
        Path("far/loop").symlink_to(folder / "in")
        Path("in/c.heic").touch()
        Path("in/d.png").symlink_to("gone.png")
        result = run("extract", "small.yaml", "in", "--out", "out")
        assert "2 of 2 pictures extracted" in result.stdout
        assert Path("out/linked/deep/a.ppm/pyramid.png").exists()
        assert result.stderr.splitlines() == [
            "1 skipped, as Pillow cannot read .heic here (pip install pillow-heif): 'in/c.heic'",
            "1 skipped, a broken link: 'in/d.png'",
        ]

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

    def test_infinities_are_mentioned(self, folder, randomize_norms):
        net = net_and_checkpoint(randomize_norms, "small.pth")
        net.layer4[1].bn2.weight.data.fill_(1e30)
        torch.save(net.state_dict(), "small.pth")
        make_picture("a.png")
        arguments = ("extract", "small.yaml", "a.png", "--out", "out", "--checkpoint", "small.pth")
        half = ("--dtype", "float16", "--backend", "plain")
        assert "a.png: infinite or NaN in layer4; try another --dtype" in run(*arguments, *half).stderr
        assert run(*arguments, "--dtype", "float64").stderr == ""

    def test_pretrained_weights_of_the_config_are_named(self, folder, randomize_norms):
        net_and_checkpoint(randomize_norms, "own.pth")
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
            (("small.yaml", "a.png", "--out", "small.yaml"), "--out needs a folder, but 'small.yaml' is a file"),
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
