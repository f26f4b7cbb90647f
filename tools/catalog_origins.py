"""Published weights of the ResNet family by origin, read from the metadata of the installed packages.

To add an origin: a function that yields ``Published``, and its row in ``ORIGINS``.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from mmengine.config import Config
from peers import import_torchvision
from sweep_hosts import import_host
from torch import nn

from resbackbone.config import config_files, recorded_costs

Values = dict[str, Any]

ONEDL = "https://mmassets.onedl.ai/"  # OpenMMLab's files in the maintained forks
OPENMMLAB = "https://download.openmmlab.com/"


@dataclass(frozen=True)
class Published:
    """Weights as described by their origin.

    Attributes:
        name: ``origin/name``.
        config: Our config of the architecture.
        values: The other values of the catalog entry, except costs.
        preferred: Whether they are the origin's default for the architecture.
        params: Published number of parameters.
        gmacs: Published multiply-accumulates for an image of 224x224, in 10**9, to three decimals.
        build: Builds the origin's model.
    """

    name: str
    config: str
    values: Values
    preferred: bool = False
    params: int | None = None
    gmacs: float | None = None
    build: Callable[[], nn.Module] | None = None


class Origin(NamedTuple):
    """Publisher of weights: the distributions to read, and the function that reads them."""

    packages: tuple[str, ...]
    read: Callable[[], Iterable[Published]]


def hash_in(url: str) -> Values:
    """Return the ``sha256`` of an entry, which these origins write at the end of the file name."""
    found = re.search(r"-([0-9a-f]{8,})\.pth$", url)
    return {"sha256": found[1]} if found else {}


def preprocessing(
    mean: Iterable[float], std: Iterable[float], *, unit: float = 1, order: str = "RGB", size: int | None = None
) -> Values:
    """Return the ``preprocessing`` of an entry, for pixels of 0-255; ``unit`` is 255 for numbers that are for 0-1."""
    numbers = {
        "mean": [round(float(unit * value), 4) for value in mean],
        "std": [round(float(unit * value), 4) for value in std],
    }
    return {"preprocessing": {"order": order, **numbers} | ({"size": size} if size else {})}


def known(config: str) -> bool:
    """Whether the library has a config of this name."""
    return config in config_files()


# torchvision


def read_torchvision() -> Iterator[Published]:
    """Read torchvision's classification weights, with short names from mmengine, licenses and more names from timm."""
    import_torchvision()
    from torchvision import models

    short = {url: name for name, url in mmengine_names("torchvision_0.12.json").items()}
    in_timm = {cfg.url: cfg for cfg in timm_cfgs() if cfg.url}
    for model in models.list_models(models):
        enum = models.get_model_weights(model)
        for weights in enum:
            config = _torchvision_config(model, weights.meta["num_params"])
            if config is None:
                continue
            default, cfg = weights is enum.DEFAULT, in_timm.get(weights.url)
            aliases = [f"torchvision://{short[weights.url]}"] if weights.url in short else []
            aliases += [f"torchvision://{model}.default"] if default else []
            aliases += [f"timm://{cfg.architecture}.{cfg.tag}"] if cfg else []
            yield Published(
                name=f"torchvision/{model}.{weights.name.lower()}",
                config=config,
                values={
                    **_torchvision_values(weights),
                    "layout": "torchvision-regnet" if model.startswith("regnet") else "native",
                    "license": cfg.license if cfg else None,
                    "aliases": aliases,
                },
                preferred=default,
                params=weights.meta["num_params"],
                gmacs=weights.meta["_ops"] if weights.transforms().crop_size == [224] else None,
                build=partial(models.get_model, model),
            )


def _torchvision_values(weights: Any) -> Values:
    transforms, figures = weights.transforms(), weights.meta["_metrics"]["ImageNet-1K"]
    (size,), (resized,) = transforms.crop_size, transforms.resize_size
    return {
        "url": weights.url,
        **hash_in(weights.url),
        "acc1": figures["acc@1"],
        "acc5": figures["acc@5"],
        "classes": len(weights.meta["categories"]),
        **preprocessing(transforms.mean, transforms.std, unit=255, size=size),
        "crop_pct": round(size / resized, 4),
        "size_mib": weights.meta["_file_size"],
    }


def _torchvision_config(model: str, params: int) -> str | None:
    """Return our name of a torchvision model, with ``_tv`` at the end if timm has another model of that name."""
    if match := re.fullmatch(r"regnet_([xy])_(\w+)", model):
        flops = re.sub(r"^(\d)gf", r"\1.0gf", match[2].replace("_", "."))
        model = f"regnet{match[1]}_{flops}"
    names = (name for name in (model, f"{model}_tv") if known(name))
    return next((name for name in names if recorded_costs()[name]["params"] == params), None)


# timm


def timm_cfgs() -> Iterator[Any]:
    """Yield timm's configurations of all weights of its ResNets."""
    import_torchvision()
    import timm

    for module in ("resnet", "res2net", "resnest", "sknet", "resnetv2", "regnet"):
        yield from map(timm.get_pretrained_cfg, timm.list_models(module=module, pretrained=True))


def read_timm() -> Iterator[Published]:
    """Read timm's weights, with an address that has a hash in the file name, or else the Hugging Face Hub."""
    import timm

    torchvisions = {published.values["url"] for published in read_torchvision()}
    for cfg in timm_cfgs():
        config = _timm_config(cfg.architecture)
        if not known(config) or cfg.url in torchvisions:
            continue
        hub = f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/model.safetensors"
        url = cfg.url if cfg.url and hash_in(cfg.url) else hub
        size = (cfg.test_input_size or cfg.input_size)[1]
        yield Published(
            name=f"timm/{cfg.architecture}.{cfg.tag}",
            config=config,
            values={
                "url": url,
                **hash_in(url),
                "layout": _timm_layout(cfg.architecture),
                "classes": cfg.num_classes,
                "license": cfg.license if cfg.license != "unknown" else None,
                **preprocessing(cfg.mean, cfg.std, unit=255, size=size),
                "crop_pct": cfg.test_crop_pct or cfg.crop_pct,
            },
            preferred=getattr(timm.get_pretrained_cfg(cfg.architecture), "tag", None) == cfg.tag,
            build=partial(timm.create_model, cfg.architecture),
        )


def _timm_config(name: str) -> str:
    """Return our name of a timm model."""
    name = re.sub(r"^(resnet\d+)([cd])$", r"\1_v1\2", name)
    name = re.sub(r"^(res2net\d+)d$", r"\1_v1b_26w_4s", name)
    name = re.sub(r"^(resnest\d+)[de]", r"\1", name)
    name = re.sub(r"^(resnest\d+)_", r"\1_fast_", name)
    return re.sub(r"^(regnet[xy])_(\d+)", lambda match: f"{match[1]}_{_flops(int(match[2]))}", name)


def _flops(hundred_millions: int) -> str:
    """Format the FLOPs of a RegNet as in its paper: 200mf, 1.6gf, 12gf."""
    if hundred_millions < 10:
        return f"{100 * hundred_millions}mf"
    return f"{hundred_millions / 10:.1f}gf" if hundred_millions < 100 else f"{hundred_millions // 10}gf"


def _timm_layout(name: str) -> str:
    kinds = {"resnetv2": "timm-resnetv2", "regnet": "timm-regnet"}
    return next((layout for kind, layout in kinds.items() if name.startswith(kind)), "timm")


# OpenMMLab


def package_folder(package: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def mmengine_names(file: str) -> dict[str, str]:
    """Return one of mmengine's tables of names, with OpenMMLab's addresses in every distribution of mmengine."""
    table = json.loads((package_folder("mmengine") / "hub" / file).read_text(encoding="utf-8"))
    return {name: value.replace(ONEDL, OPENMMLAB) for name, value in table.items() if value}


def read_mmpretrain() -> Iterator[Published]:
    """Read the weights in mmpretrain's metafiles and mmengine's ``mmcls://`` names."""
    root = package_folder("mmpretrain") / ".mim"
    aliases = {url: f"mmcls://{name}" for name, url in mmengine_names("mmcls.json").items()}
    described = [
        model
        for file in sorted(root.glob("configs/*/metafile.yml"))
        for model in yaml.safe_load(file.read_text(encoding="utf-8")).get("Models", [])
        if model.get("Weights")
    ]
    seen = {model["Weights"] for model in described}
    for url, alias in aliases.items():
        name = alias.removeprefix("mmcls://")
        for file in sorted(root.glob(f"configs/*/{name}_*_in1k.py")) if url not in seen and known(name) else []:
            described.append({"Name": name, "Weights": url, "Config": str(file.relative_to(root))})
    preferred: set[str] = set()
    for model in described:
        published = _mmpretrain_model(model, root, aliases.get(model["Weights"]))
        if published is not None:
            # The first with a classifier.
            ordinary = published.params is not None and published.config not in preferred
            preferred |= {published.config} if ordinary else set()
            yield Published(**vars(published) | {"preferred": ordinary})


def _mmpretrain_model(model: Values, root: Path, alias: str | None) -> Published | None:
    file = root / model["Config"]
    if not re.search(r"res2?ne[xs]?t|regnet", file.read_text(encoding="utf-8").lower()):
        return None  # not imported, as some need packages that are not installed
    cfg = Config.fromfile(file)
    backbone = cfg.model.get("backbone") or cfg.model.get("image_encoder")
    backbone = backbone[0] if isinstance(backbone, list) else backbone
    config, overrides = openmmlab_config(backbone or {})
    if not known(config):
        return None
    assert not overrides
    figures = (model.get("Results") or [{}])[0].get("Metrics") or {}
    is_classifier = cfg.model["type"] == "ImageClassifier"
    return Published(
        name=f"mmpretrain/{model['Name']}",
        config=config,
        values={
            "url": model["Weights"],
            **hash_in(model["Weights"]),
            "layout": "mmpretrain",
            "acc1": figures.get("Top 1 Accuracy"),
            "acc5": figures.get("Top 5 Accuracy"),
            "classes": cfg.model.head.num_classes if is_classifier else 0,
            **_mmpretrain_preprocessing(cfg),
            "aliases": [alias] if alias else [],
        },
        params=model.get("Metadata", {}).get("Parameters", 0) if is_classifier else None,
        build=partial(_openmmlab_model, "mmpretrain", backbone),
    )


def _mmpretrain_preprocessing(cfg: Config) -> Values:
    data = cfg.get("data_preprocessor") or cfg.model.get("data_preprocessor")
    steps = {step["type"]: step for step in cfg.get("test_pipeline", ())}
    size = steps.get("CenterCrop", {}).get("crop_size")
    resized = steps.get("ResizeEdge", {}).get("scale")
    # CIFAR's pictures are RGB; all others are decoded as BGR.
    order = "RGB" if data["to_rgb"] or "cifar" in cfg.get("dataset_type", "").lower() else "BGR"
    crop = {"crop_pct": round(size / resized, 4)} if size and resized else {}
    return preprocessing(data["mean"], data["std"], order=order, size=size) | crop


def openmmlab_config(backbone: Mapping[str, Any]) -> tuple[str, Values]:
    """Return our name of a backbone of mmdet, mmseg or mmpretrain, whether we have it or not, and more arguments."""
    get = backbone.get
    groups, width = get("groups", 32), get("base_width", get("width_per_group", 4))
    names = {
        "ResNet": "resnet{depth}" if get("expansion") is None else "wide_resnet{depth}_2",
        "ResNetV1c": "resnet{depth}_v1c",
        "ResNetV1d": "resnet{depth}_v1d",
        "ResNet_CIFAR": "resnet{depth}_cifar",
        "ResNeXt": f"resnext{{depth}}_{groups}x{width}d",
        "SEResNet": "seresnet{depth}",
        "ResNeSt": "resnest{depth}",
        # mmpretrain's config sets a plain stem, and it pools in layer1; neither holds in mmdet.
        "Res2Net": f"res2net{{depth}}_{'v1d_' if get('deep_stem', True) else ''}{width}w_{get('scales', 4)}s",
        "RegNet": str(get("arch")),
    }
    name = names.get(get("type", ""), "").format(depth=get("depth"))
    if get("style") == "caffe":
        name = f"{name}_caffe"
    norm = {key: value for key, value in (get("norm_cfg") or {}).items() if key in ("type", "num_groups")}
    if norm.get("type") != "GN":
        return name, {}
    if get("conv_cfg"):
        return name, {"conv_cfg": dict(backbone["conv_cfg"]), "norm_cfg": norm}
    return (f"{name}_gn", {}) if known(f"{name}_gn") else (name, {"norm_cfg": norm})


def _openmmlab_model(host: str, backbone: Mapping[str, Any]) -> nn.Module:
    import_host(host)
    from mmengine.registry import MODELS, DefaultScope

    with DefaultScope.overwrite_default_scope(host):
        model: nn.Module = MODELS.build({key: value for key, value in backbone.items() if key != "init_cfg"})
    return model


class Use(NamedTuple):
    """Backbone and preprocessing with which a config of mmdet or mmseg uses a file of weights."""

    host: str
    backbone: Values
    preprocessing: Values


def read_open_mmlab() -> Iterator[Published]:
    """Read the files of ``open-mmlab://``, described as most configs of mmdet and mmseg use them."""
    table, old = mmengine_names("openmmlab.json"), mmengine_names("deprecated.json")
    # mmengine maps two old names to new ones with `_bgr`, which it does not have; the files are those without.
    targets = {name: new if new in table else new.removesuffix("_bgr") for name, new in old.items()}
    aliases: defaultdict[str, list[str]] = defaultdict(list)
    for name, target in targets.items():
        aliases[target].append(f"open-mmlab://{name}")
    uses = _uses()
    preferred: dict[str, str] = {}
    described = {name: _described(name, uses.get(name, [])) for name in table}
    for name, (config, overrides, _) in described.items():
        best = preferred.get(config)
        if not overrides and (best is None or len(uses[name]) > len(uses[best])):
            preferred[config] = name
    for name, (config, overrides, use) in described.items():
        if known(config):
            yield Published(
                name=f"open-mmlab/{name}",
                config=config,
                values={
                    "url": table[name],
                    **hash_in(table[name]),
                    "layout": "native",
                    "overrides": overrides,
                    **(use.preprocessing if use else {}),
                    "aliases": aliases[name],
                },
                preferred=preferred.get(config) == name,
                build=partial(_openmmlab_model, use.host, use.backbone) if use else None,
            )


def _described(name: str, uses: list[Use]) -> tuple[str, Values, Use | None]:
    """Return our config of an ``open-mmlab://`` name, more arguments, and its most common use."""
    if not uses:  # only the name is known
        config, gn = re.subn(r"_gn$", "", name.rpartition("/")[2])
        return config, {"norm_cfg": {"type": "GN", "num_groups": 32}} if gn else {}, None
    ((commonest, _),) = Counter(json.dumps(use) for use in uses).most_common(1)
    use = Use(*json.loads(commonest))
    return *openmmlab_config(use.backbone), use


def _uses() -> defaultdict[str, list[Use]]:
    """Return the uses of each ``open-mmlab://`` name in the configs of mmdet and mmseg."""
    uses: defaultdict[str, list[Use]] = defaultdict(list)
    for host in ("mmdet", "mmseg"):
        for file in sorted((package_folder(host) / ".mim" / "configs").rglob("*.py")):
            if not re.search("open-?mmlab://", file.read_text(encoding="utf-8")):
                continue
            model = Config.fromfile(file).get("model") or {}
            model = model.get("detector", model)
            backbone = model.get("backbone") or {}
            source = (backbone.get("init_cfg") or {}).get("checkpoint") or model.get("pretrained") or ""
            prefix, _, name = source.partition("://")
            if prefix.replace("-", "") == "openmmlab":
                uses[name].append(Use(host, _architecture(backbone), _mmdet_preprocessing(model)))
    return uses


def _architecture(backbone: Mapping[str, Any]) -> Values:
    """Return the arguments of a backbone that determine its weights."""
    keys = ("type", "depth", "arch", "style", "stem_channels", "groups", "base_width", "scales", "conv_cfg")
    values = {key: backbone[key] for key in keys if key in backbone}
    norm = backbone.get("norm_cfg") or {}
    return values | ({"norm_cfg": {**norm, "requires_grad": True}} if norm.get("type") == "GN" else {})


def _mmdet_preprocessing(model: Mapping[str, Any]) -> Values:
    data = model.get("data_preprocessor") or {}
    if not data.get("mean"):
        return {}
    return preprocessing(data["mean"], data["std"], order="RGB" if data["bgr_to_rgb"] else "BGR")


# detectron2

DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"
_MSRA = preprocessing((103.53, 116.28, 123.675), (1, 1, 1), order="BGR")
_FAIR = preprocessing((103.53, 116.28, 123.675), (57.375, 57.12, 58.395), order="BGR")
_TORCHVISION = preprocessing((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def read_detectron2() -> Iterator[Published]:
    """Yield the backbones of detectron2's MODEL_ZOO.md, which has no package; it states the license of all."""
    for file, config, expected in (
        ("MSRA/R-50.pkl", "resnet50_caffe", _MSRA),
        ("MSRA/R-101.pkl", "resnet101_caffe", _MSRA),
        ("FAIR/X-101-32x8d.pkl", "resnext101_32x8d", _FAIR),
        ("torchvision/R-50.pkl", "resnet50", _TORCHVISION),
    ):
        yield Published(
            name=f"detectron2/{file.removesuffix('.pkl')}",
            config=config,
            values={
                "url": f"{DETECTRON2}ImageNetPretrained/{file}",
                "layout": "detectron2",
                "license": "cc-by-sa-3.0",
                **expected,
                "aliases": [f"detectron2://ImageNetPretrained/{file}"],
            },
            preferred=True,
        )


# In the order of precedence of their defaults.
ORIGINS = {
    "torchvision": Origin(("torchvision", "timm"), read_torchvision),
    "mmpretrain": Origin(("mmpretrain", "mmengine"), read_mmpretrain),
    "timm": Origin(("timm", "torchvision"), read_timm),
    "open-mmlab": Origin(("mmengine", "mmdet", "mmsegmentation"), read_open_mmlab),
    "detectron2": Origin((), read_detectron2),
}
