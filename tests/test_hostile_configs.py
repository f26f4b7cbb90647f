"""Configs are data: whatever type one names, nothing is imported or called that is no registered class of its kind."""

import sys
from pathlib import Path

import pytest
from hostile_configs import DOORS, EVIL, SPELLINGS, TINY, evil_module
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope
from torch import nn

from resbackbone import MODELS, ResNet, build_backbone


@pytest.fixture
def mark(tmp_path):
    with evil_module(tmp_path) as mark:
        yield mark
        assert not mark.exists()
        assert EVIL not in sys.modules


every_door = pytest.mark.parametrize("door", DOORS)


@every_door
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_s1_a_name_that_is_not_registered_is_neither_imported_nor_called(mark, door, spelling):
    with pytest.raises((KeyError, TypeError)) as caught:
        DOORS[door](spelling)
    assert "Failed to get" not in str(caught.value)


@pytest.mark.parametrize("door", [door for door in DOORS if "padding" not in door])  # which is no `type`
@pytest.mark.parametrize("wrong", [Path, len, dict, Path.touch, ConfigDict, 5, b"ReLU", ["ReLU"]])
def test_s1_what_python_passes_must_be_a_class_of_layers(door, wrong):
    with pytest.raises((KeyError, TypeError)):
        DOORS[door](wrong)


@pytest.mark.parametrize(
    ("door", "wrong"),
    [
        ("backbone", "BN"),
        ("backbone", "FPN"),
        ("backbone", "torch.nn.Identity"),
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
def test_s1_a_registered_class_of_another_kind_is_refused(door, wrong):
    with pytest.raises(TypeError, match=r"`type` of an? .* must name an? "):
        DOORS[door](wrong)


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
def test_s1_dotted_paths_of_layers_and_classes_build(argument, path):
    config = {**TINY, "type": path} if argument == "type" else {**TINY, argument: {"type": path}}
    for build in (build_backbone, MODELS.build):
        assert isinstance(build(config), ResNet)


def test_s1_the_path_of_a_registered_class_builds_and_that_of_its_neighbour_does_not(registry):
    class Mine(nn.BatchNorm2d):
        pass

    class Other(nn.BatchNorm2d):
        pass

    for cls in (Mine, Other):
        cls.__qualname__ = cls.__name__
        setattr(sys.modules[__name__], cls.__name__, cls)
    registry.register_module(module=Mine)
    build = DOORS["norm_cfg"]
    assert type(build(f"{__name__}.Mine").bn1) is Mine
    with pytest.raises(KeyError, match=r"unknown norm type '.*Other'"):
        build(f"{__name__}.Other")


def test_s1_a_default_scope_is_looked_in_and_never_imported(mark):
    with DefaultScope.overwrite_default_scope(EVIL), pytest.raises(KeyError, match="unknown norm type 'Nowhere'"):
        DOORS["norm_cfg"]("Nowhere")


def test_s1_mmengines_own_lookups_are_what_they_were_outside(tmp_path):
    DOORS["norm in mmcv's plugin"]("BN")
    with evil_module(tmp_path) as mark:
        assert isinstance(ROOT_MODELS.build({"type": f"{EVIL}.Layer"}), nn.Module)  # the host's own business
        assert mark.exists()


def test_s1_what_is_imported_is_said_by_whoever_builds(tmp_path, monkeypatch):
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
def test_s1_imports_are_modules_that_are_there(imports, error, words):
    with pytest.raises(error, match=words):
        build_backbone(TINY, imports=imports)
