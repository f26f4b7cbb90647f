"""Our backbones cost what timm's models cost and, with the same weights, give what they give, at every level.

To add a model: a row in ROWS. The keys are turned into timm's as for any user, by ``convert_state_dict``.
"""

from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from resbackbone import MODELS
from resbackbone.analysis.cost import build_on_meta, measure
from resbackbone.checkpoints import convert_state_dict
from resbackbone.config import load_config

TOLERANCE = 1e-5  # of the largest number in the feature map


class Row(NamedTuple):
    """One of our configs, timm's name for it, and the layout of its keys; ``slow`` leaves it out of a quick run."""

    config: str
    timm: str
    layout: str = "timm"
    slow: bool = False
    options: Mapping[str, object] = {}  # arguments beside the config's
    tolerance: float = TOLERANCE

    @property
    def backbone(self) -> dict[str, object]:
        return {**load_config(self.config).backbone, **self.options}


NORM = {"final_norm": True}  # timm's models have it

ROWS = [
    Row("resnet18", "resnet18"),
    Row("resnet26", "resnet26"),
    Row("resnet34", "resnet34"),
    Row("resnet50", "resnet50"),
    Row("resnet50_gn", "resnet50_gn"),
    Row("resnet101", "resnet101", slow=True),
    Row("resnet152", "resnet152", slow=True),
    Row("resnet200", "resnet200", slow=True),
    Row("resnet50_v1c", "resnet50c"),
    Row("resnet101_v1c", "resnet101c", slow=True),
    Row("resnet152_v1c", "resnet152c", slow=True),
    Row("resnet18_v1d", "resnet18d"),
    Row("resnet26_v1d", "resnet26d"),
    Row("resnet34_v1d", "resnet34d"),
    Row("resnet50_v1d", "resnet50d"),
    Row("resnet101_v1d", "resnet101d", slow=True),
    Row("resnet152_v1d", "resnet152d", slow=True),
    Row("resnet200_v1d", "resnet200d", slow=True),
    Row("resnet10t", "resnet10t"),
    Row("resnet14t", "resnet14t"),
    Row("resnet26t", "resnet26t"),
    Row("resnet50t", "resnet50t"),
    Row("resnet50s", "resnet50s"),
    Row("resnet101s", "resnet101s", slow=True),
    Row("resnet152s", "resnet152s", slow=True),
    Row("resnext50_32x4d", "resnext50_32x4d"),
    Row("resnext50d_32x4d", "resnext50d_32x4d"),
    Row("resnext101_32x4d", "resnext101_32x4d", slow=True),
    Row("resnext101_32x8d", "resnext101_32x8d", slow=True),
    Row("resnext101_32x16d", "resnext101_32x16d", slow=True),
    Row("resnext101_32x32d", "resnext101_32x32d", slow=True),
    Row("resnext101_64x4d", "resnext101_64x4d", slow=True),
    Row("wide_resnet50_2", "wide_resnet50_2"),
    Row("wide_resnet101_2", "wide_resnet101_2", slow=True),
    Row("res2net50_14w_8s", "res2net50_14w_8s"),
    Row("res2net50_26w_4s", "res2net50_26w_4s"),
    Row("res2net50_26w_6s", "res2net50_26w_6s", slow=True),
    Row("res2net50_26w_8s", "res2net50_26w_8s", slow=True),
    Row("res2net50_48w_2s", "res2net50_48w_2s"),
    Row("res2net101_26w_4s", "res2net101_26w_4s", slow=True),
    Row("res2next50", "res2next50"),
    Row("res2net50_v1b_26w_4s", "res2net50d"),
    Row("res2net101_v1b_26w_4s", "res2net101d", slow=True),
    Row("resnest14", "resnest14d"),
    Row("resnest26", "resnest26d"),
    Row("resnest50", "resnest50d"),
    Row("resnest50_fast_1s4x24d", "resnest50d_1s4x24d"),
    Row("resnest50_fast_4s2x40d", "resnest50d_4s2x40d"),
    Row("resnest101", "resnest101e", slow=True),
    Row("resnest200", "resnest200e", slow=True),
    Row("resnest269", "resnest269e", slow=True),
    Row("seresnet18", "seresnet18"),
    Row("seresnet34", "seresnet34"),
    Row("seresnet50", "seresnet50"),
    Row("seresnet50t", "seresnet50t"),
    Row("seresnet101", "seresnet101", slow=True),
    Row("seresnet152", "seresnet152", slow=True),
    Row("seresnet152d", "seresnet152d", slow=True),
    Row("seresnet200d", "seresnet200d", slow=True),
    Row("seresnet269d", "seresnet269d", slow=True),
    Row("seresnext26d_32x4d", "seresnext26d_32x4d"),
    Row("seresnext26t_32x4d", "seresnext26t_32x4d"),
    Row("seresnext50_32x4d", "seresnext50_32x4d"),
    Row("seresnext101_32x4d", "seresnext101_32x4d", slow=True),
    Row("seresnext101_32x8d", "seresnext101_32x8d", slow=True),
    Row("seresnext101_64x4d", "seresnext101_64x4d", slow=True),
    Row("seresnext101d_32x8d", "seresnext101d_32x8d", slow=True),
    Row("ecaresnet26t", "ecaresnet26t"),
    Row("ecaresnet50d", "ecaresnet50d"),
    Row("ecaresnet50t", "ecaresnet50t"),
    Row("ecaresnet101d", "ecaresnet101d", slow=True),
    Row("ecaresnet200d", "ecaresnet200d", slow=True),
    Row("ecaresnet269d", "ecaresnet269d", slow=True),
    Row("ecaresnetlight", "ecaresnetlight"),
    Row("ecaresnext26t_32x4d", "ecaresnext26t_32x4d"),
    Row("ecaresnext50t_32x4d", "ecaresnext50t_32x4d"),
    Row("skresnet18", "skresnet18"),
    Row("skresnet34", "skresnet34"),
    Row("skresnet50", "skresnet50"),
    Row("skresnet50d", "skresnet50d"),
    Row("skresnext50_32x4d", "skresnext50_32x4d"),
    Row("resnetaa34d", "resnetaa34d"),
    Row("resnetaa50", "resnetaa50"),
    Row("resnetaa50d", "resnetaa50d"),
    Row("resnetaa101d", "resnetaa101d", slow=True),
    Row("seresnetaa50d", "seresnetaa50d"),
    Row("seresnextaa101d_32x8d", "seresnextaa101d_32x8d", slow=True),
    Row("seresnextaa201d_32x8d", "seresnextaa201d_32x8d", slow=True),
    Row("resnetblur18", "resnetblur18"),
    Row("resnetblur50", "resnetblur50"),
    Row("resnetblur50d", "resnetblur50d"),
    Row("resnetblur101d", "resnetblur101d", slow=True),
    Row("resnetrs50", "resnetrs50"),
    Row("resnetrs101", "resnetrs101", slow=True),
    Row("resnetrs152", "resnetrs152", slow=True),
    Row("resnetrs200", "resnetrs200", slow=True),
    Row("resnetrs270", "resnetrs270", slow=True),
    Row("resnetrs350", "resnetrs350", slow=True),
    Row("resnetrs420", "resnetrs420", slow=True),
    Row("resnetv2_18", "resnetv2_18", layout="timm-resnetv2", options=NORM),
    Row("resnetv2_18d", "resnetv2_18d", layout="timm-resnetv2", options=NORM),
    Row("resnetv2_34", "resnetv2_34", layout="timm-resnetv2", options=NORM, slow=True),
    Row("resnetv2_34d", "resnetv2_34d", layout="timm-resnetv2", options=NORM, slow=True),
    Row("resnetv2_50", "resnetv2_50", layout="timm-resnetv2", options=NORM),
    Row("resnetv2_50d", "resnetv2_50d", layout="timm-resnetv2", options=NORM),
    Row("resnetv2_50d_gn", "resnetv2_50d_gn", layout="timm-resnetv2", options=NORM),
    Row("resnetv2_50t", "resnetv2_50t", layout="timm-resnetv2", options=NORM),
    Row("resnetv2_101", "resnetv2_101", layout="timm-resnetv2", options=NORM, slow=True),
    Row("resnetv2_101d", "resnetv2_101d", layout="timm-resnetv2", options=NORM, slow=True),
    Row("resnetv2_152", "resnetv2_152", layout="timm-resnetv2", options=NORM, slow=True),
    Row("resnetv2_152d", "resnetv2_152d", layout="timm-resnetv2", options=NORM, slow=True),
    Row("resnetv2_50x1_bit", "resnetv2_50x1_bit", layout="timm-resnetv2", options=NORM),
    Row("resnetv2_50x3_bit", "resnetv2_50x3_bit", layout="timm-resnetv2", options=NORM, slow=True),
    Row("resnetv2_101x1_bit", "resnetv2_101x1_bit", layout="timm-resnetv2", options=NORM, slow=True),
    Row("resnetv2_101x3_bit", "resnetv2_101x3_bit", layout="timm-resnetv2", options=NORM, slow=True),
    Row("resnetv2_152x2_bit", "resnetv2_152x2_bit", layout="timm-resnetv2", options=NORM, slow=True),
    Row("resnetv2_152x4_bit", "resnetv2_152x4_bit", layout="timm-resnetv2", options=NORM, slow=True),
    Row("regnetx_200mf", "regnetx_002", layout="timm-regnet", tolerance=0),
    Row("regnetx_400mf", "regnetx_004", layout="timm-regnet", tolerance=0),
    Row("regnetx_400mf_tv", "regnetx_004_tv", layout="timm-regnet", tolerance=0),
    Row("regnetx_600mf", "regnetx_006", layout="timm-regnet", tolerance=0),
    Row("regnetx_800mf", "regnetx_008", layout="timm-regnet", tolerance=0),
    Row("regnetx_1.6gf", "regnetx_016", layout="timm-regnet", tolerance=0),
    Row("regnetx_3.2gf", "regnetx_032", layout="timm-regnet", tolerance=0),
    Row("regnetx_4.0gf", "regnetx_040", layout="timm-regnet", tolerance=0),
    Row("regnetx_6.4gf", "regnetx_064", layout="timm-regnet", slow=True, tolerance=0),
    Row("regnetx_8.0gf", "regnetx_080", layout="timm-regnet", slow=True, tolerance=0),
    Row("regnetx_12gf", "regnetx_120", layout="timm-regnet", slow=True, tolerance=0),
    Row("regnetx_16gf", "regnetx_160", layout="timm-regnet", slow=True, tolerance=0),
    Row("regnetx_32gf", "regnetx_320", layout="timm-regnet", slow=True, tolerance=0),
    Row("regnety_200mf", "regnety_002", layout="timm-regnet"),
    Row("regnety_400mf", "regnety_004", layout="timm-regnet"),
    Row("regnety_600mf", "regnety_006", layout="timm-regnet"),
    Row("regnety_800mf", "regnety_008", layout="timm-regnet"),
    Row("regnety_800mf_tv", "regnety_008_tv", layout="timm-regnet"),
    Row("regnety_1.6gf", "regnety_016", layout="timm-regnet"),
    Row("regnety_3.2gf", "regnety_032", layout="timm-regnet"),
    Row("regnety_4.0gf", "regnety_040", layout="timm-regnet"),
    Row("regnety_6.4gf", "regnety_064", layout="timm-regnet", slow=True),
    Row("regnety_8.0gf", "regnety_080", layout="timm-regnet", slow=True),
    Row("regnety_8.0gf_tv", "regnety_080_tv", layout="timm-regnet", slow=True),
    Row("regnety_12gf", "regnety_120", layout="timm-regnet", slow=True),
    Row("regnety_16gf", "regnety_160", layout="timm-regnet", slow=True),
    Row("regnety_32gf", "regnety_320", layout="timm-regnet", slow=True),
    Row("regnety_64gf", "regnety_640", layout="timm-regnet", slow=True),
    Row("regnety_128gf", "regnety_1280", layout="timm-regnet", slow=True),
    Row("regnety_256gf", "regnety_2560", layout="timm-regnet", slow=True),
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


# timm's `output_stride` in our arguments: docs/differences.md.
OUTPUT_STRIDES = {
    8: {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)},
    16: {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)},
}


def at_output_stride(row: Row, output_stride: int) -> Row:
    """The row with a smaller output stride."""
    options = {**OUTPUT_STRIDES[output_stride], "contract_dilation": True, "dilation_style": "timm"}
    if row.config.startswith("regnet"):  # whose stem does not pool, and whose first stage strides
        options["strides"] = (2, *options["strides"][1:])
    return row._replace(options={**row.options, **options})


def parameters() -> list[object]:
    return [pytest.param(row, id=row.config, marks=[pytest.mark.slow] if row.slow else []) for row in ROWS]


def worst(features: tuple[Tensor, ...], expected: list[Tensor]) -> float:
    """The largest difference of any level, relative to the level's largest number."""
    return max(
        ((feature - reference).abs().max() / reference.abs().max()).item()
        for feature, reference in zip(features, expected, strict=True)
    )


@pytest.fixture
def build_pair(timm, randomize_norms):
    """Build our net and timm's, without its classifier, both with our random weights."""

    def build(row: Row, **options: object) -> tuple[nn.Module, nn.Module]:
        ours = randomize_norms(MODELS.build({**row.backbone, "out_indices": ("stem", 0, 1, 2, 3)})).eval()
        # On meta there are no weights to draw that are replaced. But the filters of "resnetblur" are in no state dict.
        with torch.device("cpu" if "blur" in row.timm else "meta"):
            theirs = timm.create_model(row.timm, num_classes=0, **options).eval()
        theirs.load_state_dict(convert_state_dict(ours.state_dict(), "native", row.layout), assign=True)
        return ours, theirs

    return build


@pytest.mark.parametrize("row", parameters())
def test_features_are_timms_and_r11_the_stems_too(build_pair, images, row):
    ours, theirs = build_pair(row)
    stem: list[Tensor] = []  # what timm returns first with `features_only`
    level = theirs.feature_info[0]
    theirs.get_submodule(level["module"]).register_forward_hook(lambda _, __, out: stem.append(out.clone()))
    with torch.no_grad():
        features = ours(images)
        expected = theirs.forward_intermediates(images, indices=4, norm=True, intermediates_only=True)
    expected = [*stem, *expected]
    assert (ours.out_channels[0], ours.out_strides[0]) == (level["num_chs"], level["reduction"])
    assert all(reference.std() > 0.01 for reference in expected)  # zeros would agree as well
    assert worst(features, expected) <= row.tolerance


@pytest.mark.parametrize("output_stride", OUTPUT_STRIDES)
@pytest.mark.parametrize("row", parameters())
def test_features_at_an_output_stride_are_timms(build_pair, images, row, output_stride):
    ours, theirs = build_pair(at_output_stride(row, output_stride), output_stride=output_stride)
    assert ours.out_strides[-1] == output_stride
    with torch.no_grad():
        features = ours(images)[1:]  # behind the stem's
        expected = theirs.forward_intermediates(images, indices=len(features), norm=True, intermediates_only=True)
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
        assert worst(ours(images)[1:], expected) > 100 * TOLERANCE
