"""The wheel holds everything that a user needs: code, types, every config, the command."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from resbackbone import list_backbones
from resbackbone.checkpoints.hub.catalog import list_weights
from resbackbone.config import config_files, recorded_costs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_every_config_is_in_the_wheel(installed):
    shipped = {
        path.relative_to(installed / "resbackbone") for path in installed.rglob("configs/**/*") if path.is_file()
    }
    in_repo = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".py")}
    assert shipped == in_repo
    assert (
        set(config_files())
        == set(recorded_costs())
        == {path.stem for path in in_repo if path.match("configs/*/*.yaml")}
    )
    assert len(list_backbones()) == len(config_files())


def test_names_are_found_without_a_checkout(installed, tmp_path):
    code = "import resbackbone; print(resbackbone.__file__, *resbackbone.list_backbones('resnet5*'), sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    where, *names = run.stdout.split()
    assert Path(where).is_relative_to(installed)
    assert names == list_backbones("resnet5*")


def test_the_catalog_of_weights_is_found_without_a_checkout(installed, tmp_path):
    code = "from resbackbone.checkpoints.hub.catalog import list_weights; print(list_weights.__code__.co_filename)\n"
    code += "print(len(list_weights()))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    where, count = run.stdout.split()
    assert Path(where).is_relative_to(installed)
    assert int(count) == len(list_weights())


def test_types_license_and_command_are_declared(installed):
    assert (installed / "resbackbone/py.typed").exists()
    (info,) = installed.glob("*.dist-info")
    assert "resbackbone = resbackbone.cli:main" in (info / "entry_points.txt").read_text()
    assert "Apache License" in (info / "licenses/LICENSE").read_text()
