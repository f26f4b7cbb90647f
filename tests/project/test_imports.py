"""Importing the package loads little, and a missing dependency is named with the extra that installs it."""

import pickle
import subprocess
import sys

import pytest

import resbackbone
from resbackbone.cli import app


def run_python(code):
    """Run code in a fresh interpreter; return the words that it prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_importing_loads_no_host_and_no_operators():
    loaded = set(run_python("import sys; from resbackbone import ResNet; print(*sys.modules)"))
    unwanted = {"mmcv", "mmcv.ops", "mmdet", "mmseg", "mmpretrain", "mmengine.model", "mmengine.runner"}
    unwanted |= {"torchvision", "timm", "transformers", "PIL", "typer", "matplotlib"}
    assert "resbackbone.backbones.resnet" in loaded
    assert loaded & unwanted == set()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([command.name, "--help"] for command in app.registered_commands)]
)
def test_help_loads_no_torch(arguments):
    code = f"import sys; from resbackbone.cli import app; app({arguments}, standalone_mode=False); print(*sys.modules)"
    assert {"torch", "numpy", "PIL", "mmengine", "yaml"} & set(run_python(code)) == set()


def test_names_are_imported_when_they_are_used():
    code = """
import sys, resbackbone
assert "resbackbone.registry" not in sys.modules
assert {*resbackbone.__all__, "__version__"} <= set(dir(resbackbone))
print(*resbackbone.MODELS.module_dict)
from resbackbone import *
assert ResNet is resbackbone.backbones.ResNet is resbackbone.ResNet
assert not hasattr(resbackbone, "ResNet51")
"""
    assert {"ResNet", "TridentResNet", "SELayer"} <= set(run_python(code))


@pytest.mark.parametrize("name", ["resbackbone.backbones.ResNet", "resbackbone.ResNet"])
def test_mmengine_finds_a_type_before_anything_is_imported(name):
    code = f"from mmengine.registry import MODELS; print(type(MODELS.build(dict(type={name!r}, depth=18))).__module__)"
    assert run_python(code) == ["resbackbone.backbones.resnet"]


def test_a_pickled_backbone_is_read_before_anything_is_imported(tmp_path):
    path = tmp_path / "net.pickle"
    path.write_bytes(pickle.dumps(resbackbone.ResNet(18, base_channels=8)))
    code = (
        f"import pickle; net = pickle.load(open({str(path)!r}, 'rb')); net.init_weights(); print(net.out_channels[-1])"
    )
    assert run_python(code) == ["64"]


def test_building_a_plain_backbone_loads_no_mmcv():
    code = "import sys, resbackbone; resbackbone.build_backbone('resnet18', base_channels=8); print(*sys.modules)"
    loaded = set(run_python(code))
    assert "mmengine.model" in loaded  # initializes the weights
    assert {"mmcv", "torchvision"} & loaded == set()


def test_without_mmengine_the_error_names_both_extras():
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mmengine":
            raise ModuleNotFoundError("No module named 'mmengine'", name="mmengine")
sys.meta_path.insert(0, Blocker())
import resbackbone
try:
    resbackbone.build_backbone
except ImportError as error:
    print(error)
    print(type(error.__cause__).__name__)
"""
    said = " ".join(run_python(code))
    assert "resbackbone needs mmengine" in said
    assert "pip install 'resbackbone[mm]'" in said
    assert "pip install 'resbackbone[openmmlab]'" in said
    assert "ModuleNotFoundError" in said


def test_public_names_are_all_there_and_described():
    assert sorted(resbackbone.__all__, key=str.lower) == sorted(set(resbackbone.__all__), key=str.lower)
    for name in resbackbone.__all__:
        assert getattr(resbackbone, name).__doc__, name
    assert resbackbone.__version__.count(".") == 2
