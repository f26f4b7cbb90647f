"""Imports point downwards, cost little, and say what to install where something is missing."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import resbackbone
from resbackbone.cli import app

PACKAGE = Path(resbackbone.__file__).parent
# From the bottom up; a module may import from its own part and from the rows below its own, never from its own row.
ROWS = [
    {"utils"},
    {"registry"},
    {"data"},
    {"layers"},
    {"blocks"},
    {"backbones"},
    {"necks"},
    {"checkpoints", "inference"},
    {"config"},
    {"analysis"},
    {"training"},
    {"integrations", "cli", "testing"},
    {"__main__"},
]
# The deliberate exceptions, imported inside functions: an `init_cfg` in a config may name a checkpoint.
UPWARDS = {("registry/registries.py", "layers"), ("layers/initialization.py", "checkpoints")}
HEIGHT = {part: row for row, parts in enumerate(ROWS) for part in parts}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path):
    """The parts of our package that a module imports, at its top or inside a function, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "resbackbone":
                yield rest.split(".")[0], node.lineno


def run_python(code):
    """Run code in a fresh interpreter; return the words that it prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    part = part_of(path)
    assert part in HEIGHT, f"say in ROWS where {part!r} stands"
    for imported, line in imported_parts(path):
        if imported == part or (path.relative_to(PACKAGE).as_posix(), imported) in UPWARDS:
            continue
        # The package's own names (`from resbackbone import ResNet`) are there once everything below is.
        height = HEIGHT.get(imported, HEIGHT["config"])
        assert height < HEIGHT[part], f"{path}:{line}: {part} (row {HEIGHT[part]}) imports {imported} (row {height})"


def test_integrations_are_imported_by_nobody():
    importers = [
        path for path in MODULES if "integrations" in dict(imported_parts(path)) and part_of(path) != "integrations"
    ]
    assert importers == []
    assert "integrations" not in dict(imported_parts(PACKAGE / "__init__.py"))


def test_the_layering_test_sees_imports(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        "import resbackbone.cli\nimport torch\nfrom resbackbone import ResNet\n"
        "def f():\n    from resbackbone.backbones.resnet import ResNet\n    from resbackbone import blocks\n"
    )
    assert list(imported_parts(module)) == [("cli", 1), ("ResNet", 3), ("backbones", 5), ("blocks", 6)]


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
    assert "mmengine.model" in loaded  # initialises the weights
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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_owns(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
