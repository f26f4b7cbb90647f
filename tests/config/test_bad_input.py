"""Wrong configs, files and images are refused in words: what, got, allowed. A wrong config before anything is built."""

import re
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
import yaml
from cases import CLASSES, every_class, small
from torch import nn

from resbackbone import ResNet, build_backbone
from resbackbone.blocks import Bottle2neck, Bottleneck, SplitAttentionBottleneck
from resbackbone.checkpoints import load_checkpoint
from resbackbone.layers import DropPath, ECALayer
from resbackbone.layers.arguments import parameters_of
from resbackbone.layers.dry_run import is_about_meta
from resbackbone.necks import FPN
from resbackbone.training.classification import BinaryCrossEntropy, CrossEntropy
from resbackbone.training.classification.mixup import MixupCutmix

DCN = {"type": "DCN", "deform_groups": 1}
STUB = {"type": "Stub"}
THREE = {"num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (0,)}


def plugin(cfg=STUB, position="after_conv1", **entries):
    return [{"cfg": cfg, "position": position, **entries}]


DEPTHS = "`depth` of ResNet must be one of 18, 26, 34, 50, 101, 152, 200, 269"

# A name for the case, what is wrong in a config that is otherwise dict(type="ResNet", depth=50), the error, its text.
CONFIGS = [
    # What is built
    ("depth_20", {"depth": 20}, KeyError, DEPTHS + "; got 20"),
    ("depth_text", {"depth": "50"}, KeyError, DEPTHS + "; got '50'"),
    ("depth_none", {"depth": None}, KeyError, DEPTHS + "; got None"),
    ("depth_float", {"depth": 50.0}, KeyError, DEPTHS + "; got 50.0"),
    ("depth_list", {"depth": [50]}, (KeyError, TypeError), "`depth`"),
    (
        "resnext_18",
        {"type": "ResNeXt", "depth": 18},
        KeyError,
        "`depth` of ResNeXt must be one of 26, 50, 101, 152; got 18",
    ),
    ("wide_34", {"type": "WideResNet", "depth": 34}, KeyError, "`depth` of WideResNet must be one of 50, 101, 152"),
    ("type_unknown", {"type": "WideResNt"}, KeyError, "unknown backbone type 'WideResNt'; did you mean 'WideResNet'?"),
    ("type_number", {"type": 50}, TypeError, "`type` of a backbone must be a registered name or a class, got 50"),
    ("argument_unknown", {"frozen": 1}, TypeError, "ResNet has no argument 'frozen'; did you mean 'frozen_stages'?"),
    ("in_channels_0", {"in_channels": 0}, ValueError, "`in_channels` must be at least 1, got 0"),
    ("in_channels_text", {"in_channels": "3"}, TypeError, "`in_channels` must be an integer, got '3' of type str"),
    ("base_channels_0", {"base_channels": 0}, ValueError, "`base_channels` must be at least 1, got 0"),
    ("base_channels_float", {"base_channels": 64.0}, TypeError, "`base_channels` must be an integer, got 64.0"),
    ("stem_channels_negative", {"stem_channels": -1}, ValueError, "`stem_channels` must be at least 1, got -1"),
    ("deep_stem_1", {"type": "ResNetV1c", "stem_channels": 1}, ValueError, "`stem_channels` must be at least 2"),
    ("groups_0", {"type": "ResNeXt", "groups": 0}, ValueError, "`groups` must be at least 1, got 0"),
    ("groups_float", {"type": "ResNeXt", "groups": 32.0}, TypeError, "`groups` must be an integer, got 32.0"),
    ("base_width_0", {"type": "ResNeXt", "base_width": 0}, ValueError, "`base_width` must be at least 1, got 0"),
    ("widening_0", {"type": "WideResNet", "widening_factor": 0}, ValueError, "`widening_factor` must be at least 1"),
    # Stages
    ("num_stages_0", {"num_stages": 0}, ValueError, "`num_stages` must be from 1 to 4, got 0"),
    ("num_stages_5", {"num_stages": 5}, ValueError, "`num_stages` must be from 1 to 4, got 5"),
    ("num_stages_float", {"num_stages": 2.5}, TypeError, "`num_stages` must be an integer, got 2.5 of type float"),
    ("num_stages_bool", {"num_stages": True}, TypeError, "`num_stages` must be an integer, got True of type bool"),
    ("strides_short", {"strides": (1, 2, 2)}, ValueError, "`strides` must have 4 entries (one per stage"),
    ("strides_long", THREE | {"strides": (1, 2, 2, 2)}, ValueError, "`num_stages`=3), got 4: (1, 2, 2, 2)"),
    ("strides_text", {"strides": (1, "2", 2, 2)}, TypeError, "`strides[1]` must be an integer, got '2' of type str"),
    ("strides_number", {"strides": 2}, TypeError, "`strides` must be a list or tuple, got 2 of type int"),
    ("stride_0", {"strides": (1, 2, 0, 2)}, ValueError, "`strides[2]` must be at least 1, got 0"),
    ("dilations_short", {"dilations": (1, 1)}, ValueError, "`dilations` must have 4 entries"),
    ("dilation_float", {"dilations": (1, 1, 1, 0.5)}, TypeError, "`dilations[3]` must be an integer, got 0.5"),
    ("dilation_0", {"dilations": (0, 1, 1, 1)}, ValueError, "`dilations[0]` must be at least 1, got 0"),
    (
        "out_indices_high",
        {"out_indices": (0, 4)},
        ValueError,
        "`out_indices` must be below `num_stages` (=4), got (0, 4)",
    ),
    ("out_indices_stages", THREE | {"out_indices": (0, 3)}, ValueError, "below `num_stages` (=3), got (0, 3)"),
    ("out_indices_twice", {"out_indices": (1, 1)}, ValueError, "`out_indices` must name each stage once, got (1, 1)"),
    (
        "out_indices_same",
        {"out_indices": (3, -1)},
        ValueError,
        "must name each stage once, got (3, -1), which is (3, 3)",
    ),
    ("out_indices_empty", {"out_indices": ()}, ValueError, "`out_indices` must name at least one stage, got ()"),
    ("out_indices_low", {"out_indices": (-5,)}, ValueError, "`out_indices[0]` must be at least -4, got -5"),
    ("out_indices_number", {"out_indices": 3}, TypeError, "`out_indices` must be a list or tuple, got 3 of type int"),
    ("out_indices_text", {"out_indices": ("layer4",)}, TypeError, "`out_indices[0]` must be an integer, got 'layer4'"),
    ("style", {"style": "tf"}, ValueError, "`style` must be one of 'pytorch', 'caffe'; got 'tf'"),
    ("frozen_stages_5", {"frozen_stages": 5}, ValueError, "`frozen_stages` must be from -1 to 4, got 5"),
    ("frozen_stages_-2", {"frozen_stages": -2}, ValueError, "`frozen_stages` must be from -1 to 4, got -2"),
    ("frozen_stages_num", THREE | {"frozen_stages": 4}, ValueError, "`frozen_stages` must be from -1 to 3, got 4"),
    ("frozen_stages_none", {"frozen_stages": None}, TypeError, "`frozen_stages` must be an integer, got None"),
    ("stage_blocks_number", {"stage_blocks": 3}, TypeError, "`stage_blocks` must be a list or tuple, got 3"),
    ("stage_blocks_short", {"stage_blocks": (3, 4)}, ValueError, "`stage_blocks` must have 4 entries (one per stage"),
    ("stage_blocks_zero", {"stage_blocks": (3, 0, 6, 3)}, ValueError, "`stage_blocks[1]` must be at least 1, got 0"),
    ("stage_blocks_text", {"stage_blocks": (3, 4, "6", 3)}, TypeError, "`stage_blocks[2]` must be an integer, got '6'"),
    (
        "multi_grid_of_the_depth",
        {"stage_blocks": (1, 1, 1, 2), "multi_grid": (1, 2, 4)},
        ValueError,
        "`multi_grid` must have 2 entries (one per block",
    ),
    ("multi_grid_short", {"multi_grid": (1, 2)}, ValueError, "`multi_grid` must have 3 entries (one per block"),
    ("multi_grid_number", {"multi_grid": 2}, TypeError, "`multi_grid` must be a list or tuple, got 2"),
    # Flags and numbers
    ("with_cp_1", {"with_cp": 1}, TypeError, "`with_cp` must be True, False or 'norms', got 1 of type int"),
    ("norm_eval_text", {"norm_eval": "no"}, TypeError, "`norm_eval` must be True or False, got 'no' of type str"),
    ("deep_stem_none", {"deep_stem": None}, TypeError, "`deep_stem` must be True or False, got None"),
    ("zero_init_0", {"zero_init_residual": 0}, TypeError, "`zero_init_residual` must be True or False, got 0"),
    ("drop_path_1", {"drop_path_rate": 1.0}, ValueError, "`drop_path_rate` must be at least 0 and below 1, got 1.0"),
    (
        "drop_path_low",
        {"drop_path_rate": -0.1},
        ValueError,
        "`drop_path_rate` must be at least 0 and below 1, got -0.1",
    ),
    ("drop_path_nan", {"drop_path_rate": float("nan")}, ValueError, "must be at least 0 and below 1, got nan"),
    ("drop_path_text", {"drop_path_rate": "a"}, TypeError, "`drop_path_rate` must be a number from 0 to 1"),
    # Layers
    ("norm_none", {"norm_cfg": None}, TypeError, "`norm_cfg` must be a dict, got None"),
    ("norm_text", {"norm_cfg": "BN"}, TypeError, "`norm_cfg` must be a dict, got 'BN' of type str"),
    ("norm_typeless", {"norm_cfg": {"eps": 1e-5}}, KeyError, "`norm_cfg` needs a `type`, got {'eps': 1e-05}"),
    (
        "norm_unknown",
        {"norm_cfg": {"type": "FrozenBM"}},
        KeyError,
        "unknown norm type 'FrozenBM'; did you mean 'FrozenBN'?",
    ),
    ("gn_groupless", {"norm_cfg": {"type": "GN"}}, ValueError, "`norm_cfg` of type 'GN' needs `num_groups`"),
    ("gn_odd", {"norm_cfg": {"type": "GN", "num_groups": 48}}, ValueError, "divi"),
    ("norm_argument", {"norm_cfg": {"type": "BN", "epsilon": 1}}, TypeError, "epsilon"),
    ("conv_unknown", {"conv_cfg": {"type": "Conv2dd"}}, KeyError, "unknown convolution type 'Conv2dd'; did you mean"),
    ("conv_text", {"conv_cfg": "Conv2d"}, TypeError, "`conv_cfg` must be a dict, got 'Conv2d'"),
    (
        "dcn_conv",
        {"dcn": DCN, "conv_cfg": {"type": "Conv2d"}},
        ValueError,
        "`conv_cfg` must be None where there is `dcn`",
    ),
    ("dcn_true", {"dcn": True}, TypeError, "`dcn` must be a dict, got True"),
    ("dcn_typeless", {"dcn": {"deform_groups": 1}}, KeyError, "`dcn` needs a `type`"),
    ("dcn_unknown", {"dcn": {"type": "DCNv9"}}, KeyError, "unknown convolution type 'DCNv9'; did you mean 'DCNv2'?"),
    (
        "dcn_stages_short",
        {"dcn": DCN, "stage_with_dcn": (True, True)},
        ValueError,
        "`stage_with_dcn` must have 4 entries",
    ),
    (
        "dcn_stages_number",
        {"dcn": DCN, "stage_with_dcn": (0, 1, 1, 1)},
        TypeError,
        "`stage_with_dcn[0]` must be True or",
    ),
    ("dcn_stages_type", {"stage_with_dcn": 3}, TypeError, "`stage_with_dcn` must be a list or tuple, got 3"),
    # Plugins
    ("plugins_dict", {"plugins": plugin()[0]}, TypeError, "`plugins` must be a list or tuple, got {'cfg'"),
    ("plugin_text", {"plugins": ["Stub"]}, TypeError, "`plugins[0]` must be a dict with `cfg`, `position`"),
    ("plugin_position", {"plugins": plugin(position="after_conv4")}, ValueError, "'after_conv3'; got 'after_conv4'"),
    (
        "plugin_basic",
        {"depth": 18, "plugins": plugin(position="after_conv3")},
        ValueError,
        "in a BasicBlock` must be one",
    ),
    ("plugin_cfgless", {"plugins": [{"position": "after_conv1"}]}, KeyError, "`plugins[0]` needs `cfg` and `position`"),
    ("plugin_nowhere", {"plugins": [{"cfg": STUB}]}, KeyError, "`plugins[0]` needs `cfg` and `position`"),
    ("plugin_extra", {"plugins": plugin(stage=1)}, KeyError, "may have `stages`; got 'cfg', 'position', 'stage'"),
    ("plugin_typeless", {"plugins": plugin({"ratio": 1})}, KeyError, "`plugins[0]['cfg']` needs a `type`"),
    (
        "plugin_unknown",
        {"plugins": plugin({"type": "Stab"})},
        KeyError,
        "unknown plugin type 'Stab'; did you mean 'Stub'?",
    ),
    ("plugin_stages", {"plugins": plugin(stages=(True,))}, ValueError, "`plugins[0]['stages']` must have 4 entries"),
    ("plugin_stages_type", {"plugins": plugin(stages=2)}, TypeError, "`plugins[0]['stages']` must be a list or tuple"),
    ("plugin_twice", {"plugins": plugin() * 2}, ValueError, "duplicate plugin 'stub'"),
    # Initialization
    ("pretrained_0", {"pretrained": 0}, TypeError, "`pretrained` must be a path, a URL or None, got 0 of type int"),
    (
        "pretrained_both",
        {"pretrained": "a.pth", "init_cfg": []},
        ValueError,
        "give `init_cfg` or `pretrained`, not both",
    ),
    (
        "init_text",
        {"init_cfg": "Kaiming"},
        TypeError,
        "`init_cfg` must be a dict, a list of dicts or None, got 'Kaiming'",
    ),
]


@pytest.fixture
def _stub(registry):
    @registry.register_module()
    class Stub(nn.Identity):
        def __init__(self, in_channels):
            super().__init__()


@pytest.mark.usefixtures("_stub")
@pytest.mark.parametrize(("wrong", "error", "text"), [pytest.param(*case[1:], id=case[0]) for case in CONFIGS])
def test_a_wrong_config_is_refused_in_words_before_anything_is_built(refused, wrong, error, text):
    with refused(error, text):
        build_backbone({"type": "ResNet", "depth": 50, **wrong})


def test_the_same_config_without_what_is_wrong_builds(built_convs):
    build_backbone({"type": "ResNet", "depth": 50, "base_channels": 4})
    assert len(built_convs) == 53


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        (50, TypeError, "must be a name, a path to a .yaml or .py file or a dict with `type`, got 50 of type int"),
        (None, TypeError, "got None of type NoneType"),
        ([{"type": "ResNet"}], TypeError, "of type list"),
        ({}, KeyError, "`backbone config` needs a `type`, got {}"),
        ({"depth": 50}, KeyError, "`backbone config` needs a `type`, got {'depth': 50}"),
        ("resent50", KeyError, "unknown backbone 'resent50'; did you mean 'resnet"),
        ("", KeyError, "unknown backbone ''"),
        ("nowhere/net.yaml", FileNotFoundError, "no config file at 'nowhere/net.yaml'"),
        ("nowhere/net.py", FileNotFoundError, "no config file at 'nowhere/net.py'"),
    ],
)
def test_what_is_no_config_is_refused(config, error, text):
    with pytest.raises(error) as caught:
        build_backbone(config)
    assert text in str(caught.value.args[0])


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        ("- type: ResNet\n", KeyError, "has no backbone; it needs `type` at the top"),
        ("", KeyError, "has no backbone"),
        ("model: ResNet\n", KeyError, "has no backbone"),
        ("type: [ResNet\n", ValueError, "is not valid YAML"),
        ("type: !!python/name:os.system ''\n", ValueError, "is not valid YAML of plain values"),
        ("type: ResNet\ndepth: 18\ndepth: 34\n", ValueError, "duplicate key 'depth'"),
        ("type: ResNet\ndepth: 18\ndeep: true\n", TypeError, "no argument 'deep'; did you mean"),
        (b"type: \xff\xfe\n", ValueError, "is not valid YAML"),
        ("_base_: other.yaml\ntype: ResNet\n", FileNotFoundError, "other.yaml"),
        ("_base_: net.yaml\ntype: ResNet\n", ValueError, "_base_"),
        ("_base_: list.yaml\ntype: ResNet\n", KeyError, "list.yaml"),
        ("_base_: 5\ntype: ResNet\n", (ValueError, TypeError), "_base_"),
    ],
    ids=[
        "list",
        "empty",
        "text",
        "syntax",
        "tag",
        "twice",
        "argument",
        "bytes",
        "no_base",
        "cycle",
        "list_base",
        "base_5",
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content, error, text):
    path = tmp_path / "net.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(error) as caught:
        build_backbone(path)
    assert text in str(caught.value)


# Images


@pytest.fixture(scope="module")
def net():
    return ResNet(18, base_channels=8).eval()


IMAGES = [
    (
        "channels_4",
        torch.zeros(2, 4, 32, 32),
        ValueError,
        "ResNet takes images of shape (N, 3, H, W), got (2, 4, 32, 32)",
    ),
    ("channels_1", torch.zeros(2, 1, 32, 32), ValueError, "build the backbone with the `in_channels` of your images"),
    ("channels_behind", torch.zeros(2, 32, 32, 3), ValueError, "got (2, 32, 32, 3)"),
    ("no_batch", torch.zeros(3, 32, 32), ValueError, "got (3, 32, 32); add the batch dimension"),
    ("video", torch.zeros(1, 1, 3, 32, 32), ValueError, "got (1, 1, 3, 32, 32)"),
    ("uint8", torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "takes floating-point images, got torch.uint8"),
    ("int64", torch.zeros(2, 3, 32, 32, dtype=torch.int64), TypeError, "convert and normalize them first"),
    ("no_rows", torch.zeros(2, 3, 0, 32), ValueError, "takes images of at least 1x1 pixels, got 0x32"),
    ("no_columns", torch.zeros(2, 3, 32, 0), ValueError, "takes images of at least 1x1 pixels, got 32x0"),
    ("list", [torch.zeros(3, 32, 32)], TypeError, "takes a tensor of images (N, 3, H, W), got list"),
    ("dict", {"images": torch.zeros(1, 3, 32, 32)}, TypeError, "got dict"),
    ("none", None, TypeError, "got NoneType"),
]


@pytest.mark.parametrize(("images", "error", "text"), [pytest.param(*case[1:], id=case[0]) for case in IMAGES])
def test_what_is_no_batch_of_images_is_refused(net, images, error, text):
    with pytest.raises(error, match=re.escape(text)):
        net(images)


def test_no_images_at_all(net):
    with pytest.raises(TypeError, match=r"takes a tensor of images|missing 1 required positional argument"):
        net()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 3)])
def test_the_smallest_images_are_taken(net, size):
    assert all(out.isfinite().all() for out in net(torch.zeros(1, 3, *size)))


def test_an_empty_batch_is_taken(net):
    assert [tuple(out.shape) for out in net(torch.zeros(0, 3, 32, 32))][-1] == (0, 64, 1, 1)


def test_too_few_values_for_a_batch_norm_in_training_is_torchs_own_error():
    net = ResNet(18, base_channels=8, norm_eval=False).train()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        net(torch.zeros(1, 3, 32, 32))


# Layers of other dimensions, and widths that leave nothing: for every class

OTHER_NORMS = [
    *({"type": name} for name in ("BN1d", "BN3d", "IN1d", "IN3d", "LN")),
    *({"type": norm} for norm in (nn.BatchNorm1d, nn.BatchNorm3d, nn.InstanceNorm3d, nn.LayerNorm, nn.LazyBatchNorm2d)),
    *({"type": "BN", "eps": eps} for eps in (float("nan"), float("inf"), -1, "1e-5", None, True, 10**400)),
    *({"type": "BN", "momentum": momentum} for momentum in (-0.1, 1.5, float("nan"), "0.1", [0.1])),
    *({"type": "BN", key: value} for key, value in (("affine", 1), ("track_running_stats", "no"), ("device", "cpu"))),
    *({"type": "GN", "num_groups": groups} for groups in (0, 2.0, "2", 10**30)),
    *({"type": "BN", key: 8} for key in ("num_features", "num_groups", "requires_grad")),
]
OTHER_CONVS = [
    *({"type": name} for name in ("Conv1d", "Conv3d", nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)),
    *({"type": "Conv", key: value} for key, value in (("bias", True), ("stride", 2), ("groups", 2), ("device", "cpu"))),
    *({"type": "Conv", key: value} for key, value in (("padding_mode", "mirror"), ("surprise", 1))),
    *({"type": "ConvWS", "eps": eps} for eps in (float("nan"), "0", -1)),
]


@every_class
@pytest.mark.parametrize("norm_cfg", OTHER_NORMS, ids=str)
def test_a_norm_that_cannot_run_is_refused(refused, case, norm_cfg):
    with refused((TypeError, ValueError, KeyError), "norm_cfg"):
        CLASSES[case](**{**small(case), "norm_cfg": norm_cfg})


@pytest.mark.parametrize("case", [case for case in CLASSES if "IBN" not in case])  # which normalize by instance, too
def test_eps_may_be_zero_where_batch_norms_stay_in_eval_mode(case):
    """As in mmdet's NAS-FCOS."""
    CLASSES[case](**{**small(case), "norm_eval": True, "norm_cfg": {"type": "BN", "eps": 0}})


@every_class
@pytest.mark.parametrize("more", [{}, {"track_running_stats": False}], ids=str)
def test_eps_of_a_batch_norm_that_trains_is_not_zero(refused, case, more):
    """PyTorch refuses to train it; without statistics of its own it trains even in eval mode."""
    with refused(ValueError, "norm_cfg"):
        CLASSES[case](**{**small(case), "norm_eval": bool(more), "norm_cfg": {"type": "BN", "eps": 0, **more}})


def test_eps_of_a_neck_is_not_zero(refused):
    with refused(ValueError, "norm_cfg"):
        FPN([8], 8, 1, norm_cfg={"type": "BN", "eps": 0})


@every_class
@pytest.mark.parametrize("conv_cfg", OTHER_CONVS, ids=str)
def test_a_convolution_that_cannot_run_is_refused(refused, case, conv_cfg):
    with refused((TypeError, ValueError, KeyError), ""):
        CLASSES[case](**{**small(case), "conv_cfg": conv_cfg})


NAN = float("nan")
NESTED = {  # each with a name that the error has
    "eps of a plugin's norm": ({"type": "NonLocal2d", "norm_cfg": {"type": "BN", "eps": NAN}}, "['norm_cfg']['eps']"),
    "momentum": ({"type": "NonLocal2d", "norm_cfg": {"type": "BN", "momentum": 2}}, "['norm_cfg']['momentum']"),
    "eps of zero": ({"type": "NonLocal2d", "norm_cfg": {"type": "BN", "eps": 0}}, "['norm_cfg']['eps']"),
    "ratio": ({"type": "ContextBlock", "ratio": NAN}, "['ratio']"),
    "slope": (
        {"type": "mmcv.cnn.ConvModule", "act_cfg": {"type": "LeakyReLU", "negative_slope": NAN}},
        "['act_cfg']['negative_slope']",
    ),
}


@pytest.mark.parametrize("cfg", NESTED)
def test_a_plugin_that_cannot_run_is_refused(refused, cfg):
    cfg, name = NESTED[cfg]
    with refused(ValueError, name):
        ResNet(18, base_channels=4, plugins=[{"cfg": cfg, "position": "after_conv1"}])


@pytest.mark.parametrize("mode", ["gaussian", "embedded_gaussian", "dot_product"])
def test_a_plugin_that_cannot_be_initialized_is_refused(built_convs, mode):
    cfg = {"type": "NonLocal2d", "sub_sample": True, "mode": mode}
    with pytest.raises(ValueError, match="'sub_sample': True"):
        ResNet(18, base_channels=4, plugins=[{"cfg": cfg, "position": "after_conv1"}])
    assert all(conv.weight.is_meta for conv in built_convs)


def test_a_norm_in_a_convolution_is_checked(refused):
    with refused(ValueError, "`conv_cfg['norm_cfg']['eps']`"):
        ResNet(18, conv_cfg={"type": "mmcv.cnn.ConvModule", "norm_cfg": {"type": "BN", "eps": NAN}})


def test_a_process_group_is_one(refused):
    for wrong in ("x", 1, [0]):
        with refused(TypeError, "`norm_cfg['process_group']`"):
            ResNet(18, norm_cfg={"type": "SyncBN", "process_group": wrong})
    ResNet(18, base_channels=4, norm_cfg={"type": "SyncBN", "process_group": None})


OTHER_ACTIVATIONS = [
    *({"type": f"torch.nn.{name}", "dim": 7} for name in ("Softmax", "LogSoftmax", "Softmin", "GLU")),
    *({"type": f"mmengine.model.{name}"} for name in ("BaseModule", "ImgDataPreprocessor", "ModuleList")),
    *({"type": "PReLU", "num_parameters": number} for number in (3, 6, 10**12)),
    {"type": "LeakyReLU", "negative_slope": NAN},
    {"type": "torch.nn.Threshold", "threshold": 0, "value": float("inf")},
]


@pytest.mark.parametrize("act_cfg", OTHER_ACTIVATIONS, ids=str)
def test_an_activation_that_cannot_run_is_refused(refused, act_cfg):
    with refused(ValueError, "`act_cfg"):
        FPN([4, 8], 4, 2, act_cfg=act_cfg)


@pytest.mark.parametrize("act_cfg", [{"type": "PReLU", "num_parameters": 4}, {"type": "torch.nn.Softmax", "dim": 1}])
def test_an_activation_that_fits_the_channels_runs(act_cfg):
    state = torch.get_rng_state()
    fpn = FPN([4], 4, 1, act_cfg=act_cfg)
    again = torch.get_rng_state()
    torch.set_rng_state(state)
    FPN([4], 4, 1, act_cfg={"type": "ReLU"})
    assert torch.equal(torch.get_rng_state(), again)  # trying an activation draws nothing
    assert fpn((torch.randn(1, 4, 8, 8),))[0].isfinite().all()


@every_class
@pytest.mark.parametrize("stages", [("False", "True"), (1, 0), (None, True), (float("nan"), True)], ids=str)
def test_stages_of_plugins_are_flags(refused, case, stages):
    count = 3 if case == "TridentResNet" else 4
    plugins = [{"cfg": {"type": "SELayer"}, "position": "after_conv1", "stages": (stages * 2)[:count]}]
    with refused(TypeError, "`plugins[0]['stages'][0]` must be True or False"):
        CLASSES[case](**{**small(case), "plugins": plugins})


@every_class
@pytest.mark.parametrize("depth", [Decimal(50), Fraction(50), 50.0, "50", True, None, [50], 10**30], ids=repr)
def test_a_depth_is_an_integer(refused, case, depth):
    name = "arch" if case == "RegNet" else "depth"
    with refused((KeyError, TypeError), f"`{name}`"):
        CLASSES[case](**{name: depth})


INITIALIZERS = [
    {"type": "TruncNormal", "std": "0.02"},
    {"type": "Normal", "std": [[]]},
    {"type": "Normal", "std": float("nan")},
    {"type": "Constant", "val": float("inf")},
    {"type": "Constant"},
    {"type": "Xavier", "distribution": "gamma"},
    {"type": "Kaiming", "layer": 5},
    {"type": "Uniform", "a": 1, "b": 0},
    {"type": "Pretrained"},
    {"type": "Constant", "val": 0, "override": {"name": "nowhere"}},
]


@every_class
@pytest.mark.parametrize("init_cfg", INITIALIZERS, ids=str)
def test_an_initializer_that_fails_is_refused(refused, case, init_cfg):
    with refused((TypeError, ValueError, KeyError), "`init_cfg"):
        CLASSES[case](**small(case), init_cfg=init_cfg)


@every_class
def test_the_narrowest_net_runs_or_is_refused(refused, case):
    if case == "RegNet":
        pytest.skip("its widths come from `arch`")
    for channels in (1, 2, 3):
        try:
            net = CLASSES[case](**{**small(case), "base_channels": channels, "stem_channels": None}).eval()
        except ValueError as error:
            text = str(error)
            assert any(name in text for name in ("`base_channels`", "`stem_channels`"))
        else:
            assert all(out.isfinite().all() for out in net(torch.randn(1, 3, 64, 64)))


@pytest.mark.parametrize("case", [case for case in CLASSES if "base_width" in parameters_of(CLASSES[case])[0]])
def test_a_group_of_one_channel_is_not_rounded_away(case):
    options = {"groups": 2, "base_channels": 49, "base_width": 1, "stem_channels": 16}  # 1 / 49 * 49 is below 1
    if case == "ResNeSt":
        options["radix"] = 1  # or its groups would have half a channel
    if 18 in CLASSES[case].arch_settings:
        options["depth"] = 50  # a depth of bottlenecks, which alone have groups
    net = CLASSES[case](**{**small(case), **options}).eval()
    assert all(out.isfinite().all() for out in net(torch.randn(1, 3, 64, 64)))


@pytest.mark.parametrize("block", [Bottleneck, Bottle2neck, SplitAttentionBottleneck])
def test_groups_without_channels_are_refused(refused, block):
    with refused(ValueError, "`base_width` (=4) leaves no channels per group where `planes` is 8"):
        block(32, 8, groups=2, base_width=4, base_channels=64)


@every_class
@pytest.mark.parametrize("name", ["base_channels", "in_channels", "stem_channels"])
@pytest.mark.parametrize("channels", [60_000, 10**9, 10**30])
def test_what_no_memory_holds_is_refused(refused, case, name, channels):
    if case == "RegNet" and name == "base_channels":
        pytest.skip("it does nothing there")
    if channels == 60_000 and name != "base_channels":
        pytest.skip("that many would fit")
    with refused(ValueError, f"`{name}`"):
        CLASSES[case](**{**small(case), name: channels})


class Scaled(nn.Module):
    """A norm, a convolution and a plugin of somebody's, which cannot be made without memory."""

    def __init__(self, num_features=0, eps=1e-5, **kwargs):
        super().__init__()
        self.scale = float(torch.ones(1).sum())

    def forward(self, x):
        return x * self.scale


class ScaledConv(nn.Conv2d):
    """A convolution of somebody's, with an argument of its own."""

    def __init__(self, *args, factor=2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = float(torch.tensor(factor))

    def forward(self, x):
        return super().forward(x) * self.factor


@every_class
def test_layers_of_somebody_else_are_built_though_they_need_memory(case):
    plugins = [{"cfg": {"type": Scaled}, "position": "after_conv1"}]
    net = CLASSES[case](**small(case), norm_cfg={"type": Scaled}, conv_cfg={"type": ScaledConv, "factor": 3.0})
    assert any(isinstance(module, Scaled) for module in net.modules())
    assert any(isinstance(module, ScaledConv) for module in net.modules())
    net = CLASSES[case](**small(case), plugins=plugins).eval()
    assert all(out.isfinite().all() for out in net(torch.randn(1, 3, 64, 64)))


# Weights and small parts


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_a_wrong_drop_probability_is_refused(rate):
    with pytest.raises(ValueError, match=f"`drop_prob` must be at least 0 and below 1, got {rate}"):
        DropPath(rate)


def test_a_missing_checkpoint_is_refused(net):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at 'nowhere.pth'"):
        load_checkpoint(net, "nowhere.pth")


def test_a_checkpoint_of_another_net_is_refused_and_changes_nothing(net, tmp_path):
    torch.save(ResNet(18, base_channels=16).state_dict(), tmp_path / "wide.pth")
    before = net.conv1.weight.clone()
    with pytest.raises(
        ValueError, match=r"does not fit ResNet, nothing was changed: .*\(16, 3, 7, 7\) for \(8, 3, 7, 7\)"
    ):
        load_checkpoint(net, tmp_path / "wide.pth")
    assert torch.equal(net.conv1.weight, before)


def test_errors_in_a_yaml_file_name_the_argument_as_a_dict_does(tmp_path):
    path = tmp_path / "net.yaml"
    path.write_text(yaml.safe_dump({"type": "ResNet", "depth": 18, "out_indices": [0, 4]}))
    with pytest.raises(ValueError, match=r"`out_indices` must be below `num_stages` \(=4\), got \(0, 4\)"):
        build_backbone(path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: CrossEntropy(label_smoothing="a"),
            "`label_smoothing` must be a number, at least 0 and below 1, got 'a'",
        ),
        (lambda: BinaryCrossEntropy(threshold="a"), "`threshold` must be a number, got 'a'"),
        (lambda: MixupCutmix(mixup_alpha="a"), "`mixup_alpha` must be a number, from 0 to 1000, got 'a'"),
        (lambda: ECALayer(8, offset="a"), "`offset` must be a number, got 'a'"),
    ],
)
def test_a_number_without_bounds_has_none_in_its_error(call, words):
    with pytest.raises(TypeError, match=re.escape(words)):
        call()


@pytest.mark.parametrize(
    ("message", "about_meta"),
    [
        ("Cannot copy out of meta tensor; no data!", True),
        ("Tensor.item() cannot be called on meta tensors", True),
        ("Expected all tensors to be on the same device, but found at least two devices, meta and cpu!", True),
        ("Expected all tensors to be on the same device, but found at least two devices, cpu and meta!", True),
        ("deform_conv_forward_impl: implementation for device meta:0 not found.\n", True),
        ("Could not run 'aten::x' with arguments from the 'Meta' backend", True),
        ("the metadata of this tensor has no 'channels'", False),
        ("metaclass conflict: the metaclass of a derived class must be a subclass of its bases'", False),
        ("unknown key 'img_meta', for a tensor", False),
        ("num_channels must be divisible by num_groups", False),
    ],
)
def test_only_errors_about_the_meta_device_are_let_pass_in_a_dry_run(message, about_meta):
    assert is_about_meta(RuntimeError(message)) == about_meta
