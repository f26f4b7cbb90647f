"""Whole configs drawn at random, sensible and insane; a seed draws the same one again."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch

Config = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """One config.

    Attributes:
        seed: What :func:`draw` was called with.
        config: A backbone, a shared head or a classifier.
        neck: An FPN behind the backbone, without its ``in_channels``; None for none.
        broken: Where one value was made insane, from the argument inwards; empty for a sensible config.
    """

    seed: int
    config: Config
    neck: Config | None = None
    broken: tuple[Any, ...] = field(default=())


def draw(seed: int) -> Draw:
    """Draw a config: two of five as they might stand in somebody's file, the others with one insane value in it."""
    rng = random.Random(seed)
    config = rng.choice([_backbone] * 12 + [_shared_head, _classifier])(rng)
    without = ("ResLayer", "ImageClassifier", "TridentResNet")  # the last one's maps are of several batch sizes
    neck = _neck(rng) if config["type"] not in without and rng.random() < 0.25 else None
    if rng.random() < 0.4:
        return Draw(seed, config, neck)
    target = neck if neck is not None and rng.random() < 0.5 else config
    broken = _break(rng, target)
    return Draw(seed, config, neck, broken)


# What somebody might ask for

DEPTHS = {
    "BasicOrBottleneck": (18, 34, 26, 50, 101),
    "Bottleneck": (26, 50, 101),
    "Deep": (50, 101, 152),
    "ResNeSt": (14, 26, 50),
    "ResNetT": (10, 14, 18, 26, 50),
    "ResNetRS": (50, 101),
}
KINDS = {
    **dict.fromkeys(
        ("ResNet", "ResNetV1b", "ResNetV1c", "ResNetV1d", "SEResNet", "ResNet_CIFAR", "SKResNet", "ResNetAA"),
        "BasicOrBottleneck",
    ),
    **dict.fromkeys(("ResNetIBN", "ResNetV2"), "BasicOrBottleneck"),
    **dict.fromkeys(("ResNeXt", "SEResNeXt"), "Bottleneck"),
    **dict.fromkeys(("WideResNet", "Res2Net", "DetectoRS_ResNet", "DetectoRS_ResNeXt", "TridentResNet"), "Deep"),
    "ResNeSt": "ResNeSt",
    "ResNetT": "ResNetT",
    "ResNetRS": "ResNetRS",
    "RegNet": "RegNet",
}
FLAGS = (False, True)
GROUPED = {"groups": (1, 2, 3, 4), "base_width": (1, 2, 4, 8, 16)}
SELECTIVE = {"num_paths": (2, 3), "reduction": (1, 4, 16), "min_channels": (1, 8, 32), "split_input": FLAGS}
OWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "ResNeXt": GROUPED,
    "SEResNeXt": {**GROUPED, "se_ratio": (1, 4, 16, 64)},
    "ResNetT": GROUPED,
    "WideResNet": {"widening_factor": (1, 2, 3)},
    "SEResNet": {"se_ratio": (1, 4, 16, 64)},
    "ResNetRS": {"se_ratio": (1, 4, 16)},
    "SKResNet": {**GROUPED, **SELECTIVE},
    "ResNetAA": {**GROUPED, "anti_aliasing": ("blur", "average")},
    "ResNetIBN": {**GROUPED, "ibn": ("a", "b")},
    "ResNetV2": {**GROUPED, "zero_padded_pool": FLAGS, "final_norm": FLAGS},
    "Res2Net": {
        "scales": (2, 3, 4, 8),
        "base_width": (1, 4, 8, 14),
        "groups": (1, 2),
        "pool_at_stride_1": FLAGS,
    },
    "ResNeSt": {
        **GROUPED,
        "radix": (1, 2, 3, 4),
        "reduction_factor": (1, 4, 8),
        "avg_down_stride": FLAGS,
        "avd_first": FLAGS,
    },
    "DetectoRS_ResNet": {"output_img": FLAGS, "rfp_inplanes": (None, 1, 8)},
    "DetectoRS_ResNeXt": {**GROUPED, "output_img": FLAGS, "rfp_inplanes": (None, 1, 8)},
    "TridentResNet": {"test_branch_idx": (-1, 0, 1)},
    "RegNet": {"se_ratio": (None, 0, 0.25, 1)},
}
NORMS: tuple[Config, ...] = (
    {"type": "BN"},
    {"type": "BN", "requires_grad": False},
    {"type": "BN", "momentum": 0.01, "eps": 1e-3},
    {"type": "BN", "momentum": None},
    {"type": "BN", "affine": False},
    {"type": "BN", "track_running_stats": False},
    {"type": "BN2d"},
    {"type": "SyncBN"},
    {"type": "FrozenBN"},
    {"type": "IN"},
    {"type": "IN2d", "affine": True},
    {"type": "IN", "track_running_stats": True},
    {"type": "GN", "num_groups": 1},
    {"type": "GN", "num_groups": 2},
    {"type": "GN", "num_groups": 4, "affine": False},
)
CONVS: tuple[Config, ...] = (
    {"type": "Conv"},
    {"type": "Conv2d"},
    {"type": "ConvWS"},
    {"type": "ConvAWS"},
    {"type": "StdConv2d", "eps": 1e-8},
    {"type": "SAC"},
    {"type": "DCN"},
    {"type": "DCNv2"},
)
DEFORMABLE: tuple[Config, ...] = (
    {"type": "DCN"},
    {"type": "DCN", "deform_groups": 2, "fallback_on_stride": True},
    {"type": "DCNv2", "deform_groups": 4, "fallback_on_stride": False},
    {"type": "DCNv2", "backend": "torch"},
)
PLUGINS: tuple[Config, ...] = (
    {"type": "SELayer"},
    {"type": "SELayer", "ratio": 4, "divisor": 1},
    {"type": "ECALayer"},
    {"type": "ECALayer", "kernel_size": 5},
    {"type": "CBAM", "ratio": 2},
    {"type": "CBAM", "kernel_size": 3, "norm_cfg": {"type": "BN"}},
    {"type": "ContextBlock", "ratio": 1 / 4},
    {"type": "NonLocal2d"},
    {"type": "GeneralizedAttention", "num_heads": 1, "attention_type": "0010"},
)
INITIALIZERS: tuple[Any, ...] = (
    None,
    {"type": "Kaiming", "layer": "Conv2d"},
    [{"type": "Xavier", "layer": ["Conv2d"], "distribution": "uniform"}, {"type": "Constant", "val": 1, "layer": "BN"}],
    {"type": "Normal", "layer": "Conv2d", "std": 0.01, "bias": 0},
    {"type": "TruncNormal", "layer": "Conv2d", "std": 0.02},
    {"type": "Uniform", "layer": "Conv2d", "a": -0.1, "b": 0.1},
    {"type": "Kaiming", "layer": "Conv2d", "mode": "fan_in", "distribution": "uniform"},
    {"type": "Constant", "layer": "_BatchNorm", "val": 0.5},
)


def _backbone(rng: random.Random) -> Config:
    name = rng.choice(sorted(KINDS))
    config: Config = {"type": name}
    if name == "RegNet":
        num_stages = _regnet(rng, config)
    else:
        config["depth"] = rng.choice(DEPTHS[KINDS[name]])
        num_stages = 3 if name == "TridentResNet" else rng.choice((1, 2, 3, 4, 4, 4))
        config["base_channels"] = rng.choice((1, 2, 3, 4, 4, 6, 8, 8, 8, 12, 16))
        config["stage_blocks"] = [rng.choice((1, 1, 2)) for _ in range(num_stages)]
        if num_stages < 4:
            config["num_stages"] = num_stages
    _stages(rng, config, num_stages)
    _choose(rng, config, 0.5, OWN.get(name, {}))
    _choose(rng, config, 0.15, _common(rng, config, num_stages))
    if name == "ResNetT":
        config.setdefault("stem_channels", rng.choice((8, 16, 24)))
    _layers(rng, config, num_stages)
    return config


def _regnet(rng: random.Random, config: Config) -> int:
    from resbackbone.backbones.regnet_archs import ARCHS, plan_stages, resolve_arch

    config["arch"] = rng.choice(
        [
            "regnetx_200mf",
            "regnety_200mf",
            {"w0": 8, "wa": 8.0, "wm": 2.0, "group_w": rng.choice((1, 3, 4, 8, 16)), "depth": rng.choice((1, 3, 4))},
            {"w0": 8, "wa": 4, "wm": 2.5, "group_w": 4, "depth": 3, "bot_mul": rng.choice((0.25, 0.5, 1, 2))},
            {"w0": 16, "wa": 0, "wm": 2, "group_w": 8, "depth": 2, "rounding": "torchvision", "se_ratio": 0.5},
        ]
    )
    return len(plan_stages(resolve_arch(config["arch"], ARCHS)))


def _stages(rng: random.Random, config: Config, num_stages: int) -> None:
    if num_stages != (3 if config["type"] == "TridentResNet" else 4) or rng.random() < 0.3:
        config["strides"] = tuple(rng.choice((1, 2, 2, 3)) for _ in range(num_stages))
        config["dilations"] = tuple(rng.choice((1, 1, 1, 2, 4)) for _ in range(num_stages))
        if config["type"] == "TridentResNet":
            config["dilations"] = (*config["dilations"][:-1], 1)
        picked = rng.sample(range(num_stages), rng.randint(1, num_stages))
        config["out_indices"] = [index - rng.choice((0, 0, num_stages)) for index in picked]
        if rng.random() < 0.3:
            config["out_indices"].insert(rng.randint(0, len(picked)), "stem")


def _common(rng: random.Random, config: Config, num_stages: int) -> dict[str, tuple[Any, ...]]:
    blocks = config.get("stage_blocks", (1,))[-1]
    options: dict[str, tuple[Any, ...]] = {
        "in_channels": (1, 2, 4),
        "stem_channels": (8, 16, 24) if config["type"].endswith("T") else (1, 2, 3, 4, 8, 16),
        "style": ("caffe", "pytorch"),
        "deep_stem": (False,) if config["type"] == "ResNet_CIFAR" or config.get("ibn") == "b" else FLAGS,
        "avg_down": FLAGS,
        "frozen_stages": tuple(range(-1, num_stages + (config["type"] != "TridentResNet"))),
        "norm_eval": FLAGS,
        "with_cp": (True, "norms"),
        "zero_init_residual": FLAGS,
        "init_cfg": INITIALIZERS,
        "multi_grid": ((1,) * blocks, (2,) * blocks, [1, 2][:blocks]),
        "contract_dilation": FLAGS,
        "drop_path_rate": (0, 0.1, 0.5),
        "fold_frozen_norms": FLAGS,
        "project_first_block": FLAGS,
    }
    if config["type"] in ("TridentResNet", "RegNet"):
        del options["multi_grid"]
    return options


def _layers(rng: random.Random, config: Config, num_stages: int) -> None:
    if rng.random() < 0.5:
        config["norm_cfg"] = copy.deepcopy(rng.choice(NORMS))
    if rng.random() < 0.3:
        config["conv_cfg"] = copy.deepcopy(rng.choice(CONVS))
    elif rng.random() < 0.25:
        config["dcn"] = copy.deepcopy(rng.choice(DEFORMABLE))
        config["stage_with_dcn"] = [rng.random() < 0.6 for _ in range(num_stages)]
    elif config["type"].startswith("DetectoRS") and rng.random() < 0.6:
        config["sac"] = {"type": "SAC", "use_deform": rng.choice(FLAGS)}
        config["stage_with_sac"] = [rng.random() < 0.6 for _ in range(num_stages)]
    if rng.random() < 0.25:
        last = 2 if config.get("depth") in (10, 18, 34) and config["type"] != "ResNeXt" else 3
        config["plugins"] = [_plugin(rng, num_stages, last) for _ in range(rng.choice((1, 1, 2)))]


def _plugin(rng: random.Random, num_stages: int, last: int) -> Config:
    plugin: Config = {"cfg": copy.deepcopy(rng.choice(PLUGINS)), "position": f"after_conv{rng.randint(1, last)}"}
    if rng.random() < 0.5:
        plugin["stages"] = tuple(rng.random() < 0.5 for _ in range(num_stages))
    if rng.random() < 0.3:
        plugin["cfg"]["postfix"] = rng.choice(("1", 2, "_b"))
    return plugin


def _choose(rng: random.Random, config: Config, chance: float, options: dict[str, tuple[Any, ...]]) -> None:
    for name, values in options.items():
        if rng.random() < chance:
            config[name] = copy.deepcopy(rng.choice(values))


def _shared_head(rng: random.Random) -> Config:
    config: Config = {"type": "ResLayer", "depth": rng.choice((18, 18, 34, 50)), "stage": 1}
    options = {
        "stride": (1, 2),
        "dilation": (1, 2),
        "style": ("pytorch", "caffe"),
        "norm_cfg": NORMS,
        "norm_eval": FLAGS,
        "with_cp": (False, True, "norms"),
        "dcn": DEFORMABLE[:4],
        "init_cfg": INITIALIZERS,
        "fold_frozen_norms": FLAGS,
    }
    _choose(rng, config, 0.3, options)
    return config


def _classifier(rng: random.Random) -> Config:
    config: Config = {
        "type": "ImageClassifier",
        "backbone": {"type": "ResNet", "depth": 18, "base_channels": 4, "stage_blocks": (1, 1, 1, 1)},
        "num_classes": rng.choice((1, 2, 10)),
    }
    options = {
        "loss": (
            {"type": "CrossEntropy", "label_smoothing": 0.1},
            {"type": "BinaryCrossEntropy", "threshold": 0.2},
        ),
        "mixup_cutmix": ({"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.1, "cutmix_alpha": 1}),
        "preprocessing": (
            {"mean": (1.0, 2.0, 3.0), "std": (4.0, 5.0, 6.0)},
            {"mean": [0, 0, 0], "std": [1, 1, 1], "order": "BGR", "size": 64},
        ),
        "init_cfg": INITIALIZERS,
    }
    _choose(rng, config, 0.4, options)
    return config


def _neck(rng: random.Random) -> Config:
    config: Config = {"type": "FPN", "out_channels": rng.choice((1, 2, 8)), "num_outs": rng.choice((1, 2, 3, 4, 4, 5))}
    options = {
        "start_level": (0, 1, 2),
        "end_level": (-1, 0, 1, 2, 3),
        "add_extra_convs": (False, True, "on_input", "on_lateral", "on_output"),
        "relu_before_extra_convs": FLAGS,
        "no_norm_on_lateral": FLAGS,
        "conv_cfg": CONVS,
        "norm_cfg": NORMS,
        "act_cfg": ({"type": "ReLU"}, {"type": "ReLU", "inplace": False}, {"type": "torch.nn.GELU"}),
        "upsample_cfg": (
            {"mode": "nearest"},
            {"mode": "bilinear", "align_corners": False},
        ),
        "init_cfg": INITIALIZERS,
    }
    _choose(rng, config, 0.25, options)
    return config


# What nobody should

LAYER_KEYS = {
    "norm_cfg": (
        *("eps", "momentum", "affine", "track_running_stats", "requires_grad", "num_groups", "num_features", "type"),
        *("num_channels", "device", "dtype", "type"),
    ),
    "conv_cfg": ("bias", "stride", "kernel_size", "padding", "padding_mode", "dilation", "groups", "eps", "type"),
    "dcn": ("deform_groups", "groups", "bias", "im2col_step", "backend", "fallback_on_stride", "type", "stride"),
    "sac": ("use_deform", "backend", "type", "padding"),
    "arch": ("w0", "wa", "wm", "group_w", "depth", "bot_mul", "se_ratio", "rounding"),
    "act_cfg": ("type", "inplace", "dim"),
    "upsample_cfg": ("mode", "align_corners", "size", "recompute_scale_factor", "antialias"),
    "init_cfg": ("type", "layer", "val", "std", "gain", "override", "distribution", "mode", "bias", "checkpoint"),
    "loss": ("type", "label_smoothing", "threshold"),
    "mixup_cutmix": ("mixup_alpha", "cutmix_alpha"),
    "preprocessing": ("mean", "std", "order", "size"),
    "cfg": ("type", "ratio", "kernel_size", "norm_cfg", "divisor", "squeeze_channels", "in_channels", "postfix"),
}
# Right by their names, and wrong only once numbers are drawn; the last entry is the wrong one.
BAD_INITIALIZERS: tuple[Config, ...] = (
    *({"type": type_, "layer": "Conv2d", "std": std} for type_ in ("Normal", "TruncNormal") for std in (-1, "0.01")),
    *({"type": "Kaiming", "layer": "Conv2d", "mode": mode} for mode in ("bogus", "fan", None, 0)),
    *({"type": type_, "distribution": wrong} for type_ in ("Kaiming", "Xavier") for wrong in ("foo", "Normal", 1)),
    *({"type": "Constant", "layer": "Conv2d", "val": val} for val in ("a", math.nan, [1], math.inf)),
    {"type": "Uniform", "layer": "Conv2d", "a": 1, "b": -1},
)
TYPES = (
    *("BN", "BN1d", "BN3d", "SyncBN", "GN", "LN", "LN2d", "IN1d", "IN3d", "FrozenBN", "IBN", "Conv1d", "Conv3d"),
    *("Conv", "ConvWS", "SAC", "DCN", "DCNv2", "ReLU", "SELayer", "ContextBlock", "ResNet", "FPN", "deconv", "nearest"),
    *("Kaiming", "RMSNorm", "Upsample", "TridentConv2d", "torch.nn.RMSNorm", "torch.nn.LazyBatchNorm2d"),
    *("torch.nn.BatchNorm1d", "torch.nn.LayerNorm", "torch.nn.Conv3d", "torch.nn.Linear", "torch.nn.ConvTranspose2d"),
    *("os.system", "builtins.print", "nowhere.Nothing", "Constant", "Pretrained", "MaxPool2d", "Dropout", "PReLU"),
    *(torch.nn.BatchNorm1d, torch.nn.Conv3d, torch.nn.Linear, torch.nn.LayerNorm, torch.nn.LazyConv2d, torch.nn.Module),
    *(torch.nn.Identity, dict, print),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 5, 7, 64, 3.0, 2.5, 0.5, -0.5, 1e9, 1e-300, 1e300),
    *(float("nan"), float("inf"), -float("inf"), 10**6, 10**9, 2**31, 2**63, 10**30, -(10**30), 1j),
    *("", "64", "1", "False", "None", "nan", "BN", "a" * 300, b"64", bytearray(b"1"), (), {}, frozenset({1})),
    *(("2", "2", "2", "2"), (1, 1, 1, 1), (True, True, True, True), (1, 2, 2, 2, 2), ((1, 2), 2, 2, 2), range(4)),
    *((None, None, None, None), (0.5, 1, 1, 1), {"type": "BN"}, {"type": None}, {"type": "Nope"}, {1: 2}),
    *({"type": ["BN"]}, {"type": {}}, {"a": {"b": {"c": []}}}, ("False", "False", "False", "False")),
    *(np.int64(2), np.int64(-1), np.uint8(4), np.float64(0.5), np.float32("nan"), np.bool_(True), np.str_("64")),
    *(Decimal(50), Decimal("NaN"), Fraction(1, 2), Fraction(2), object(), int, print, math.nan, slice(1, 2)),
)
FACTORIES: tuple[Callable[[], Any], ...] = (
    list,
    set,
    lambda: [[]],
    lambda: [None],
    lambda: np.array(3),
    lambda: np.array([1, 2, 2, 2]),
    lambda: np.array([[1, 2], [2, 2]]),
    lambda: np.array([], dtype=int),
    lambda: np.array(["a"], dtype=object),
    lambda: torch.tensor(2),
    lambda: torch.tensor(True),
    lambda: torch.tensor([1, 2, 2, 2]),
    lambda: torch.tensor(float("nan")),
    lambda: torch.zeros(0),
    lambda: torch.empty(2, device="meta"),
    lambda: iter([1, 2, 2, 2]),
    lambda: {"type": "BN", "eps": {}},
    lambda: _cycle([]),
    lambda: _cycle({}),
)


def _anything(rng: random.Random) -> Any:
    index = rng.randrange(len(VALUES) + len(FACTORIES))
    return VALUES[index] if index < len(VALUES) else FACTORIES[index - len(VALUES)]()


def _cycle(container: Any) -> Any:
    if isinstance(container, dict):
        container["type"] = container
    else:
        container.append(container)
    return container


def _break(rng: random.Random, config: Config) -> tuple[Any, ...]:
    """Put one insane value into a config; return where."""
    from resbackbone.backbones.resnet import ResNet
    from resbackbone.layers.arguments import parameters_of
    from resbackbone.registry import MODELS

    known = sorted(parameters_of(MODELS.get(config["type"]))[0])
    if MODELS.get(config["type"]) is not None and issubclass(MODELS.get(config["type"]), ResNet):
        known = [name for name in known if name != "pretrained"]
    name = rng.choice([*known, *(key for key in config if key != "type")])
    if name in LAYER_KEYS and rng.random() < 0.8 and isinstance(config.get(name, {}), dict):
        return _break_layer(rng, config, name)
    if name == "plugins" and config.get("plugins") and rng.random() < 0.8:
        index = rng.randrange(len(config["plugins"]))
        return ("plugins", index, *_break_plugin(rng, config["plugins"][index]))
    config[name] = _insane(rng, config.get(name))
    return (name,)


def _break_layer(rng: random.Random, holder: Config, name: str) -> tuple[Any, ...]:
    usual: dict[str, Any] = {
        "norm_cfg": NORMS,
        "conv_cfg": CONVS,
        "dcn": DEFORMABLE,
        "init_cfg": [cfg for cfg in INITIALIZERS if isinstance(cfg, dict)],
        "act_cfg": ({"type": "ReLU"},),
        "loss": ({"type": "CrossEntropy"},),
        "sac": ({"type": "SAC"},),
    }
    if name == "init_cfg" and rng.random() < 0.4:
        holder[name] = copy.deepcopy(rng.choice(BAD_INITIALIZERS))
        return (name, list(holder[name])[-1])
    if not holder.get(name) and name != "arch":
        holder[name] = copy.deepcopy(rng.choice(usual.get(name, ({},))))
    if name in ("dcn", "sac") and holder["type"] != "ResLayer":
        holder.setdefault(f"stage_with_{name}", (True,) * holder.get("num_stages", 4))
    key = rng.choice(LAYER_KEYS[name])
    is_type = key == "type" and rng.random() < 0.8
    holder[name][key] = rng.choice(TYPES) if is_type else _insane(rng, holder[name].get(key))
    return (name, key)


def _break_plugin(rng: random.Random, plugin: Config) -> tuple[Any, ...]:
    key = rng.choice(("cfg", "cfg", "position", "stages", "stage"))
    if key == "cfg" and rng.random() < 0.8:
        return _break_layer(rng, plugin, "cfg")
    plugin[key] = _insane(rng, plugin.get(key))
    return (key,)


def _insane(rng: random.Random, value: Any) -> Any:
    """Something in the place of ``value``: anything at all, or what is nearly right."""
    if value is None or rng.random() < 0.6:
        return _anything(rng)
    if isinstance(value, (list, tuple)):
        return _nearly(rng, value)
    if isinstance(value, dict):
        return rng.choice(([value], {**value, "surprise": 1}, list(value.items()), str(value), {}))
    if isinstance(value, (int, float)):
        variants = [str(value), [value], float(value), -value, Decimal(value), np.array(value), torch.tensor(value)]
        return rng.choice([*variants, np.float64(value), value * 10**6, value * 10**30, value + 0.5])
    return rng.choice(([value], str(value).upper(), f" {value}", str(value).encode(), {value: value}))


def _nearly(rng: random.Random, value: Any) -> Any:
    entries = list(value)
    change = rng.choice(("drop", "add", "double", "entry", "entry", "text", "array", "set"))
    if change == "drop":
        return entries[1:]
    if change == "add":
        return [*entries, *entries[:1]]
    if change == "double":
        return entries * 2
    if change == "entry" and entries:
        entries[rng.randrange(len(entries))] = _anything(rng)
        return entries
    if change == "array":
        return np.array(entries, dtype=object)
    return str(value) if change == "text" else {str(entry) for entry in entries}
