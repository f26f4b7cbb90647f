"""Configs are data: whatever type one names, nothing is imported or called that is no registered class of its kind."""

import sys
from pathlib import Path

import pytest
import yaml
from command_line import fails, make_picture, run, written
from hostile_configs import ENTRY_POINTS, EVIL, SPELLINGS, TINY, evil_module
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope
from torch import nn

from resbackbone import MODELS, ResNet, build_backbone
from resbackbone.registry.lookup import import_plugins


@pytest.fixture
def mark(tmp_path):
    with evil_module(tmp_path) as mark:
        yield mark
        assert not mark.exists()
        assert EVIL not in sys.modules


every_entry_point = pytest.mark.parametrize("entry_point", ENTRY_POINTS)


@every_entry_point
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_name_that_is_not_registered_is_neither_imported_nor_called(mark, entry_point, spelling):
    with pytest.raises((KeyError, TypeError)) as caught:
        ENTRY_POINTS[entry_point](spelling)
    assert "Failed to get" not in str(caught.value)


@pytest.mark.parametrize("entry_point", [name for name in ENTRY_POINTS if "padding" not in name])  # not a `type`
@pytest.mark.parametrize("wrong", [Path, len, dict, Path.touch, ConfigDict, 5, b"ReLU", ["ReLU"]])
def test_what_python_passes_must_be_a_class_of_layers(entry_point, wrong):
    with pytest.raises((KeyError, TypeError)):
        ENTRY_POINTS[entry_point](wrong)


@pytest.mark.parametrize(
    ("entry_point", "wrong"),
    [
        ("backbone", "BN"),
        ("backbone", "FPN"),
        ("backbone", "torch.nn.Identity"),
        ("backbone", "torch.nn.Sequential"),
        ("backbone", "mmengine.model.BaseDataPreprocessor"),
        ("backbone", "mmcv.cnn.ContextBlock"),
        ("backbone", "ResLayer"),
        ("backbone", "SELayer"),
        ("classifier's backbone", "FPN"),
        ("norm_cfg", "ReLU"),
        ("norm_cfg", "torch.nn.Conv2d"),
        ("norm_cfg", "torch.nn.MaxPool2d"),
        ("norm_cfg", nn.ReLU),
        ("norm_cfg", "SELayer"),
        ("norm_cfg", ResNet),
        ("conv_cfg", "BN"),
        ("conv_cfg", nn.Linear),
        ("dcn", "FrozenBN"),
        ("plugin", "ResNet"),
        ("plugin", "FPN"),
        ("FPN's act_cfg", "GN"),
        ("FPN's act_cfg", "torch.nn.modules.activation.MultiheadAttention"),
        ("classifier's loss", "ReLU"),
        ("classifier's loss", "ResNet"),
    ],
)
def test_a_registered_class_of_another_kind_is_refused(entry_point, wrong):
    with pytest.raises(TypeError, match=r"`type` of an? .* must name an? "):
        ENTRY_POINTS[entry_point](wrong)


@pytest.mark.parametrize(
    ("argument", "path"),
    [
        ("type", "resbackbone.ResNet"),
        ("type", "resbackbone.backbones.resnet.ResNet"),
        ("type", "resbackbone.backbones.ResNet"),
        ("type", ResNet),
        ("norm_cfg", "torch.nn.BatchNorm2d"),
        ("norm_cfg", "torch.nn.modules.batchnorm.BatchNorm2d"),
        ("norm_cfg", "mmengine.SyncBN"),
        ("norm_cfg", nn.BatchNorm2d),
        ("conv_cfg", "mmcv.cnn.bricks.conv2d_adaptive_padding.Conv2dAdaptivePadding"),
        ("conv_cfg", "mmcv.cnn.ConvWS2d"),
        ("conv_cfg", nn.Conv2d),
    ],
)
def test_dotted_paths_of_layers_and_classes_build(argument, path):
    config = {**TINY, "type": path} if argument == "type" else {**TINY, argument: {"type": path}}
    for build in (build_backbone, MODELS.build):
        assert isinstance(build(config), ResNet)


def test_the_path_of_a_registered_class_builds_and_that_of_its_neighbor_does_not(registry):
    class Mine(nn.BatchNorm2d):
        pass

    class Other(nn.BatchNorm2d):
        pass

    for cls in (Mine, Other):
        cls.__qualname__ = cls.__name__
        setattr(sys.modules[__name__], cls.__name__, cls)
    registry.register_module(module=Mine)
    build = ENTRY_POINTS["norm_cfg"]
    assert type(build(f"{__name__}.Mine").bn1) is Mine
    with pytest.raises(KeyError, match=r"unknown norm type '.*Other'"):
        build(f"{__name__}.Other")


def test_a_default_scope_is_looked_in_and_never_imported(mark):
    with DefaultScope.overwrite_default_scope(EVIL), pytest.raises(KeyError, match="unknown norm type 'Nowhere'"):
        ENTRY_POINTS["norm_cfg"]("Nowhere")


def test_mmengines_own_lookups_are_what_they_were_outside(tmp_path):
    ENTRY_POINTS["norm in mmcv's plugin"]("BN")
    with evil_module(tmp_path) as mark:
        assert isinstance(ROOT_MODELS.build({"type": f"{EVIL}.Layer"}), nn.Module)  # the host's own business
        assert mark.exists()


def test_what_is_imported_is_said_by_whoever_builds(tmp_path, monkeypatch):
    (tmp_path / "a_variant.py").write_text(
        "from resbackbone import MODELS, ResNet\n"
        "@MODELS.register_module()\nclass Variant(ResNet):\n    pass\n"
        "class Unregistered(ResNet):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyError, match=r"unknown backbone type 'a_variant.Variant'.* `imports`"):
        build_backbone({**TINY, "type": "a_variant.Variant"})
    try:
        for type_ in ("Variant", "a_variant.Variant", "a_variant.Unregistered", "resbackbone.Variant"):
            net = build_backbone({**TINY, "type": type_}, imports=["a_variant"])
            assert type(net).__name__ in type_
        with pytest.raises(KeyError):
            build_backbone({**TINY, "type": "a_variant.MODELS.build"})
    finally:
        MODELS.module_dict.pop("Variant", None)
        sys.modules.pop("a_variant", None)


@pytest.mark.parametrize(
    ("imports", "error", "words"),
    [
        (["no_such_variant"], ImportError, "names the module 'no_such_variant', which cannot be imported"),
        ("a_variant", TypeError, "`imports` must be a list or tuple"),
        ([5], TypeError, "`imports` must be a list of module names"),
    ],
)
def test_imports_are_modules_that_are_there(imports, error, words):
    with pytest.raises(error, match=words):
        build_backbone(TINY, imports=imports)


YAML_ENTRY_POINTS = {
    "type": lambda type_: {"type": type_},
    "backbone": lambda type_: {"backbone": {**TINY, "type": type_}},
    "model": lambda type_: {"model": {"backbone": {**TINY, "type": type_}}},
    "scope": lambda type_: {**TINY, "_scope_": type_},
    "conv_cfg": lambda type_: {**TINY, "conv_cfg": {"type": type_}},
    "norm_cfg": lambda type_: {**TINY, "norm_cfg": {"type": type_, "command": "touch mark"}},
    "dcn": lambda type_: {**TINY, "stage_with_dcn": [True] * 4, "dcn": {"type": type_}},
    "plugin": lambda type_: {**TINY, "plugins": [{"cfg": {"type": type_}, "position": "after_conv2"}]},
    "plugin's norm": lambda type_: {
        **TINY,
        "plugins": [{"cfg": {"type": "NonLocal2d", "norm_cfg": {"type": type_}}, "position": "after_conv2"}],
    },
}
COMMANDS = {
    "info": ("info", "net.yaml"),
    "extract": ("extract", "net.yaml", "a.png", "--out", "out"),
    "export": ("export", "net.yaml", "--to", "torch-export", "--out", "net.pt2"),
    "bench": ("bench", "net.yaml", "--size", "32", "--runs", "1"),
    "load-report": ("load-report", "net.yaml", "resnet18"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_picture("a.png")
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("entry_point", YAML_ENTRY_POINTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_what_a_yaml_names(mark, entry_point, command):
    for spelling in ("os.system", f"{EVIL}.Layer", EVIL):
        Path("net.yaml").write_text(yaml.safe_dump(YAML_ENTRY_POINTS[entry_point](spelling)))
        Path("over.yaml").write_text("_base_: net.yaml\n")
        for config in ("net.yaml", "over.yaml"):
            arguments = [config if argument == "net.yaml" else argument for argument in COMMANDS[command]]
            said = run(*arguments, status=2).stderr
            assert f"'{spelling}'" in said
            assert "unknown" in said
    assert not Path("out").exists() or written("out") == []


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", COMMANDS)
def test_custom_imports_in_a_yaml_are_refused_with_the_right_way(mark, command):
    config = {**TINY, "custom_imports": {"imports": [EVIL], "allow_failed_imports": False}}
    Path("net.yaml").write_text(yaml.safe_dump(config))
    Path("base.yaml").write_text(yaml.safe_dump({"custom_imports": EVIL}))
    said = run(*COMMANDS[command], status=2).stderr
    assert "`custom_imports`, but a YAML file is data and imports nothing" in said
    assert "--import my_variant" in said
    Path("net.yaml").write_text(yaml.safe_dump({**TINY, "_base_": "base.yaml"}))
    assert "--import my_variant" in run(*COMMANDS[command], status=2).stderr


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", [("train", "net.yaml"), ("test", "net.yaml", "weights.pth")], ids=lambda c: c[0])
@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_a_training_config_that_is_data_is_refused(mark, command, suffix):
    content = {"custom_imports": {"imports": [EVIL]}, "model": {"type": f"{EVIL}.call"}, "work_dir": "out"}
    Path("net").with_suffix(suffix).write_text(yaml.safe_dump(content))
    said = fails(*(argument.replace(".yaml", suffix) for argument in command))
    assert "a training config must be a .py file in OpenMMLab's format" in said


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", COMMANDS)
def test_import_names_a_module_of_the_current_folder(monkeypatch, command):
    Path("my_variant.py").write_text(
        "from resbackbone import MODELS, ResNet\n@MODELS.register_module()\nclass Mine(ResNet):\n    pass\n"
    )
    Path("net.yaml").write_text("{type: Mine, depth: 18, base_channels: 4}\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert "unknown backbone type 'Mine'" in run(*COMMANDS[command], status=2).stderr
    assert "--import" in run(*COMMANDS[command], status=2).stderr
    said = run(*COMMANDS[command], "--import", "no_such", status=2).stderr
    assert "names the module 'no_such', which cannot be imported" in said
    try:
        # No weights of resnet18 fit four channels: there the type is known, and the report says so.
        run(*COMMANDS[command], "--import", "my_variant", status=2 if command == "load-report" else 0)
        assert "Mine" in MODELS.module_dict
    finally:
        MODELS.module_dict.pop("Mine", None)
        sys.modules.pop("my_variant", None)


def test_an_installed_plugin_registers_types(tmp_path, monkeypatch):
    (tmp_path / "a_plugin.py").write_text(
        "from resbackbone import MODELS, ResNet\n@MODELS.register_module()\nclass Plugged(ResNet):\n    pass\n"
    )
    facts = tmp_path / "a_plugin-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[resbackbone.plugins]\nmine = a_plugin\nbroken = no_such_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_plugins.cache_clear()
    try:
        with pytest.warns(UserWarning, match="the plugin 'no_such_plugin' was not imported"):
            assert type(build_backbone({**TINY, "type": "Plugged"})).__name__ == "Plugged"
    finally:
        MODELS.module_dict.pop("Plugged", None)
        sys.modules.pop("a_plugin", None)
        import_plugins.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
        "type: ResNet\ndepth: 18\nplugins: &loop [*loop]\n",
        "type: &loop {type: *loop}\n",
        "plugins: " + "[" * 20_000 + "]" * 20_000,
        "type: ResNet\ndepth: 18\nout_indices: [" + "0, " * 200_000 + "0]\n",
    ],
    ids=["billion laughs", "list in itself", "dict in itself", "deep", "long"],
)
def test_a_small_yaml_stands_for_no_endless_config(tmp_path, text):
    path = tmp_path / "net.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="not valid YAML of plain values"):
        build_backbone(path)


def test_a_dict_that_is_built_names_no_program(folder):
    Path("net.py").write_text(
        "import pathlib\npathlib.Path('mark').touch()\nbackbone = dict(type='ResNet', depth=18)\n"
    )
    config = {"type": "ImageClassifier", "backbone": "net.py", "num_classes": 2}
    for build in (MODELS.build, lambda config: MODELS.build([config])):
        with pytest.raises(ValueError, match="a config inside another one is data, and cannot name a program"):
            build(config)
    assert not Path("mark").exists()
    assert type(build_backbone("net.py")) is ResNet  # without a warning, and which is what a .py file is for
