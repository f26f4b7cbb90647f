"""The command line: what it prints, what it writes, how it ends; `extract` has a file of its own."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import SMALL, fails, net_and_checkpoint, plain, run, write_config, written

from resbackbone import list_backbones
from resbackbone.training.classification.transforms import build_transforms


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
        files["recorded"].write_text("{backbone: {type: Nothing}}")
        files["new"].write_text("{backbone: {type: Anything}}")
        costs = {"recorded": {"params": 12345678, "macs": 9876543210}}
        monkeypatch.setattr("resbackbone.config.recorded_costs", lambda: costs)
        for module in ("resbackbone.config", "resbackbone.config.build"):
            monkeypatch.setattr(f"{module}.config_files", lambda: files)
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
        assert fails("list", "wide_resnett50_2") == (
            "no backbone matches 'wide_resnett50_2'; did you mean 'wide_resnet50_2'? `resbackbone list` shows all"
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
            ("broken.yaml", "'broken.yaml' is not valid YAML"),
            ("typo.yaml", "ResNet has no argument 'dept'; did you mean 'depth'?"),
        ],
    )
    def test_wrong_configs(self, folder, config, message):
        Path("broken.yaml").write_text("type: [")
        Path("typo.yaml").write_text("{type: ResNet, dept: 50}")
        assert fails("info", config).startswith(message)

    def test_wrong_size(self):
        assert fails("info", "resnet18", "--size", "big").endswith("got 'big'")


class TestConvert:
    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".npz", ".pkl", ".pdparams"])
    def test_there_and_back(self, randomize_norms, folder, suffix):
        net = net_and_checkpoint(randomize_norms, "small.pth")
        there = run("convert", "small.pth", f"there{suffix}", "--to", "detectron2")
        assert there.stdout == f"120 tensors, native to detectron2: there{suffix}\n"
        back = run("convert", f"there{suffix}", "back.pth", "--to", "native", "--from", "detectron2")
        assert "120 tensors, detectron2 to native: back.pth" in back.stdout
        for key, value in torch.load("back.pth").items():
            assert torch.equal(value, net.state_dict()[key]), key
        assert written(folder) == sorted(["small.yaml", "small.pth", "back.pth", f"there{suffix}"])

    def test_heads_are_left_out_and_said_to_be(self, randomize_norms, folder):
        net = net_and_checkpoint(randomize_norms, "small.pth")
        detector = {f"backbone.{key}": value for key, value in net.state_dict().items()}
        torch.save(detector | {"neck.weight": torch.zeros(1)}, "detector.pth")
        assert (
            "1 outside the backbone left out, such as neck.weight"
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
    def test_refuses(self, randomize_norms, folder, arguments, message):
        net_and_checkpoint(randomize_norms, "small.pth")
        assert message in fails("convert", *arguments)
        assert written(folder) == ["small.pth", "small.yaml"]


class TestLoadReport:
    def test_what_fits(self, randomize_norms, folder):
        net = net_and_checkpoint(randomize_norms, "small.pth")
        torch.save({**net.state_dict(), "fc.weight": torch.zeros(10, 64)}, "full.pth")
        shown = run("load-report", "small.yaml", "full.pth").stdout
        assert re.search(r"loaded +│ 120", shown)
        assert re.search(r"ignored +│ 1 +│ fc\.weight", shown)

    def test_what_does_not(self, randomize_norms, folder):
        net_and_checkpoint(randomize_norms, "small.pth")
        write_config("deep.yaml", depth=34)
        shown = run("load-report", "deep.yaml", "small.pth", status=1).stdout
        assert re.search(r"missing +│ 80 +│ layer1\.2\.conv1\.weight", shown)
        assert "no checkpoint at 'gone.pth'" in fails("load-report", "small.yaml", "gone.pth")


class TestOut:
    @pytest.fixture(autouse=True)
    def _folder(self, folder):
        write_config("small.yaml")
        Path("file").write_text("mine")
        Path("there").mkdir()

    @pytest.mark.parametrize("out", ["file", "file/inner", "file/inner/deeper"])
    def test_extract_refuses_a_file_for_its_folder(self, out):
        said = fails("extract", "small.yaml", "picture.png", "--out", out)
        assert said == "--out needs a folder, but 'file' is a file; give another one"
        assert Path("file").read_text() == "mine"

    @pytest.mark.parametrize("command", ["bench", "export"])
    def test_a_folder_is_refused_for_a_file_before_anything_is_computed(self, command):
        assert fails(command, "small.yaml", "--out", "there") == (
            "--out needs the name of a file, but 'there' is a folder"
        )
        assert fails(command, "small.yaml", "--out", "none/net.pt2") == (
            "--out needs an existing folder, but 'none' is none"
        )

    def test_train_refuses_a_file_for_its_folder(self):
        Path("recipe.py").write_text("model = dict(type='Nothing')")
        said = fails("train", "recipe.py", "--work-dir", "file")
        assert said == "--work-dir needs a folder, but 'file' is a file; give another one"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "there is not enough memory"),
        (MemoryError("of 3 GB"), "of 3 GB"),
        (RecursionError("deep"), "deep"),
    ],
)
def test_what_the_machine_cannot_do_is_one_line(monkeypatch, error, message):
    def fail(*_):
        raise error

    monkeypatch.setattr("resbackbone.checkpoints.tensors.locate", fail)
    assert fails("convert", "a.pth", "b.pth", "--to", "timm") == message


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes")]
)
def test_a_checkpoint_for_which_memory_lacks_is_named(monkeypatch, tmp_path, error):
    def fail(*_, **__):
        raise error

    (tmp_path / "a.pth").write_bytes(b"x")
    monkeypatch.setattr("resbackbone.checkpoints.readers.files._read", fail)
    shown = fails("convert", tmp_path / "a.pth", tmp_path / "b.pth", "--to", "timm")
    assert shown == f"{str(tmp_path / 'a.pth')!r} needs more memory than there is"


@pytest.mark.parametrize("value", ["[dict(type='Resize',size=2)]", "dict(a=1)", "[{'a': 1}]", "[1,2]x", "[a,b", "((1)"])
def test_overrides_that_cannot_be_read_are_named(tmp_path, value):
    (tmp_path / "a.py").write_text("train_dataloader = dict(dataset=dict(transforms=[]))\n")
    option = f"train_dataloader.dataset.transforms={value}"
    shown = fails("train", tmp_path / "a.py", "--cfg-options", option)
    assert shown.startswith("the override ")
    assert "train_dataloader.dataset.transforms=" in shown


@pytest.mark.parametrize("transforms", ["foo", "{}", "3", "['foo']", "[None]"])
def test_transforms_that_are_none_are_named(transforms):
    with pytest.raises(TypeError, match="`transforms` must be a list of configs or callables, got "):
        build_transforms("foo" if transforms == "foo" else ast.literal_eval(transforms))
