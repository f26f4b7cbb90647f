"""Key layouts in both directions: keys of the library's model where it can be installed, else the documented ones."""

import re
from collections.abc import Mapping

import pytest
import torch

from resbackbone.analysis.cost import build_on_meta
from resbackbone.checkpoints.conversion import convert_state_dict, detect_layout, find_backbone
from resbackbone.checkpoints.layouts import LAYOUTS, is_native
from resbackbone.config import list_backbones

# Our config, the library's model, the detected layout.
TIMM = [
    ("resnet50", "resnet50", "native"),
    ("resnet50_v1d", "resnet50d", "timm"),
    ("resnet18_v1d", "resnet18d", "timm"),
    ("seresnet50", "seresnet50", "timm"),
    ("seresnet50", "legacy_seresnet50", "timm"),
    ("seresnext50_32x4d", "legacy_seresnext50_32x4d", "timm"),
    ("skresnet18", "skresnet18", "timm"),
    ("skresnet50d", "skresnet50d", "timm"),
    ("skresnext50_32x4d", "skresnext50_32x4d", "timm"),
    ("resnetrs50", "resnetrs50", "timm"),
    ("ecaresnet26t", "ecaresnet26t", "timm"),
    ("resnest14", "resnest14d", "timm"),
    ("res2net50_26w_4s", "res2net50_26w_4s", "native"),
    ("res2net50_v1b_26w_4s", "res2net50d", "timm"),
    ("resnetblur50", "resnetblur50", "native"),
    ("resnetaa50d", "resnetaa50d", "timm"),
    ("regnety_400mf", "regnety_004", "timm-regnet"),
    ("regnetx_400mf", "regnetx_004", "timm-regnet"),
    ("resnetv2_50", "resnetv2_50", "timm-resnetv2"),
    ("resnetv2_50d", "resnetv2_50d", "timm-resnetv2"),
    ("resnetv2_50x1_bit", "resnetv2_50x1_bit", "timm-resnetv2"),
]
TORCHVISION = [
    ("resnet18", "resnet18", "native"),
    ("resnext50_32x4d", "resnext50_32x4d", "native"),
    ("regnetx_400mf_tv", "regnet_x_400mf", "torchvision-regnet"),
    ("regnety_400mf", "regnet_y_400mf", "torchvision-regnet"),
]
HEADS = re.compile(r"(fc|bn|gn)\..+")  # the classifier, and the norm in front of it in pre-activation nets


def tensors_of(build, *args, **kwargs):
    """Return the state dict of a model on the meta device, each tensor filled with a number of its own."""
    with torch.device("meta"):
        state_dict = build(*args, **kwargs).state_dict()
    return {
        key: torch.tensor(float(index)).expand(tensor.shape) for index, (key, tensor) in enumerate(state_dict.items())
    }


def assert_fills(native, config):
    """Assert that keys and shapes are those of our config's backbone, and all others belong to a head."""
    own = build_on_meta(config).state_dict()
    assert {key: native[key].shape for key in own} == {key: tensor.shape for key, tensor in own.items()}
    assert [key for key in native if key not in own and not HEADS.fullmatch(key)] == []


def assert_same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]):
    assert list(left) == list(right)
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key


def check_both_ways(theirs, config, layout, old=False):
    assert detect_layout(theirs) == layout
    native = convert_state_dict(theirs)
    assert_fills(native, config)
    if not old:
        assert_same(convert_state_dict(native, "native", layout), theirs)
    return native


@pytest.mark.parametrize(("config", "model", "layout"), TIMM)
def test_timms_names(timm, config, model, layout):
    theirs = tensors_of(timm.create_model, model)
    check_both_ways(theirs, config, layout, old=model.startswith("legacy"))
    assert_fills(convert_state_dict(theirs, layout), config)


@pytest.mark.parametrize(("config", "model", "layout"), TORCHVISION)
def test_torchvisions_names(torchvision, config, model, layout):
    check_both_ways(torchvision.models.get_model(model).state_dict(), config, layout)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ("resnet50", {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck"}),
        ("resnet18", {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}),
    ],
)
def test_hugging_faces_names(torchvision, config, sizes):
    transformers = pytest.importorskip("transformers")
    theirs = tensors_of(transformers.ResNetForImageClassification, transformers.ResNetConfig(**sizes))
    assert find_backbone(theirs).prefix == "resnet."
    assert detect_layout(theirs) == "huggingface"
    native = convert_state_dict(theirs)
    assert_fills(native, config)
    back = convert_state_dict(native, target="huggingface")
    assert_same(back, {key.removeprefix("resnet."): tensor for key, tensor in theirs.items()})


def test_the_names_of_rt_detr(torchvision):
    transformers = pytest.importorskip("transformers")
    sizes = {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck"}
    theirs = tensors_of(transformers.RTDetrResNetBackbone, transformers.RTDetrResNetConfig(**sizes))
    check_both_ways(theirs, "resnet50_v1d", "huggingface")
    detector = {f"model.backbone.model.{key}": tensor for key, tensor in theirs.items()}
    assert_same(convert_state_dict(detector), convert_state_dict(theirs))


@pytest.mark.parametrize(
    ("config", "layer_type"), [("regnetx_400mf", "x"), ("regnety_400mf", "y")], ids=["regnetx", "regnety"]
)
def test_hugging_faces_regnets(torchvision, config, layer_type):
    transformers = pytest.importorskip("transformers")
    sizes = {"x": ([1, 2, 7, 12], [32, 64, 160, 384], 16), "y": ([1, 3, 6, 6], [48, 104, 208, 440], 8)}
    depths, widths, group = sizes[layer_type]
    theirs = tensors_of(
        transformers.RegNetForImageClassification,
        transformers.RegNetConfig(
            depths=depths, hidden_sizes=widths, groups_width=group, layer_type=layer_type, embedding_size=32
        ),
    )
    native = convert_state_dict(theirs)
    assert detect_layout(theirs) == "huggingface"
    assert_fills(native, config)
    back = convert_state_dict(native, target="huggingface")
    assert_same(back, {key.removeprefix("regnet."): tensor for key, tensor in theirs.items()})


def test_hugging_faces_bit(torchvision):
    transformers = pytest.importorskip("transformers")
    theirs = tensors_of(transformers.BitForImageClassification, transformers.BitConfig())
    native = convert_state_dict(theirs)
    assert detect_layout(theirs) == "huggingface"
    assert_fills(native, "resnetv2_50x1_bit")
    back = convert_state_dict(native, target="huggingface")
    assert_same(back, {key.removeprefix("bit."): tensor for key, tensor in theirs.items()})


FEATURES = [row for row in TIMM if not row[1].startswith("legacy")]


@pytest.mark.parametrize("kind", [None, "getter", "hook"])
@pytest.mark.parametrize(("config", "model", "layout"), FEATURES)
def test_timms_names_with_features_only(timm, config, model, layout, kind):
    theirs = tensors_of(timm.create_model, model, features_only=True, **({"feature_cls": kind} if kind else {}))
    assert detect_layout(theirs) == layout
    native = convert_state_dict(theirs)
    assert_fills(native, config)
    written = convert_state_dict(native, target=layout)
    # As in timm's whole model, without what features do not need.
    assert written.keys() <= tensors_of(timm.create_model, model).keys()
    inside_a_transformer = {f"model.backbone._backbone.{key}": tensor for key, tensor in theirs.items()}
    assert_same(convert_state_dict(inside_a_transformer), native)


@pytest.mark.parametrize(("config", "name", "layout"), TORCHVISION)
def test_torchvisions_names_of_extracted_features(torchvision, config, name, layout):
    model = torchvision.models.get_model(name)
    native = convert_state_dict(model.state_dict())
    regnet = name.startswith("regnet")
    layers = [f"trunk_output.block{i}" if regnet else f"layer{i}" for i in (1, 2, 3, 4)]
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.feature_extraction import create_feature_extractor

    extracted = [create_feature_extractor(model, layers)]
    if not regnet:
        extracted.append(IntermediateLayerGetter(model, {layer: layer for layer in layers}))
    for features in extracted:
        theirs = features.state_dict()
        assert detect_layout(theirs) == layout
        for prefix in ("", "backbone.body.", "encoder."):
            found = convert_state_dict({f"{prefix}{key}": tensor for key, tensor in theirs.items()})
            assert_fills(found, config)
            assert all(torch.equal(tensor, native[key]) for key, tensor in found.items())


def test_a_vd_net_of_rt_detr():
    """Its shortcuts pool except in the first stage, and its first convolution has the name of a plain stem's."""
    names = {
        "conv1.conv1_1.conv.weight": "stem.0.weight",
        "conv1.conv1_2.conv.weight": "stem.3.weight",
        "conv1.conv1_3.norm.running_mean": "stem.7.running_mean",
        "res_layers.0.blocks.0.branch2a.conv.weight": "layer1.0.conv1.weight",
        "res_layers.0.blocks.0.short.conv.weight": "layer1.0.downsample.1.weight",
        "res_layers.0.blocks.0.short.norm.bias": "layer1.0.downsample.2.bias",
        "res_layers.1.blocks.0.short.conv.conv.weight": "layer2.0.downsample.1.weight",
        "res_layers.3.blocks.0.short.conv.norm.running_var": "layer4.0.downsample.2.running_var",
    }
    theirs = {name: torch.zeros(1) for name in names}
    native = convert_state_dict(theirs)
    assert list(native) == list(names.values())
    assert list(convert_state_dict(native, target="rtdetr")) == list(theirs)
    wrapped = {f"ema.module.backbone.{name}": tensor for name, tensor in theirs.items()}
    assert find_backbone(wrapped | {"ema.module.decoder.x": torch.zeros(1)}).prefix == "ema.module.backbone."
    assert list(convert_state_dict(wrapped)) == list(native)


# Nets as nn.Sequential: the name of a layer depends on the number of layers before it, also those without parameters.


def plain(net):
    return [net.conv1, net.bn1, net.relu, net.maxpool, *stages_of(net)]


def stages_of(net):
    return [net.layer1, net.layer2, net.layer3, net.layer4]


def named(*layers):
    return torch.nn.Sequential(*layers).state_dict()


TAKEN_APART = {
    "all children": ("resnet18", lambda net: named(*plain(net), torch.nn.AdaptiveAvgPool2d(1))),
    "all but the pool": ("resnet18", lambda net: named(net.conv1, net.bn1, net.relu, *stages_of(net))),
    "all but ReLU and pool": ("resnet18", lambda net: named(net.conv1, net.bn1, *stages_of(net))),
    "body and head": ("resnet50", lambda net: named(torch.nn.Sequential(*plain(net)), torch.nn.Linear(1, 1))),
    "two stages": ("resnet18", lambda net: named(*plain(net)[:6])),
    "stem and stages": ("resnet18", lambda net: named(torch.nn.Sequential(*plain(net)[:4]), *stages_of(net))),
    "stem, pool and stages": (
        "resnet18",
        lambda net: named(torch.nn.Sequential(*plain(net)[:3]), net.maxpool, *stages_of(net)),
    ),
    "layer0": (
        "resnet18",
        lambda net: {
            re.sub(r"^conv1\b", "layer0.0", re.sub(r"^bn1\b", "layer0.1", key)): tensor
            for key, tensor in net.state_dict().items()
        },
    ),
    "deep stem": ("resnet50_v1d", lambda net: named(*net.children())),
    "deep stem without pool": ("resnet50_v1d", lambda net: named(net.stem, *stages_of(net))),
    "CIFAR's names inside": (
        "resnet18",
        lambda net: {
            key.replace("downsample", "shortcut"): tensor
            for key, tensor in named(net.conv1, net.bn1, *stages_of(net)).items()
        },
    ),
}


@pytest.mark.parametrize("prefix", ["", "backbone.", "state_dict.model.0."])
@pytest.mark.parametrize("how", TAKEN_APART)
def test_a_sequential_net(how, prefix):
    config, take_apart = TAKEN_APART[how]
    net = build_on_meta(config)
    expected = net.state_dict()
    theirs = {f"{prefix}{key}": tensor for key, tensor in take_apart(net).items()}
    found = find_backbone(theirs)
    ours = {key: tensor for key, tensor in found.native.items() if key in expected}
    kept = {key for key in expected if how != "two stages" or not key.startswith(("layer3", "layer4"))}
    assert ours.keys() == kept
    assert all(tensor is expected[key] or tensor.shape == expected[key].shape for key, tensor in ours.items())
    assert found.layout.name == "sequential"
    assert [key for key in found.native if key not in expected] == []


@pytest.mark.parametrize("config", ["resnetrs50", "seresnet50", "resnetv2_50d", "skresnet50", "resnet18_ibn_a"])
def test_our_nets_as_sequential(config):
    net = build_on_meta(config)
    back = convert_state_dict(named(*net.children()))
    assert {key: tensor.shape for key, tensor in back.items()} == {
        key: tensor.shape for key, tensor in net.state_dict().items()
    }


@pytest.mark.parametrize("config", ["resnet18d", "seresnet50", "ecaresnet50t", "resnet50", "resnetrs50"])
def test_a_timm_net_as_sequential(timm, config):
    with torch.device("meta"):
        model = timm.create_model(config)
    whole, apart = convert_state_dict(model.state_dict()), convert_state_dict(named(*model.children()))
    assert {key: tensor.shape for key, tensor in apart.items()} == {key: tensor.shape for key, tensor in whole.items()}


# Libraries that cannot be installed here: a few documented keys of each, and a round trip of the whole net.
DOCUMENTED = {
    "detectron2": {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_mean": "bn1.running_mean",
        "res2.0.conv1.weight": "layer1.0.conv1.weight",
        "res2.0.conv3.norm.bias": "layer1.0.bn3.bias",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res5.2.shortcut.norm.weight": "layer4.2.downsample.1.weight",
        "res4.22.conv2.weight": "layer3.22.conv2.weight",
        "linear.bias": "fc.bias",
    },
    "caffe2": {
        "conv1_w": "conv1.weight",
        "res_conv1_bn_s": "bn1.weight",
        "res_conv1_bn_beta": "bn1.bias",
        "res2_0_branch2a_w": "layer1.0.conv1.weight",
        "res2_0_branch2c_bn_b": "layer1.0.bn3.bias",
        "res2_0_branch2c_bn_gamma": "layer1.0.bn3.weight",
        "res5_2_branch2b_bn_riv": "layer4.2.bn2.running_var",
        "res4_22_branch2b_bn_running_mean": "layer3.22.bn2.running_mean",
        "res3_0_branch1_w": "layer2.0.downsample.0.weight",
        "res3_0_branch1_bn_s": "layer2.0.downsample.1.weight",
        "pred_w": "fc.weight",
        "fc1000_b": "fc.bias",
    },
    "paddle": {
        "conv1.conv1.conv.weight": "conv1.weight",
        "conv1.res_conv1.norm._mean": "bn1.running_mean",
        "res2.res2a.branch2a.conv.weight": "layer1.0.conv1.weight",
        "res2.res2a.branch2c.norm._variance": "layer1.0.bn3.running_var",
        "res2.res2a.short.conv.weight": "layer1.0.downsample.0.weight",
        "res3.res3a.short.norm.bias": "layer2.0.downsample.1.bias",
        "res4.res4f.branch2b.conv.weight": "layer3.5.conv2.weight",
        "res4.res4b22.branch2b.conv.weight": "layer3.22.conv2.weight",
    },
    "pycls": {
        "stem.conv.weight": "conv1.weight",
        "stem.bn.bias": "bn1.bias",
        "s1.b1.f.a.weight": "layer1.0.conv1.weight",
        "s1.b1.f.b_bn.running_mean": "layer1.0.bn2.running_mean",
        "s4.b2.f.c.weight": "layer4.1.conv3.weight",
        "s2.b1.proj.weight": "layer2.0.downsample.0.weight",
        "s2.b1.bn.weight": "layer2.0.downsample.1.weight",
        "s3.b1.f.se.f_ex.0.bias": "layer3.0.se_layer.conv1.conv.bias",
        "head.fc.weight": "fc.weight",
    },
    "rtdetr": {
        "conv1.conv1_1.conv.weight": "conv1.weight",  # a 7x7, where no further ones follow
        "conv1.conv1_1.norm.running_var": "bn1.running_var",
        "res_layers.0.blocks.0.branch2a.conv.weight": "layer1.0.conv1.weight",
        "res_layers.0.blocks.2.branch2c.norm.bias": "layer1.2.bn3.bias",
        "res_layers.0.blocks.0.short.conv.weight": "layer1.0.downsample.0.weight",
        "res_layers.3.blocks.0.short.norm.running_mean": "layer4.0.downsample.1.running_mean",
    },
    "mmaction2": {
        "conv1.conv.weight": "conv1.weight",
        "conv1.bn.bias": "bn1.bias",
        "layer1.0.conv1.conv.weight": "layer1.0.conv1.weight",
        "layer4.1.conv3.bn.running_var": "layer4.1.bn3.running_var",
        "layer2.0.downsample.conv.weight": "layer2.0.downsample.0.weight",
        "layer2.0.downsample.bn.bias": "layer2.0.downsample.1.bias",
    },
    "cifar": {
        "conv1.weight": "conv1.weight",
        "layer2.0.shortcut.0.weight": "layer2.0.downsample.0.weight",
        "layer2.0.shortcut.1.running_mean": "layer2.0.downsample.1.running_mean",
        "linear.bias": "fc.bias",
    },
    "sequential": {
        "0.weight": "conv1.weight",
        "1.running_mean": "bn1.running_mean",
        "4.0.conv1.weight": "layer1.0.conv1.weight",
        "5.0.downsample.0.weight": "layer2.0.downsample.0.weight",
        "7.2.bn3.bias": "layer4.2.bn3.bias",
        "9.weight": "fc.weight",
    },
    "bit": {
        "resnet/root_block/standardized_conv2d/kernel": "conv1.weight",
        "resnet/block1/unit01/a/group_norm/gamma": "layer1.0.gn1.weight",
        "resnet/block3/unit23/c/standardized_conv2d/kernel": "layer3.22.conv3.weight",
        "resnet/block2/unit01/a/proj/standardized_conv2d/kernel": "layer2.0.downsample.0.weight",
        "resnet/group_norm/beta": "gn.bias",
        "resnet/head/conv2d/kernel": "fc.weight",
    },
    "mmpretrain": {
        "stem.0.conv.weight": "stem.0.weight",
        "stem.2.bn.running_var": "stem.7.running_var",
        "layer1.0.conv1.weight": "layer1.0.conv1.weight",
        "head.fc.weight": "fc.weight",
    },
}


@pytest.mark.parametrize("layout", DOCUMENTED)
def test_documented_names(layout):
    dims = 4 if layout == "bit" else 1
    names = ["layer1.0.conv1.weight", *(["layer1.0.bn1.running_mean"] if layout != "bit" else [])]
    anchor = convert_state_dict({name: torch.zeros((1,) * dims) for name in names}, "native", layout)
    for name, native in DOCUMENTED[layout].items():
        assert native in convert_state_dict(anchor | {name: torch.zeros((1,) * dims)}, layout), name


def test_a_vd_net_of_paddle():
    """Its shortcuts pool except in the first stage."""
    names = {
        "conv1.conv1_1.conv.weight": "stem.0.weight",
        "conv1.conv1_3.norm._mean": "stem.7.running_mean",
        "res2.res2a.branch2a.conv.weight": "layer1.0.conv1.weight",
        "res2.res2a.short.conv.weight": "layer1.0.downsample.1.weight",
        "res2.res2a.short.norm.bias": "layer1.0.downsample.2.bias",
        "res3.res3a.short.conv.conv.weight": "layer2.0.downsample.1.weight",
        "res5.res5a.short.conv.norm._variance": "layer4.0.downsample.2.running_var",
    }
    theirs = {name: torch.zeros(1) for name in names}
    native = convert_state_dict(theirs)
    assert list(native) == list(names.values())
    assert list(convert_state_dict(native, target="paddle")) == list(theirs)


def test_mmpretrains_shortcuts_count_from_another_number():
    theirs = {
        "backbone.stem.0.conv.weight": "stem.0.weight",
        "backbone.layer1.0.conv1.weight": "layer1.0.conv1.weight",
        "backbone.layer1.0.downsample.0.weight": "layer1.0.downsample.1.weight",
        "backbone.layer1.0.downsample.1.bias": "layer1.0.downsample.2.bias",
        "backbone.layer2.0.downsample.1.weight": "layer2.0.downsample.1.weight",
        "backbone.layer2.0.downsample.2.bias": "layer2.0.downsample.2.bias",
    }
    native = convert_state_dict({name: torch.zeros(1) for name in theirs})
    assert list(native) == list(theirs.values())
    assert [f"backbone.{name}" for name in convert_state_dict(native, target="mmpretrain")] == list(theirs)
    assert list(convert_state_dict(native, "mmpretrain")) == list(native)  # read again, nothing moves


# The nets that a layout has keys for.
RESNETS = ["resnet18", "resnet50", "resnet101", "resnext50_32x4d"]
EXPRESSIBLE = {
    "timm": [*RESNETS, "resnet50_v1d", "seresnet50", "skresnet50", "res2net50_v1b_26w_4s", "resnest50", "ecaresnet50"],
    "timm-resnetv2": ["resnetv2_18", "resnetv2_50d"],
    "timm-regnet": ["regnetx_400mf", "regnety_400mf"],
    "torchvision-regnet": ["regnetx_400mf", "regnety_400mf"],
    "pycls": ["regnetx_400mf", "regnety_400mf"],
    "mmpretrain": [*RESNETS, "resnet50_v1c", "resnet50_v1d", "seresnet50"],
    "detectron2": [*RESNETS, "resnet50_v1c"],
    "huggingface": [
        "resnet18",
        "resnet50",
        "resnet101",
        "resnet50_v1d",
        "rtdetr_r18",
        "regnetx_400mf",
        "regnety_400mf",
    ],
    "paddle": [*RESNETS, "resnet50_v1c", "resnet50_v1d", "resnet101_v1d", "seresnet50", "rtdetr_r18", "rtdetr_r34"],
    "rtdetr": ["resnet18", "resnet50", "resnet50_v1c", "rtdetr_r18", "rtdetr_r34", "rtdetr_r50", "rtdetr_r101"],
    "mmaction2": RESNETS,
    "cifar": [*RESNETS, "resnet18_cifar"],
    "sequential": [*RESNETS, "resnet50_v1c", "resnet50_v1d", "res2net50_26w_4s", "wide_resnet50_2"],
    "bit": ["resnetv2_50x1_bit", "resnetv2_101x3_bit"],
}
ROUND_TRIPS = [(layout, config) for layout, configs in EXPRESSIBLE.items() for config in configs]


def random_weights(config):
    """Return a state dict with the keys and shapes of a config, and a classifier."""
    own = build_on_meta(config)
    shapes = {key: tensor.shape for key, tensor in own.state_dict().items() if "num_batches_tracked" not in key}
    shapes |= {"fc.weight": (10, own.feat_dim), "fc.bias": (10,)}
    numbers = torch.randn(len(shapes), generator=torch.Generator().manual_seed(0))
    return {key: number.expand(shape) for number, (key, shape) in zip(numbers, shapes.items(), strict=True)}


@pytest.mark.parametrize(("layout", "config"), ROUND_TRIPS)
def test_there_and_back(layout, config):
    ours = random_weights(config)
    theirs = convert_state_dict(ours, "native", layout)
    assert len(theirs) == len(ours)
    assert_same(convert_state_dict(theirs, layout), ours)
    assert detect_layout(theirs) == ("native" if list(theirs) == list(ours) else layout)
    wrapped = {f"module.encoder_q.{key}": tensor for key, tensor in theirs.items()}
    assert_same(convert_state_dict(wrapped), ours)


@pytest.mark.parametrize("config", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_caffe2s_norms_there_and_back(config):
    """Statistics are folded into weight and bias; read again, they compute the same."""
    ours = random_weights(config)
    ours |= {key: tensor.abs() + 0.5 for key, tensor in ours.items() if key.endswith("running_var")}
    theirs = convert_state_dict(ours, "native", "caffe2")
    assert not [key for key in theirs if key.endswith(("rm", "riv"))]
    assert detect_layout(theirs) == "caffe2"
    back = convert_state_dict(theirs)
    assert list(back) == list(ours)
    assert_same(convert_state_dict(back, target="caffe2"), theirs)  # exact, as the statistics that are added cancel
    x = torch.randn(2, ours["bn1.weight"].numel(), 4, 4)
    outs = [
        torch.nn.functional.batch_norm(x, w["bn1.running_mean"], w["bn1.running_var"], w["bn1.weight"], w["bn1.bias"])
        for w in (ours, back)
    ]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["detectron2", "caffe2", "huggingface"])
def test_group_norms_have_a_name_of_their_own_here(layout):
    ours = {}
    for key, tensor in random_weights("resnet50").items():
        if "running" not in key:
            ours[re.sub(r"\bbn(?=\d\.)", "gn", key)] = tensor
    theirs = convert_state_dict(ours, "native", layout)
    assert not [key for key in theirs if is_native(key) and not key.startswith("fc")]
    assert_same(convert_state_dict(theirs), ours)


@pytest.mark.parametrize(
    ("prefix", "other"),
    [
        ("module.", None),
        ("_orig_mod.", None),
        ("backbone.", "neck.lateral_convs.0.conv.weight"),
        ("model.backbone.bottom_up.", "model.proposal_generator.x"),
        ("teacher.backbone.", "student.backbone."),
        ("module.encoder_q.", "module.encoder_k."),
        ("module.base_encoder.", "module.momentum_encoder."),
        ("state_dict.backbone.", "optimizer.state.0"),
    ],
)
def test_prefixes_are_removed(prefix, other):
    ours = random_weights("resnet18")
    wrapped = {f"{prefix}{key}": tensor for key, tensor in ours.items()}
    if other is not None and other.endswith("."):
        wrapped = {f"{other}{key}": tensor + 1 for key, tensor in ours.items()} | wrapped
    elif other is not None:
        wrapped[other] = torch.zeros(1)
    found = find_backbone(wrapped)
    assert found.prefix == prefix
    assert_same(found.native, ours)
    assert found.other_prefixes == ((other,) if other is not None and other.endswith(".") else ())


@pytest.mark.slow
def test_our_own_names_are_native():
    strange = [key for name in list_backbones() for key in build_on_meta(name).state_dict() if not is_native(key)]
    assert strange == []


def test_state_dicts_without_a_backbone_are_refused():
    with pytest.raises(ValueError, match=r"no known backbone .* first keys are: encoder\.weight; known layouts"):
        detect_layout({"encoder.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no paddle backbone"):
        convert_state_dict(random_weights("resnet18"), "paddle")


def test_two_names_of_one_tensor_are_refused():
    weights = random_weights("resnet18")
    with pytest.raises(ValueError, match=r"stem\.conv1\.norm\.weight and bn1\.weight both mean bn1\.weight"):
        convert_state_dict(convert_state_dict(weights, target="detectron2") | {"bn1.weight": weights["bn1.weight"]})


@pytest.mark.parametrize("end", ["source", "target"])
def test_an_unknown_layout_suggests_the_nearest(end):
    with pytest.raises(KeyError, match=r"unknown layout 'detectron'; did you mean 'detectron2'"):
        convert_state_dict(random_weights("resnet18"), **{end: "detectron"})


def test_the_layouts_are_documented():
    assert all(repr(name).strip("'") in detect_layout.__doc__ for name in LAYOUTS)
