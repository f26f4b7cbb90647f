"""Our backbones cost what timm's models cost and, with the same weights, give what they give, at every level.

To add a model: a row in ROWS, with the function that turns our keys into timm's (``resnet_keys`` fits every ResNet).
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from resbackbone import MODELS
from resbackbone.complexity import build_on_meta, measure
from resbackbone.config import load_config

TOLERANCE = 1e-5  # of the largest number in the feature map


class Row(NamedTuple):
    """One of our configs, timm's name for it, and how our keys read there; ``slow`` leaves it out of a quick run."""

    config: str
    timm: str
    keys: Callable[[str], str]
    slow: bool = False
    options: Mapping[str, object] = {}  # arguments beside the config's
    tolerance: float = TOLERANCE

    @property
    def backbone(self) -> dict[str, object]:
        return {**load_config(self.config).backbone, **self.options}


def rename(rules: Mapping[str, str | Callable[[re.Match[str]], str]]) -> Callable[[str], str]:
    """Make a function that replaces patterns, one after the other, in a key."""

    def keys(key: str) -> str:
        for pattern, replacement in rules.items():
            key = re.sub(pattern, replacement, key)
        return key

    return keys


# timm's deep stem is `conv1` but for its last norm, which is `bn1`; `se` has convolutions without a wrapper.
resnet_keys = rename(
    {
        r"^stem\.7\.": "bn1.",
        r"^stem\.": "conv1.",
        r"\bgn(\d)\.": r"bn\1.",
        r"\.se_layer\.conv(\d)\.conv\.": r".se.fc\1.",
        r"\.eca_layer\.": ".se.",
    }
)


def skresnet_keys(key: str) -> str:
    """As ``resnet_keys``, but each of timm's convolutions holds its norm; ours that select do so already."""
    key = re.sub(r"^(layer\d\.\d+\.)conv(\d)\.weight", r"\1conv\2.conv.weight", resnet_keys(key))
    return re.sub(r"^(layer\d\.\d+\.)bn(\d)\.", r"\1conv\2.bn.", key)


preact_keys = rename(
    {
        r"^conv1\.": "stem.conv.",
        r"^stem\.0\.": "stem.conv1.",
        r"^stem\.1\.": "stem.norm1.",
        r"^stem\.3\.": "stem.conv2.",
        r"^stem\.4\.": "stem.norm2.",
        r"^stem\.6\.": "stem.conv3.",
        r"^(bn|gn)\.": "norm.",
        r"\.(bn|gn)(\d)\.": r".norm\2.",
        r"\.downsample\.\d\.": ".downsample.conv.",
        r"^layer(\d)\.(\d+)\.": lambda match: f"stages.{int(match[1]) - 1}.blocks.{match[2]}.",
    }
)
regnet_keys = rename(
    {
        r"^conv1\.": "stem.conv.",
        r"^bn1\.": "stem.bn.",
        r"^layer(\d)\.(\d+)\.": lambda match: f"s{match[1]}.b{int(match[2]) + 1}.",
        r"\.se_layer\.conv(\d)\.conv\.": r".se.fc\1.",
        r"\.conv([123])\.": r".conv\1.conv.",
        r"\.bn([123])\.": r".conv\1.bn.",
        r"\.downsample\.0\.": ".downsample.conv.",
        r"\.downsample\.1\.": ".downsample.bn.",
    }
)
NORM = {"final_norm": True}  # timm's models have it

ROWS = [
    Row("resnet18", "resnet18", resnet_keys),
    Row("resnet26", "resnet26", resnet_keys),
    Row("resnet34", "resnet34", resnet_keys),
    Row("resnet50", "resnet50", resnet_keys),
    Row("resnet50_gn", "resnet50_gn", resnet_keys),
    Row("resnet101", "resnet101", resnet_keys, slow=True),
    Row("resnet152", "resnet152", resnet_keys, slow=True),
    Row("resnet200", "resnet200", resnet_keys, slow=True),
    Row("resnet50_v1c", "resnet50c", resnet_keys),
    Row("resnet101_v1c", "resnet101c", resnet_keys, slow=True),
    Row("resnet152_v1c", "resnet152c", resnet_keys, slow=True),
    Row("resnet18_v1d", "resnet18d", resnet_keys),
    Row("resnet26_v1d", "resnet26d", resnet_keys),
    Row("resnet34_v1d", "resnet34d", resnet_keys),
    Row("resnet50_v1d", "resnet50d", resnet_keys),
    Row("resnet101_v1d", "resnet101d", resnet_keys, slow=True),
    Row("resnet152_v1d", "resnet152d", resnet_keys, slow=True),
    Row("resnet200_v1d", "resnet200d", resnet_keys, slow=True),
    Row("resnet10t", "resnet10t", resnet_keys),
    Row("resnet14t", "resnet14t", resnet_keys),
    Row("resnet26t", "resnet26t", resnet_keys),
    Row("resnet50t", "resnet50t", resnet_keys),
    Row("resnet50s", "resnet50s", resnet_keys),
    Row("resnet101s", "resnet101s", resnet_keys, slow=True),
    Row("resnet152s", "resnet152s", resnet_keys, slow=True),
    Row("resnext50_32x4d", "resnext50_32x4d", resnet_keys),
    Row("resnext50d_32x4d", "resnext50d_32x4d", resnet_keys),
    Row("resnext101_32x4d", "resnext101_32x4d", resnet_keys, slow=True),
    Row("resnext101_32x8d", "resnext101_32x8d", resnet_keys, slow=True),
    Row("resnext101_32x16d", "resnext101_32x16d", resnet_keys, slow=True),
    Row("resnext101_32x32d", "resnext101_32x32d", resnet_keys, slow=True),
    Row("resnext101_64x4d", "resnext101_64x4d", resnet_keys, slow=True),
    Row("wide_resnet50_2", "wide_resnet50_2", resnet_keys),
    Row("wide_resnet101_2", "wide_resnet101_2", resnet_keys, slow=True),
    Row("res2net50_14w_8s", "res2net50_14w_8s", resnet_keys),
    Row("res2net50_26w_4s", "res2net50_26w_4s", resnet_keys),
    Row("res2net50_26w_6s", "res2net50_26w_6s", resnet_keys, slow=True),
    Row("res2net50_26w_8s", "res2net50_26w_8s", resnet_keys, slow=True),
    Row("res2net50_48w_2s", "res2net50_48w_2s", resnet_keys),
    Row("res2net101_26w_4s", "res2net101_26w_4s", resnet_keys, slow=True),
    Row("res2next50", "res2next50", resnet_keys),
    Row("res2net50_v1b_26w_4s", "res2net50d", resnet_keys),
    Row("res2net101_v1b_26w_4s", "res2net101d", resnet_keys, slow=True),
    Row("resnest14", "resnest14d", resnet_keys),
    Row("resnest26", "resnest26d", resnet_keys),
    Row("resnest50", "resnest50d", resnet_keys),
    Row("resnest50_fast_1s4x24d", "resnest50d_1s4x24d", resnet_keys),
    Row("resnest50_fast_4s2x40d", "resnest50d_4s2x40d", resnet_keys),
    Row("resnest101", "resnest101e", resnet_keys, slow=True),
    Row("resnest200", "resnest200e", resnet_keys, slow=True),
    Row("resnest269", "resnest269e", resnet_keys, slow=True),
    Row("seresnet18", "seresnet18", resnet_keys),
    Row("seresnet34", "seresnet34", resnet_keys),
    Row("seresnet50", "seresnet50", resnet_keys),
    Row("seresnet50t", "seresnet50t", resnet_keys),
    Row("seresnet101", "seresnet101", resnet_keys, slow=True),
    Row("seresnet152", "seresnet152", resnet_keys, slow=True),
    Row("seresnet152d", "seresnet152d", resnet_keys, slow=True),
    Row("seresnet200d", "seresnet200d", resnet_keys, slow=True),
    Row("seresnet269d", "seresnet269d", resnet_keys, slow=True),
    Row("seresnext26d_32x4d", "seresnext26d_32x4d", resnet_keys),
    Row("seresnext26t_32x4d", "seresnext26t_32x4d", resnet_keys),
    Row("seresnext50_32x4d", "seresnext50_32x4d", resnet_keys),
    Row("seresnext101_32x4d", "seresnext101_32x4d", resnet_keys, slow=True),
    Row("seresnext101_32x8d", "seresnext101_32x8d", resnet_keys, slow=True),
    Row("seresnext101_64x4d", "seresnext101_64x4d", resnet_keys, slow=True),
    Row("seresnext101d_32x8d", "seresnext101d_32x8d", resnet_keys, slow=True),
    Row("ecaresnet26t", "ecaresnet26t", resnet_keys),
    Row("ecaresnet50d", "ecaresnet50d", resnet_keys),
    Row("ecaresnet50t", "ecaresnet50t", resnet_keys),
    Row("ecaresnet101d", "ecaresnet101d", resnet_keys, slow=True),
    Row("ecaresnet200d", "ecaresnet200d", resnet_keys, slow=True),
    Row("ecaresnet269d", "ecaresnet269d", resnet_keys, slow=True),
    Row("ecaresnetlight", "ecaresnetlight", resnet_keys),
    Row("ecaresnext26t_32x4d", "ecaresnext26t_32x4d", resnet_keys),
    Row("ecaresnext50t_32x4d", "ecaresnext50t_32x4d", resnet_keys),
    Row("skresnet18", "skresnet18", skresnet_keys),
    Row("skresnet34", "skresnet34", skresnet_keys),
    Row("skresnet50", "skresnet50", skresnet_keys),
    Row("skresnet50d", "skresnet50d", skresnet_keys),
    Row("skresnext50_32x4d", "skresnext50_32x4d", skresnet_keys),
    Row("resnetaa34d", "resnetaa34d", resnet_keys),
    Row("resnetaa50", "resnetaa50", resnet_keys),
    Row("resnetaa50d", "resnetaa50d", resnet_keys),
    Row("resnetaa101d", "resnetaa101d", resnet_keys, slow=True),
    Row("seresnetaa50d", "seresnetaa50d", resnet_keys),
    Row("seresnextaa101d_32x8d", "seresnextaa101d_32x8d", resnet_keys, slow=True),
    Row("seresnextaa201d_32x8d", "seresnextaa201d_32x8d", resnet_keys, slow=True),
    Row("resnetblur18", "resnetblur18", resnet_keys),
    Row("resnetblur50", "resnetblur50", resnet_keys),
    Row("resnetblur50d", "resnetblur50d", resnet_keys),
    Row("resnetblur101d", "resnetblur101d", resnet_keys, slow=True),
    Row("resnetrs50", "resnetrs50", resnet_keys),
    Row("resnetrs101", "resnetrs101", resnet_keys, slow=True),
    Row("resnetrs152", "resnetrs152", resnet_keys, slow=True),
    Row("resnetrs200", "resnetrs200", resnet_keys, slow=True),
    Row("resnetrs270", "resnetrs270", resnet_keys, slow=True),
    Row("resnetrs350", "resnetrs350", resnet_keys, slow=True),
    Row("resnetrs420", "resnetrs420", resnet_keys, slow=True),
    Row("resnetv2_18", "resnetv2_18", preact_keys, options=NORM),
    Row("resnetv2_18d", "resnetv2_18d", preact_keys, options=NORM),
    Row("resnetv2_34", "resnetv2_34", preact_keys, options=NORM, slow=True),
    Row("resnetv2_34d", "resnetv2_34d", preact_keys, options=NORM, slow=True),
    Row("resnetv2_50", "resnetv2_50", preact_keys, options=NORM),
    Row("resnetv2_50d", "resnetv2_50d", preact_keys, options=NORM),
    Row("resnetv2_50d_gn", "resnetv2_50d_gn", preact_keys, options=NORM),
    Row("resnetv2_50t", "resnetv2_50t", preact_keys, options=NORM),
    Row("resnetv2_101", "resnetv2_101", preact_keys, options=NORM, slow=True),
    Row("resnetv2_101d", "resnetv2_101d", preact_keys, options=NORM, slow=True),
    Row("resnetv2_152", "resnetv2_152", preact_keys, options=NORM, slow=True),
    Row("resnetv2_152d", "resnetv2_152d", preact_keys, options=NORM, slow=True),
    Row("resnetv2_50x1_bit", "resnetv2_50x1_bit", preact_keys, options=NORM),
    Row("resnetv2_50x3_bit", "resnetv2_50x3_bit", preact_keys, options=NORM, slow=True),
    Row("resnetv2_101x1_bit", "resnetv2_101x1_bit", preact_keys, options=NORM, slow=True),
    Row("resnetv2_101x3_bit", "resnetv2_101x3_bit", preact_keys, options=NORM, slow=True),
    Row("resnetv2_152x2_bit", "resnetv2_152x2_bit", preact_keys, options=NORM, slow=True),
    Row("resnetv2_152x4_bit", "resnetv2_152x4_bit", preact_keys, options=NORM, slow=True),
    Row("regnetx_200mf", "regnetx_002", regnet_keys, tolerance=0),
    Row("regnetx_400mf", "regnetx_004", regnet_keys, tolerance=0),
    Row("regnetx_400mf_tv", "regnetx_004_tv", regnet_keys, tolerance=0),
    Row("regnetx_600mf", "regnetx_006", regnet_keys, tolerance=0),
    Row("regnetx_800mf", "regnetx_008", regnet_keys, tolerance=0),
    Row("regnetx_1.6gf", "regnetx_016", regnet_keys, tolerance=0),
    Row("regnetx_3.2gf", "regnetx_032", regnet_keys, tolerance=0),
    Row("regnetx_4.0gf", "regnetx_040", regnet_keys, tolerance=0),
    Row("regnetx_6.4gf", "regnetx_064", regnet_keys, slow=True, tolerance=0),
    Row("regnetx_8.0gf", "regnetx_080", regnet_keys, slow=True, tolerance=0),
    Row("regnetx_12gf", "regnetx_120", regnet_keys, slow=True, tolerance=0),
    Row("regnetx_16gf", "regnetx_160", regnet_keys, slow=True, tolerance=0),
    Row("regnetx_32gf", "regnetx_320", regnet_keys, slow=True, tolerance=0),
    Row("regnety_200mf", "regnety_002", regnet_keys),
    Row("regnety_400mf", "regnety_004", regnet_keys),
    Row("regnety_600mf", "regnety_006", regnet_keys),
    Row("regnety_800mf", "regnety_008", regnet_keys),
    Row("regnety_800mf_tv", "regnety_008_tv", regnet_keys),
    Row("regnety_1.6gf", "regnety_016", regnet_keys),
    Row("regnety_3.2gf", "regnety_032", regnet_keys),
    Row("regnety_4.0gf", "regnety_040", regnet_keys),
    Row("regnety_6.4gf", "regnety_064", regnet_keys, slow=True),
    Row("regnety_8.0gf", "regnety_080", regnet_keys, slow=True),
    Row("regnety_8.0gf_tv", "regnety_080_tv", regnet_keys, slow=True),
    Row("regnety_12gf", "regnety_120", regnet_keys, slow=True),
    Row("regnety_16gf", "regnety_160", regnet_keys, slow=True),
    Row("regnety_32gf", "regnety_320", regnet_keys, slow=True),
    Row("regnety_64gf", "regnety_640", regnet_keys, slow=True),
    Row("regnety_128gf", "regnety_1280", regnet_keys, slow=True),
    Row("regnety_256gf", "regnety_2560", regnet_keys, slow=True),
]

# The modules of timm that ROWS covers, and what of theirs is not here.
FAMILY = ("resnet", "res2net", "resnest", "sknet", "regnet", "resnetv2")
ABSENT = {
    "ecaresnet50d_pruned": "each convolution has a width of its own, out of a file",
    "ecaresnet101d_pruned": "each convolution has a width of its own, out of a file",
    "regnetv_040": "pre-activation with SiLU, timm's own",
    "regnetv_064": "pre-activation with SiLU, timm's own",
    "regnety_040_sgn": "SiLU in place of ReLU, timm's own",
    "regnetz_005": "inverted bottlenecks, linear at their end, with SiLU",
    "regnetz_040": "inverted bottlenecks, linear at their end, with SiLU",
    "regnetz_040_h": "inverted bottlenecks, linear at their end, with SiLU",
    "resnetv2_50d_evos": "EvoNorm, which is norm and activation in one",
    "resnetv2_50d_frn": "filter response norm with its own activation",
    "senet154": "3x3 shortcuts and bottlenecks whose first convolution is half as wide",
    "test_resnet": "a mixture of blocks for timm's own tests",
}


def parameters() -> list[object]:
    return [pytest.param(row, id=row.config, marks=[pytest.mark.slow] if row.slow else []) for row in ROWS]


def worst(features: tuple[Tensor, ...], expected: list[Tensor]) -> float:
    """The largest difference of any level, relative to the level's largest number."""
    return max(
        ((feature - reference).abs().max() / reference.abs().max()).item()
        for feature, reference in zip(features, expected, strict=True)
    )


@pytest.fixture
def build_pair(timm, shake):
    """Build our net and timm's, without its classifier, both with our random weights."""

    def build(row: Row) -> tuple[nn.Module, nn.Module]:
        ours = shake(MODELS.build(row.backbone)).eval()
        # On meta there are no weights to draw that are replaced. But the filters of "resnetblur" are in no state dict.
        with torch.device("cpu" if "blur" in row.timm else "meta"):
            theirs = timm.create_model(row.timm, num_classes=0).eval()
        state = {row.keys(key): value for key, value in ours.state_dict().items()}
        theirs.load_state_dict(state, assign=True)
        return ours, theirs

    return build


@pytest.mark.parametrize("row", parameters())
def test_features_are_timms(build_pair, images, row):
    ours, theirs = build_pair(row)
    with torch.no_grad():
        features = ours(images)
        expected = theirs.forward_intermediates(images, indices=len(features), norm=True, intermediates_only=True)
    assert all(reference.std() > 0.01 for reference in expected)  # zeros would agree as well
    assert worst(features, expected) <= row.tolerance


@pytest.mark.parametrize("row", parameters())
def test_costs_are_timms(timm, row):
    macs = []
    with torch.device("meta"):
        theirs = timm.create_model(row.timm).eval()
        for module in theirs.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(lambda layer, _, out: macs.append(out.numel() * layer.weight[0].numel()))
        theirs(torch.empty(1, 3, 224, 224))
    ours = measure(build_on_meta(row.backbone))
    assert ours.params_with_classifier == sum(parameter.numel() for parameter in theirs.parameters())
    assert ours.macs_with_classifier == sum(macs)


def test_every_resnet_of_timm_is_compared_or_excused(timm):
    names = {name for module in FAMILY for name in timm.list_models(module=module)}
    assert {row.timm for row in ROWS} | ABSENT.keys() == names
    assert len(ROWS) + len(ABSENT) == len(names)


def test_a_difference_is_seen(build_pair, images):
    """What mmdet does in Res2Net's layer1 is not what timm does."""
    ours, theirs = build_pair(next(row for row in ROWS if row.config == "res2net50_26w_4s"))
    ours.layer1[0].pool = None
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, indices=4, intermediates_only=True)
        assert worst(ours(images), expected) > 100 * TOLERANCE
