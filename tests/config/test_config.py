"""From names, files and dicts to backbones, through our registry and mmengine's."""

import copy
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry

import resbackbone
from resbackbone import MODELS, ResNet, ResNetV1d, ResNeXt, build_backbone, list_backbones
from resbackbone.checkpoints import convert_state_dict
from resbackbone.checkpoints.hub.catalog import find_weights
from resbackbone.config import load_config
from resbackbone.config.upstream_names import ARGUMENTS
from resbackbone.layers import Module
from resbackbone.necks import FPN

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*/*.yaml"))
TINY = {"type": "ResNet", "depth": 18, "base_channels": 8}


@pytest.fixture
def write(tmp_path):
    """Write a file and return its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


@pytest.fixture
def on_meta(monkeypatch):
    """Build without values, for speed; mmengine's initialization would want to read them."""
    monkeypatch.setattr(Module, "init_weights", lambda self: None)
    with torch.device("meta"):
        yield


# Names


def test_config_names_are_unique():
    names = [path.stem for path in CONFIGS]
    assert len(set(names)) == len(names) >= 27
    assert list_backbones() == sorted(names)


every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@every_config
@pytest.mark.usefixtures("on_meta")
def test_every_config_builds_and_dumped_and_read_again_is_the_same_net(path, write):
    config = load_config(path).backbone
    assert load_config(path.stem).backbone == config
    net, again = build_backbone(path.stem), build_backbone(write("copy.yaml", config))
    assert type(net).__name__ == config["type"]
    assert "stage_blocks" in config or str(config.get("depth", "")) in path.stem
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    assert {key: value.shape for key, value in again.state_dict().items()} == shapes
    assert again.feature_info == net.feature_info


@pytest.mark.slow
@every_config
@pytest.mark.usefixtures("on_meta")
def test_every_config_hands_out_what_it_says(path):
    net = build_backbone(path)
    outs = net(torch.empty(2, 3, 64, 64))
    assert [(out.shape[1], -(-64 // out.shape[2])) for out in outs] == list(
        zip(net.out_channels, net.out_strides, strict=True)
    )


def test_a_rich_config_dumped_and_read_again_is_the_same_net(write):
    config = {
        "type": "ResNetV1d",
        "depth": 50,
        "base_channels": 8,
        "strides": (1, 2, 1, 1),
        "dilations": (1, 1, 2, 4),
        "out_indices": (-1, 1),
        "norm_cfg": {"type": "GN", "num_groups": 2},
        "dcn": {"type": "DCNv2", "deform_groups": 2},
        "stage_with_dcn": (False, False, True, True),
        "multi_grid": (1, 2, 4),
    }
    net, again = build_backbone(config), build_backbone(write("net.yaml", config))  # YAML makes lists of the tuples
    assert list(again.state_dict()) == list(net.state_dict())
    assert again.feature_info == net.feature_info
    assert str(again) == str(net)


def test_build_backbone_works_on_the_meta_device():
    with torch.device("meta"):
        net = build_backbone("resnet18")
    assert all(parameter.is_meta for parameter in net.parameters())


@pytest.mark.usefixtures("on_meta")
def test_names_mean_what_they_say():
    nets = {name: build_backbone(name) for name in ("resnet50_v1d", "resnet50_caffe", "resnext101_64x4d")}
    assert type(nets["resnet50_v1d"]) is ResNetV1d
    assert nets["resnet50_caffe"].style == "caffe"
    assert (nets["resnext101_64x4d"].groups, nets["resnext101_64x4d"].base_width) == (64, 4)


def test_patterns_select_names():
    assert list_backbones("resnext101_32x?d") == ["resnext101_32x4d", "resnext101_32x8d"]
    assert list_backbones("resnet??") == ["resnet18", "resnet26", "resnet34", "resnet50"]
    assert list_backbones("resnext*_64x4d") == ["resnext101_64x4d"]
    assert list_backbones("vgg*") == []


def test_configs_say_where_the_architecture_comes_from():
    assert load_config("resnext50_32x4d").about["source"] == "https://arxiv.org/abs/1611.05431"


# Dicts and overrides


def test_a_dict_builds_an_initialized_net_in_training_mode():
    net = build_backbone(TINY)
    assert type(net) is ResNet
    assert net.training
    assert net.is_init
    assert float(net.layer1[0].bn2.weight.detach().sum()) == 0.0  # zero_init_residual, by init_weights


def test_a_class_stands_for_its_name():
    assert type(build_backbone({**TINY, "type": ResNetV1d})) is ResNetV1d


def test_overrides_replace_arguments():
    net = build_backbone(TINY, depth=50, type="ResNeXt", groups=4, out_indices=[-1])
    assert (type(net), net.depth, net.groups, net.out_indices) == (ResNeXt, 50, 4, (3,))
    assert build_backbone("resnet18", base_channels=8).out_channels == (8, 16, 32, 64)


def test_an_mmengine_config_is_a_config():
    config = ConfigDict(**TINY, norm_cfg={"type": "GN", "num_groups": 4}, plugins=None)
    net = build_backbone(config)
    assert net.norm1_name == "gn1"
    assert type(net.norm_cfg) is dict


@pytest.mark.parametrize("kind", [dict, ConfigDict])
def test_building_leaves_the_config_alone(kind):
    config = kind(
        norm_cfg={"type": "BN", "requires_grad": True},
        dcn={"type": "DCNv2", "deform_groups": 1, "fallback_on_stride": True},
        stage_with_dcn=[False, False, True, True],
        _scope_="resbackbone",
        **TINY,
    )
    before = copy.deepcopy(config)
    for _ in range(2):
        build_backbone(config, frozen_stages=1)
        assert config == before
        assert type(config["dcn"]) is kind if kind is ConfigDict else dict


# Files


@pytest.mark.parametrize("name", ["net.yaml", "net.yml"])
@pytest.mark.parametrize(
    "content", [TINY, {"backbone": TINY, "source": "mine"}, {"model": {"backbone": TINY, "neck": {}}}]
)
def test_yaml_files_hold_a_backbone_at_the_top_or_inside(write, name, content):
    path = write(name, content)
    assert load_config(path).backbone == TINY
    assert build_backbone(str(path)).out_channels == build_backbone(path).out_channels == (8, 16, 32, 64)


@pytest.mark.parametrize("prefix", ["", "backbone = ", "model = dict(backbone="])
def test_python_files_are_openmmlab_configs(write, prefix):
    arguments = "type='ResNet', depth=18, base_channels=8, out_indices=(0, 3)"
    text = (
        f"{prefix}dict({arguments})" + (")" if "model" in prefix else "")
        if prefix
        else arguments.replace(", ", "\n", 2)
    )
    if not prefix:
        text = text.replace(", out_indices", "\nout_indices")
    assert build_backbone(write("net.py", text + "\n")).out_channels == (8, 64)


def test_a_base_is_merged_dict_by_dict_and_the_last_word_wins(write):
    write("base.yaml", {"type": "ResNet", "depth": 50, "norm_cfg": {"type": "GN", "num_groups": 4}, "base_channels": 8})
    write("frozen.yaml", {"frozen_stages": 2, "depth": 34})
    path = write("net.yaml", {"_base_": ["base.yaml", "frozen.yaml"], "depth": 18, "norm_cfg": {"num_groups": 2}})
    assert load_config(path).backbone == {
        "type": "ResNet",
        "depth": 18,
        "base_channels": 8,
        "frozen_stages": 2,
        "norm_cfg": {"type": "GN", "num_groups": 2},
    }
    assert build_backbone(path).gn1.num_groups == 2


def test_delete_leaves_out_what_is_below(write):
    base = {"type": "ResNet", "depth": 18, "base_channels": 8, "norm_cfg": {"type": "SyncBN", "momentum": 0.5}}
    write("base.yaml", {"backbone": base, "source": "mine"})

    def load(**update):
        return load_config(write("net.yaml", {"_base_": "base.yaml", "backbone": update})).backbone

    norm = {"type": "GN", "num_groups": 2}
    assert load(norm_cfg={**norm, "_delete_": True}) == {**base, "norm_cfg": norm}
    assert load(norm_cfg={**norm, "_delete_": False})["norm_cfg"] == {**norm, "momentum": 0.5}
    assert load(**TINY, _delete_=True) == TINY
    assert load(conv_cfg={"type": "ConvWS", "_delete_": True}) == {**base, "conv_cfg": {"type": "ConvWS"}}
    assert build_backbone(TINY, norm_cfg={**norm, "_delete_": True}).gn1.num_groups == 2
    write("top.yaml", {"_base_": "net.yaml", "_delete_": True, "backbone": TINY})
    assert load_config(Path(write("top.yaml", {"_base_": "net.yaml", "_delete_": True, **TINY}))).backbone == TINY
    with pytest.raises(TypeError, match="`_delete_` must be True or False, got 'yes'"):
        load(norm_cfg={**norm, "_delete_": "yes"})


@pytest.mark.parametrize(
    "fail",
    [
        lambda: build_backbone("no_such_net"),
        lambda: build_backbone({"type": "NoSuchNet"}),
        lambda: build_backbone({**TINY, "depth": 7}),
        lambda: build_backbone({**TINY, "norm_cfg": {}}),
        lambda: build_backbone({**TINY, "plugins": [{"cfg": {}}]}),
        lambda: build_backbone({**TINY, "_scope_": "no_such"}),
        lambda: build_backbone({"type": "RegNet", "arch": "no_such"}),
        lambda: build_backbone({"type": "RegNet", "arch": {}}),
        lambda: MODELS.build({"type": "NoSuchNet"}),
        lambda: MODELS.build({"type": "ResNet", "depth": 7}),
        lambda: find_weights("no_such_weights"),
        lambda: convert_state_dict({}, "no_such_layout"),
        lambda: FPN([8], 8, 1, act_cfg={"type": "NoSuchNet"}),
    ],
)
def test_a_key_error_is_shown_without_quotes(fail):
    with pytest.raises(KeyError) as caught:
        fail()
    assert str(caught.value) == caught.value.args[0]


def test_an_error_inside_another_is_shown_without_quotes(write):
    path = write("net.py", "from resbackbone import build_backbone\nraise KeyError('a `text` with it\\'s quotes')\n")
    with pytest.raises(ValueError, match=r"does not run: KeyError: a `text` with it's quotes$"):
        build_backbone(path)


def test_a_base_may_have_a_base_in_another_folder(write, tmp_path):
    (tmp_path / "inner").mkdir()
    write("inner/root.yaml", {"backbone": TINY})
    write("inner/middle.yaml", {"_base_": "root.yaml", "backbone": {"frozen_stages": 1}})
    path = write("net.yaml", {"_base_": "inner/middle.yaml", "backbone": {"depth": 34}})
    assert load_config(path).backbone == {**TINY, "depth": 34, "frozen_stages": 1}


@pytest.mark.parametrize(
    "text",
    [
        "type: ResNet\ndepth: 18\ndepth: 50\n",
        "backbone:\n  type: ResNet\n  depth: 18\n  norm_cfg: {type: BN, type: GN}\n",
    ],
    ids=["top", "inside"],
)
def test_a_yaml_key_written_twice_is_refused(write, text):
    with pytest.raises(ValueError, match="duplicate key"):
        build_backbone(write("twice.yaml", text))


def test_a_yaml_tag_is_refused_and_not_executed(write, tmp_path):
    target = tmp_path / "executed"
    text = f"type: ResNet\ndepth: !!python/object/apply:os.mkdir [{target}]\n"
    yaml.unsafe_load(text)
    assert target.exists()  # with another loader it would have been
    target.rmdir()
    with pytest.raises(ValueError, match="not valid YAML of plain values"):
        build_backbone(write("evil.yaml", text))
    assert not target.exists()


# Unknown names and arguments


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("ResNet50", "resnet50"),
        ("resnext50_32x4", "resnext50_32x4d"),
        ("wideresnet50", "wide_resnet50_2"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, guess):
    with pytest.raises(KeyError, match=f"unknown backbone .*did you mean .*{guess}.*resbackbone list"):
        build_backbone(name)


# What timm, torchvision, the catalog and the Hugging Face hub call them.
FOREIGN = {
    "resnet50d": "resnet50_v1d",
    "resnet101c": "resnet101_v1c",
    "resnest50d": "resnest50",
    "resnest101e": "resnest101",
    "res2net50d": "res2net50_v1b_26w_4s",
    "regnety_032": "regnety_3.2gf",
    "regnetx_002": "regnetx_200mf",
    "regnety_008_tv": "regnety_800mf_tv",
    "regnet_y_3_2gf": "regnety_3.2gf",
    "regnet_y_800mf": "regnety_800mf_tv",
    "gluon_resnet50_v1b": "resnet50_v1b",
    "gluon_resnet50_v1s": "resnet50s",
    "gluon_seresnext50_32x4d": "seresnext50_32x4d",
    "tv_resnext50_32x4d": "resnext50_32x4d",
    "swsl_resnext101_32x8d": "resnext101_32x8d",
    "seresnext26tn_32x4d": "seresnext26t_32x4d",
    "resnetv2_50x1_bitm_in21k": "resnetv2_50x1_bit",
    "tu-resnet34d": "resnet34_v1d",
    "timm-regnetx_002": "regnetx_200mf",
    "timm/resnet50": "resnet50",
    "timm/skresnet50": "skresnet50",
    "torchvision/resnet50": "resnet50",
    "torchvision/regnet_x_1_6gf": "regnetx_1.6gf",
    "microsoft/resnet-18": "resnet18",
    "microsoft/resnet-50": "resnet50",
    "facebook/regnet-y-040": "regnety_4.0gf",
    "facebook/regnet-y-320-seer-in1k": "regnety_32gf",
}
WEIGHTS = {
    "timm/resnet50.a1_in1k": "resnet50",
    "timm/resnet50d.ra2_in1k": "resnet50_v1d",
    "hf-hub:timm/resnet50d.ra2_in1k": "resnet50_v1d",
    "resnet50.tv_in1k": "resnet50",  # a tag that the catalog does not have
    "torchvision/resnet50.imagenet1k_v2": "resnet50",
    "torchvision://resnet50": "resnet50",
    "open-mmlab://resnet50_v1c": "resnet50_v1c",
}


@pytest.mark.parametrize("name", [*FOREIGN, *WEIGHTS])
@pytest.mark.usefixtures("on_meta")
@pytest.mark.filterwarnings("ignore:.*names weights")
def test_names_of_other_libraries_are_what_their_owners_mean(name):
    config = (FOREIGN | WEIGHTS)[name]
    assert load_config(name).backbone == load_config(config).backbone
    assert load_config(name).about == load_config(config).about
    assert str(build_backbone(name, out_indices=(1,))) == str(build_backbone(config, out_indices=(1,)))


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
@pytest.mark.parametrize(
    "name",
    [
        "rtdetr_r{}vd",
        "PekingU/rtdetr_r{}vd",
        "PekingU/rtdetr_r{}vd_coco_o365",
        "PekingU/rtdetr_v2_r{}vd",
        "rtdetrv2_r{}vd_6x_coco",
        "resnet{}vd",
        "resnet{}_vd",
        "ResNet{}_vd",
        "ResNet{}_vd_ssld",
        "ResNet{}_vd_ssld_v2_pretrained",
        "PResNet{}_vd",
    ],
)
def test_names_of_paddle_and_rt_detr(name, depth):
    assert load_config(name.format(depth)) == load_config(f"rtdetr_r{depth}")


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.usefixtures("on_meta")
def test_the_bottlenecks_of_rt_detr_are_resnet_d(depth):
    """Whose first stage needs its projection anyway."""
    nets = [build_backbone(name) for name in (f"rtdetr_r{depth}", f"resnet{depth}_v1d")]
    assert str(nets[0]) == str(nets[1])
    projecting = build_backbone(f"resnet{depth}_v1d", project_first_block=True)
    assert str(projecting) == str(nets[0])
    assert load_config("ResNet152_vd") == load_config("resnet152_v1d")


def test_a_name_in_the_catalog_brings_its_arguments():
    config = load_config("open-mmlab://jhu/resnet50_gn_ws").backbone
    assert config == {
        **load_config("resnet50").backbone,
        "conv_cfg": {"type": "ConvWS"},
        "norm_cfg": {"type": "GN", "num_groups": 32},
    }


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.usefixtures("on_meta")
def test_a_name_of_weights_alone_says_how_they_are_loaded(name):
    with pytest.warns(UserWarning, match=f"names weights, but this builds the architecture alone.*checkpoint='{name}'"):
        build_backbone(name)


@pytest.mark.parametrize("name", [name for name in FOREIGN if "/" not in name])
@pytest.mark.parametrize("change", [str.upper, lambda name: name.replace("_", "-", 1) if "_" in name else name.title()])
def test_another_spelling_is_answered_with_the_right_one(name, change):
    if change(name).startswith(("tu-", "timm-", "TU-", "TIMM-")):
        pytest.skip("not a name but a prefix")
    with pytest.raises(KeyError) as caught:
        load_config(change(name))
    guess = re.search(r"did you mean '(.*?)'", str(caught.value))
    assert guess is None or load_config(guess[1]).backbone == load_config(FOREIGN[name]).backbone


@pytest.mark.parametrize(
    "name",
    [
        "resnet5",
        "resnet60",
        "resnet51q",
        "resnet33ts",
        "gcresnet50t",
        "gcresnext26ts",
        "legacy_seresnet50",
        "seresnet33ts",
        "resnet50_clip",
        "resnet50x4_clip",
        "regnetz_b16",
        "regnetv_040",
        "regnety_040_sgn",
        "regnety_999mf",
        "resnetv2_50d_evos",
        "ecaresnet50d_pruned",
        "xresnet50",
        "iresnet50",
        "preresnet50",
        "skresnet26",
        "resnetrs60",
        "microsoft/resnet-51",
        "microsoft/swin-tiny-patch4-window7-224",
        "facebook/regnet-y-10b-seer",
        "densenet121",
        "vgg16",
        "efficientnet_b0",
        "mobilenetv3_large_100",
        "vit_base_patch16_224",
        "resnet",
        "os.system",
        "timm/vgg16.tv_in1k",
        "timm/resnet51q.ra2_in1k",
    ],
)
def test_no_guess_is_of_another_family_or_size(name):
    with pytest.raises(KeyError, match="unknown backbone") as caught:
        build_backbone(name)
    assert "did you mean" not in str(caught.value)
    assert "resbackbone list" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "guesses"),
    [
        ("resent50", ["resnet50"]),
        ("rsenet101", ["resnet101"]),
        ("resnet-50", ["resnet50"]),
        ("ResNet50d", ["resnet50d"]),
        ("se_resnet50", ["seresnet50"]),
        ("resnet50_v1", ["resnet50_v1b", "resnet50_v1c", "resnet50_v1d"]),
        ("resnext101_64", ["resnext101_64x4d"]),
    ],
)
def test_guesses_share_family_and_numbers(name, guesses):
    with pytest.raises(KeyError, match="did you mean") as caught:
        build_backbone(name)
    assert re.findall(r"'(\S+?)'", str(caught.value).split("did you mean")[1].split("?")[0]) == guesses


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "regnety_400mf"])
def test_an_argument_of_another_library_is_answered_with_ours(built_convs, argument, name):
    ours = re.findall(r"`(\w+)`", ARGUMENTS[argument])
    with pytest.raises(TypeError, match=f"has no argument '{argument}'; ") as caught:
        build_backbone(name, **{argument: 1})
    assert ARGUMENTS[argument] in str(caught.value)
    parameters = {
        parameter
        for base in (resbackbone.ResNeXt, ResNet, resbackbone.SEResNet, resbackbone.RegNet)
        for parameter in inspect.signature(base).parameters
    }
    assert set(ours) <= parameters
    assert not built_convs


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("return_idx", "`out_indices`"),
        ("act_cfg", "ReLU"),
        ("freeze_norm", "`norm_eval`.*FrozenBN.*requires_grad=False"),
        ("norm_freeze", "`norm_eval`"),
        ("freeze_bn", "`norm_eval`"),
        ("with_dcn", "`dcn`.*`stage_with_dcn`"),
        ("num_features", "out_channels"),
        ("hidden_sizes", "out_channels"),
        ("downsample_in_first_stage", "`strides`"),
        ("replace_stem_pool", "ResNetRS"),
        ("variant", "ResNetV1d"),
        ("lr_mult_list", "param_groups"),
        ("encoder_name", "build_backbone"),
        ("cardinality", "`groups`"),
        ("width_per_group", "`base_width`.*WideResNet"),
        ("scales", "it is an argument of Res2Net"),
        ("radix", "it is an argument of ResNeSt"),
        ("arch", "it is an argument of RegNet"),
    ],
)
def test_an_argument_elsewhere_is_answered_with_ours_or_the_class(argument, answer):
    for build in (build_backbone, lambda config: build_backbone("resnet18", **config)):
        config = {argument: 1} if build is not build_backbone else {"type": "ResNet", "depth": 18, argument: 1}
        with pytest.raises(TypeError, match=f"ResNet has no argument '{argument}'; .*{answer}") as caught:
            build(config)
        assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "argument", ["num_layers", "avg_pool", "out_strides", "data_format", "name", "kwargs", "self", "x", "stem"]
)
def test_an_argument_that_is_near_to_none_is_answered_with_all(argument):
    with pytest.raises(
        TypeError, match=f"no argument '{argument}'; .*Known: avg_down, base_channels, .*zero_init"
    ) as e:
        build_backbone("resnet18", **{argument: 1})
    assert argument == "stem" or "did you mean" not in str(e.value)


@pytest.mark.parametrize(("argument", "guess"), [("dcnn", "dcn"), ("sytle", "style"), ("norm_evl", "norm_eval")])
def test_a_slip_of_the_fingers_is_guessed(argument, guess):
    with pytest.raises(TypeError, match=f"did you mean '{guess}'"):
        build_backbone("resnet18", **{argument: 1})


@pytest.mark.parametrize("given", [True, False])
def test_pretrained_true_names_the_way(built_convs, given):
    with pytest.raises(TypeError, match=rf"`pretrained` is a path.*got {given};.*checkpoint='timm/resnet"):
        build_backbone("resnet50", pretrained=given)
    assert not built_convs


@pytest.mark.parametrize(
    ("type_", "guess"), [("WideResNt", "WideResNet"), ("Resnext", "ResNeXt"), ("ResNetV1D", "ResNetV1d")]
)
def test_an_unknown_type_is_answered_with_the_nearest(type_, guess):
    for build in (build_backbone, MODELS.build):
        with pytest.raises(KeyError, match=f"unknown (backbone|model) type '{type_}'; did you mean '{guess}'"):
            build({"type": type_, "depth": 50})


@pytest.mark.parametrize(
    ("type_", "argument", "guess"),
    [
        ("ResNet", "frozen_stage", "frozen_stages"),
        ("ResNet", "out_index", "out_indices"),
        ("ResNetV1d", "deepstem", "deep_stem"),
        ("ResNetV1d", "normcfg", "norm_cfg"),
        ("ResNeXt", "group", "groups"),
        ("ResNeXt", "basewidth", "base_width"),
        ("ResNeXt", "drop_path", "drop_path_rate"),
        ("WideResNet", "widen_factor", "widening_factor"),
    ],
)
def test_a_misspelt_argument_is_answered_with_the_nearest(built_convs, type_, argument, guess):
    with pytest.raises(TypeError, match=f"{type_} has no argument '{argument}'; did you mean '{guess}'"):
        build_backbone({"type": type_, "depth": 50, argument: 1})
    assert not built_convs


def test_a_missing_argument_is_named():
    with pytest.raises(TypeError, match="ResNeXt needs `depth`, got only groups, base_width"):
        build_backbone({"type": "ResNeXt", "groups": 32, "base_width": 4})
    with pytest.raises(TypeError, match="ResNet needs `depth`, got only no arguments"):
        build_backbone({"type": "ResNet"})


# The registry


def test_the_registry_is_a_child_of_mmengines():
    assert MODELS.scope == "resbackbone"
    assert MODELS.parent is ROOT_MODELS
    assert ROOT_MODELS.children["resbackbone"] is MODELS


def test_every_public_class_is_registered_under_its_name():
    classes = [getattr(resbackbone, name) for name in resbackbone.__all__]
    backbones = [
        item for item in classes if isinstance(item, type) and issubclass(item, resbackbone.backbones.Backbone)
    ]
    assert len(backbones) >= 6
    for item in [*backbones, FPN]:
        assert MODELS.get(item.__name__) is item


def test_a_foreign_registry_builds_ours_by_scope():
    host = Registry("model", parent=ROOT_MODELS, scope="resbackbone_test_host")
    config = {"depth": 18, "base_channels": 8}
    assert type(host.build({"type": "resbackbone.ResNet", **config})) is ResNet
    assert type(ROOT_MODELS.build({"type": "ResNet", "_scope_": "resbackbone", **config})) is ResNet
    assert type(build_backbone({"type": "resbackbone.ResNet", **config})) is ResNet


@pytest.mark.parametrize(
    "config", ["dict(type='resbackbone.ResNet', depth=18)", "dict(type='ResNet', _scope_='resbackbone', depth=18)"]
)
def test_mmengine_finds_us_by_scope_without_an_import(config):
    code = "import sys; from mmengine.registry import MODELS; assert 'resbackbone' not in sys.modules; "
    run = subprocess.run([sys.executable, "-c", f"{code}MODELS.build({config})"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_registered_class_of_ones_own_builds(registry):
    @registry.register_module()
    class Mine(ResNet):
        def __init__(self, depth=18, *, color="red", **kwargs):
            super().__init__(depth, base_channels=8, **kwargs)
            self.color = color

    net = build_backbone({"type": "Mine", "color": "blue", "out_indices": (0,)})
    assert (net.color, net.out_channels) == ("blue", (8,))
    with pytest.raises(TypeError, match="Mine has no argument 'colors'; did you mean 'color'"):
        build_backbone({"type": "Mine", "colors": "blue"})
