"""Parameters and multiply-accumulates equal the published figures, and counting them leaves no trace."""

import pytest
import record_costs
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resbackbone import build_backbone
from resbackbone.analysis.cost import build_on_meta, measure
from resbackbone.config import config_files, config_folder, recorded_costs
from resbackbone.layers import DeformConv2d

# With a classifier of 1000 classes, one image of 224x224: parameters as torchvision and timm publish them,
# multiply-accumulates of convolutions and linear layers, which rounded are torchvision's.
PUBLISHED = {
    "resnet18": (11_689_512, 1_814_073_344),
    "resnet34": (21_797_672, 3_663_761_408),
    "resnet50": (25_557_032, 4_089_184_256),
    "resnet101": (44_549_160, 7_801_405_440),
    "resnet152": (60_192_808, 11_513_626_624),
    "resnext50_32x4d": (25_028_904, 4_230_479_872),
    "resnext101_32x4d": (44_177_704, 7_969_996_800),
    "resnext101_32x8d": (88_791_336, 16_414_015_488),
    "resnext101_64x4d": (83_455_272, 15_460_270_080),
    "wide_resnet50_2": (68_883_240, 11_398_021_120),
    "wide_resnet101_2": (126_886_696, 22_753_050_624),
    "resnet18_v1d": (11_708_744, 2_053_713_920),
    "resnet34_v1d": (21_816_904, 3_903_401_984),
    "resnet50_v1c": (25_576_264, 4_328_824_832),
    "resnet50_v1d": (25_576_264, 4_328_824_832),
    "resnet101_v1c": (44_568_392, 8_041_046_016),
    "resnet101_v1d": (44_568_392, 8_041_046_016),
    "resnet152_v1d": (60_212_040, 11_753_267_200),
    "seresnet18": (11_779_624, 1_814_161_408),
    "seresnet50": (28_088_024, 4_091_699_200),
    "seresnet101": (49_326_872, 7_806_148_608),
    "seresnext50_32x4d": (27_559_896, 4_232_994_816),
    "seresnext101_32x4d": (48_955_416, 7_974_739_968),
    "res2net50_26w_4s": (25_699_120, 4_255_166_464),
    "res2net50_v1b_26w_4s": (25_718_352, 4_494_807_040),
    "res2net101_26w_4s": (45_206_688, 8_066_974_464),
    "resnest50": (27_483_240, 5_371_160_576),
    "resnest101": (48_275_016, 10_200_565_760),
    "regnetx_400mf": (5_157_512, 397_677_568),
    "regnetx_800mf": (7_259_656, 799_699_712),
    "regnetx_1.6gf": (9_190_136, 1_602_849_792),
    "regnetx_3.2gf": (15_296_552, 3_176_621_952),
    "regnetx_4.0gf": (22_118_248, 3_964_498_816),
    "regnetx_6.4gf": (26_209_256, 6_460_291_264),
    "regnetx_8.0gf": (39_572_648, 7_995_132_416),
    "regnetx_12gf": (46_106_056, 12_086_678_016),
}
SMALL = {"type": "ResNet", "depth": 18, "base_channels": 8}
ONE_PER_FAMILY = {path.parent.name: name for name, path in config_files().items()}.values()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    complexity = measure(build_on_meta(name))
    assert (complexity.params_with_classifier, complexity.macs_with_classifier) == PUBLISHED[name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ONE_PER_FAMILY else pytest.mark.slow) for name in config_files()]
)
def test_the_recorded_costs_of_a_config_are_what_is_counted(name):
    assert recorded_costs()[name] == record_costs.count(name), "run `python tools/record_costs.py`"


def test_the_recorded_costs_are_as_the_tool_writes_them():
    text = (config_folder() / "costs.yaml").read_text(encoding="utf-8")
    assert text == record_costs.dump(recorded_costs()), "run `python tools/record_costs.py`"
    assert set(recorded_costs()) == set(config_files())


def test_costs_are_recorded_and_checked(tmp_path, monkeypatch):
    resnet18 = "resnet18: {params: 11689512, macs: 1814073344}\n"
    path = tmp_path / "costs.yaml"
    path.write_text(record_costs.HEADER + resnet18.replace("5", "6"))
    monkeypatch.setattr(record_costs, "config_folder", lambda: tmp_path)
    monkeypatch.setattr(record_costs, "config_files", lambda: {"resnet18": config_files()["resnet18"]})
    with pytest.raises(SystemExit, match=r"costs.yaml is out of date; run `python tools/record_costs.py`"):
        record_costs.main(check=True)
    assert path.read_text() == record_costs.HEADER + resnet18.replace("5", "6")
    record_costs.main()
    assert path.read_text() == record_costs.HEADER + resnet18
    record_costs.main(check=True)


def test_parts_are_the_stem_and_every_stage():
    complexity = measure(build_on_meta(dict(SMALL, out_indices=(1,), dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1))))
    shapes = [(part.name, part.channels, part.stride, part.height, part.width) for part in complexity.parts]
    assert shapes == [
        ("stem", 8, 4, 56, 56),
        ("layer1", 8, 4, 56, 56),
        ("layer2", 16, 8, 28, 28),
        ("layer3", 32, 16, 14, 14),
        ("layer4", 64, 16, 14, 14),
    ]
    stem, layer1 = complexity.parts[:2]
    assert (stem.params, stem.macs) == (3 * 8 * 49 + 2 * 8, 112 * 112 * 3 * 8 * 49)
    assert (layer1.params, layer1.macs) == (4 * (8 * 8 * 9 + 2 * 8), 4 * 56 * 56 * 8 * 8 * 9)
    assert complexity.params == sum(part.params for part in complexity.parts)
    assert complexity.params_with_classifier - complexity.params == 64 * 1000 + 1000
    assert complexity.macs_with_classifier - complexity.macs == 64 * 1000


def test_height_and_width():
    parts = measure(build_on_meta(SMALL), size=(64, 97)).parts
    assert [(part.height, part.width) for part in parts] == [(16, 25), (16, 25), (8, 13), (4, 7), (2, 4)]
    assert measure(build_on_meta(SMALL), size=64) == measure(build_on_meta(SMALL), size=(64, 64))


@pytest.mark.parametrize(("type_", "numbers_per_point"), [("DCN", 2), ("DCNv2", 3)])
def test_deformable_convolutions_count_with_their_offsets(type_, numbers_per_point):
    plain = measure(build_on_meta(SMALL), size=64).parts[-1]
    deformable = dict(SMALL, dcn={"type": type_}, stage_with_dcn=(False, False, False, True))
    with_dcn = measure(build_on_meta(deformable), size=64).parts[-1]
    kernel, blocks, positions = 64 * 9, 2, 2 * 2
    assert with_dcn.macs - plain.macs == blocks * positions * kernel * 9 * numbers_per_point


def test_grouped_convolutions_count_once_per_group():
    grouped = build_on_meta({"type": "ResNeXt", "depth": 50, "groups": 32, "base_width": 4}).layer1[1].conv2
    assert grouped.weight.shape == (128, 4, 3, 3)
    configs = [{"type": "ResNeXt", "depth": 50, "groups": groups, "base_width": 128 // groups} for groups in (32, 16)]
    macs32, macs16 = (measure(build_on_meta(config)).parts[1].macs for config in configs)
    assert macs16 - macs32 == 3 * 56 * 56 * 128 * 4 * 9


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dict(SMALL, deep_stem=True, avg_down=True, plugins=[{"cfg": {"type": "SELayer"}, "position": "after_conv2"}]),
        {"type": "DetectoRS_ResNet", "depth": 50, "sac": {"type": "SAC"}, "stage_with_sac": (False, True, True, True)},
    ],
    ids=["plain", "se", "sac"],
)
def test_torch_counts_the_same(config):
    net = build_on_meta(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, 96, 64, device="meta"))
    assert 2 * measure(net, size=(96, 64)).macs == counter.get_total_flops()


def test_the_net_stays_as_it_is():
    config = dict(SMALL, dcn={"type": "DCN"}, stage_with_dcn=(True,) * 4)
    net = build_backbone(config, out_indices=(2,), norm_eval=False)
    for module in net.modules():
        if isinstance(module, DeformConv2d):
            module.backend = "mmcv"  # could not run without memory; nor here, perhaps
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    hooks = [len(module._forward_hooks) for module in net.modules()]
    assert measure(net, size=64) == measure(build_on_meta(config), size=64)
    assert net.out_indices == (2,)
    assert [module.training for module in net.modules()] == modes
    assert [len(module._forward_hooks) for module in net.modules()] == hooks
    assert {module.backend for module in net.modules() if isinstance(module, DeformConv2d)} == {"mmcv"}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_meta_nets_hold_no_numbers_and_fetch_none():
    net = build_on_meta(dict(SMALL, init_cfg={"type": "Pretrained", "checkpoint": "nowhere.pth"}))
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"meta"}
    assert measure(net).params > 0


def test_meta_nets_are_checked_like_others():
    with pytest.raises(TypeError, match="did you mean 'frozen_stages'"):
        build_on_meta(dict(SMALL, frozen_stage=1))


@pytest.mark.parametrize("size", [0, -1, True, 1.5, (224,), (224, 0), "224"])
def test_wrong_sizes_are_refused(size):
    with pytest.raises((TypeError, ValueError), match="`size"):
        measure(build_on_meta(SMALL), size=size)


def test_only_backbones_are_measured():
    with pytest.raises(TypeError, match="`net` must be a backbone of resbackbone, got"):
        measure(nn.Conv2d(3, 8, 1))
