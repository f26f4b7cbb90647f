"""The stem's map as an output: ``out_indices=("stem", ...)`` in every class, and in everything that reads outputs."""

import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from cases import CASES, arguments_of, every_case, make
from command_line import make_picture, run, write_config

from resbackbone import FeatureInfo, ResNet, build_backbone
from resbackbone.analysis.cost import measure
from resbackbone.backbones import DetectoRS_ResNet
from resbackbone.inference import export, optimize, quantize
from resbackbone.necks import FPN
from resbackbone.training import fold_frozen_norms

SMALL = {"type": "ResNet", "depth": 18, "base_channels": 8}


def with_stem(case, **options):
    """A small net with every map that it has as an output."""
    return make(case, out_indices=("stem", *range(3 if case == "TridentResNet" else 4)), **options)


def loss(outs):
    return sum(out.square().mean() for out in outs)


@every_case
@pytest.mark.parametrize("size", [(64, 64), (65, 97)], ids=lambda size: "x".join(map(str, size)))
def test_the_stems_map_comes_first_and_changes_no_other(randomize_norms, case, size):
    net = randomize_norms(with_stem(case)).eval()
    pooled = []
    net.maxpool.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0].clone()))
    images = torch.randn(2, 3, *size)
    stem, *outs = net(images)
    assert torch.equal(stem, pooled[0])  # nothing wrote into it afterwards
    info = net.feature_info[0]
    assert (info.name, info.stage, info.stride) == ("stem", -1, 1 if case == "ResNet_CIFAR" else 2)
    assert stem.shape == (2, info.channels, *(math.ceil(side / info.stride) for side in size))
    assert [info.name for info in net.feature_info[1:]] == net.res_layers
    plain = make(case, out_indices=tuple(range(len(outs)))).eval()
    plain.load_state_dict(net.state_dict())
    assert all(map(torch.equal, outs, plain(images)))


@every_case
@pytest.mark.parametrize("options", [{"with_cp": True}, {"with_cp": "norms"}, {"frozen_stages": 1}], ids=str)
def test_gradients_are_those_without_recomputing_and_freezing_stays(randomize_norms, images, case, options):
    frozen = options.get("frozen_stages", -1)
    nets = [randomize_norms(with_stem(case, frozen_stages=frozen)), with_stem(case, **options)]
    nets[1].load_state_dict(nets[0].state_dict())
    outs = []
    for net in nets:
        outs.append(net.train()(images))
        loss(outs[-1]).backward()
    assert all(map(torch.equal, *outs))
    assert outs[0][0].requires_grad is (frozen < 0)
    for (name, parameter), same in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert (parameter.grad is None) is (same.grad is None) is (not parameter.requires_grad), name
        assert parameter.grad is None or torch.equal(parameter.grad, same.grad), name


@pytest.mark.parametrize(
    ("out_indices", "resolved"),
    [
        (("stem",), ("stem",)),
        (["stem", -1], ("stem", 3)),
        ((-1, "stem", 0), ("stem", 0, 3)),
        ((3, -4, "stem"), ("stem", 0, 3)),
    ],
)
def test_any_order_and_negative_indices(images, out_indices, resolved):
    net = build_backbone(SMALL, out_indices=out_indices)
    assert net.out_indices == resolved
    assert [info.name for info in net.feature_info] == ["stem" if i == "stem" else f"layer{i + 1}" for i in resolved]
    assert [tuple(out.shape[1:2]) for out in net(images)] == [(channels,) for channels in net.out_channels]


@pytest.mark.parametrize(
    ("out_indices", "error", "text"),
    [
        (("stem", "stem"), ValueError, r"must name each stage once, got \('stem', 'stem'\)"),
        ("stem", TypeError, "`out_indices` must be a list or tuple, got 'stem'"),
        (("Stem",), TypeError, "must be an integer, got 'Stem'.* only the stem's map has a name, 'stem'"),
        (("stem", 4), ValueError, r"`out_indices` must be below `num_stages` \(=4\), got \('stem', 4\)"),
        (("stem", -5), ValueError, r"`out_indices\[1\]` must be at least -4, got -5"),
        (("stem", 0.0), TypeError, r"`out_indices\[1\]` must be an integer, got 0.0"),
    ],
)
def test_what_names_no_output_is_refused(out_indices, error, text):
    with pytest.raises(error, match=text):
        build_backbone(SMALL, out_indices=out_indices)


@every_case
def test_it_is_written_to_yaml_and_read_back(tmp_path, case):
    config = {"type": CASES[case][0], **arguments_of(case, out_indices=["stem", -1])}
    path = tmp_path / "net.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    net = build_backbone(path)
    assert [info.name for info in net.feature_info] == ["stem", net.res_layers[-1]]


@pytest.mark.parametrize("case", [case for case in CASES if "DCN" not in case])
@pytest.mark.parametrize("backend", ["onednn", "eager"])
def test_optimized_nets_have_it(randomize_norms, images, case, backend):
    net = randomize_norms(with_stem(case)).eval()
    fast = optimize(net, backend=backend)
    assert fast.feature_info == net.feature_info
    for out, reference in zip(fast(images), net(images), strict=True):
        torch.testing.assert_close(out, reference, rtol=1e-3, atol=1e-3 * reference.abs().max().item())


@pytest.mark.parametrize("case", ["ResNet", "ResNetV1d", "ResNetV2", "RegNet", "ResNetRS"])
def test_quantized_nets_have_it(randomize_norms, images, case):
    net = randomize_norms(with_stem(case)).eval()
    fast = quantize(net, images)
    stem, reference = fast(images)[0], net(images)[0]
    assert stem.shape == reference.shape
    assert (stem - reference).norm() < 0.05 * reference.norm()


@pytest.mark.parametrize("case", [case for case in CASES if "SAC" not in case])
def test_folded_frozen_norms_leave_it_as_it_is(randomize_norms, images, case):
    net = randomize_norms(with_stem(case)).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "folding has no effect")
        folded = fold_frozen_norms(copy.deepcopy(net))
    for out, reference in zip(folded(images), net(images), strict=True):
        torch.testing.assert_close(out, reference, rtol=1e-3, atol=1e-3 * reference.abs().max().item())


def test_an_fpn_takes_it(images):
    net = build_backbone(SMALL, out_indices=("stem", 0, 1, 2, 3))
    fpn = FPN(in_channels=net.out_channels, out_channels=16, num_outs=6)
    assert [level.shape[-1] for level in fpn(net(images))] == [32, 16, 8, 4, 2, 1]


def test_it_is_a_level_of_an_exported_file(randomize_norms, tmp_path):
    net = randomize_norms(build_backbone(SMALL, out_indices=("stem", 0))).eval()
    exported = export(net, tmp_path / "net.pt2", "torch-export")
    assert [(level.name, level.stride) for level in exported.levels] == [("stem", 2), ("layer1", 4)]
    images = torch.randn(2, 3, 64, 96)
    run_file = torch.export.load(tmp_path / "net.pt2").module()
    for out, reference in zip(run_file(images), net(images), strict=True):
        torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-4)


def test_detectors_resnet_returns_it_behind_the_images(randomize_norms, images):
    options = {"depth": 50, "base_channels": 8, "out_indices": ("stem", 0, 3), "rfp_inplanes": 8}
    net = randomize_norms(DetectoRS_ResNet(**options, output_img=True)).eval()
    assert [info.name for info in net.feature_info] == ["image", "stem", "layer1", "layer4"]
    outs = net(images)
    assert outs[0] is images
    assert tuple(out.shape[1] for out in outs) == net.out_channels
    feedback = [torch.zeros(2, 8, side, side) for side in (16, 8, 4, 2)]
    assert torch.equal(net.rfp_forward(images, feedback)[0], outs[1])


@pytest.mark.parametrize(
    ("net", "parts"),
    [
        ({"type": "ResNet"}, [("stem", 8, 2, 112), ("maxpool", 8, 4, 56), ("layer1", 8, 4, 56)]),
        ({"type": "ResNet_CIFAR"}, [("stem", 8, 1, 224), ("layer1", 8, 1, 224)]),
        ({"type": "ResNetRS", "depth": 50}, [("stem", 8, 2, 112), ("maxpool", 8, 4, 56), ("layer1", 32, 4, 56)]),
    ],
)
def test_its_cost_is_counted_apart_from_the_pooling(net, parts):
    config = {**SMALL, **net}
    plain, complexity = (measure(build_backbone(config, out_indices=outs)) for outs in ((0,), ("stem", 0)))
    shapes = [(part.name, part.channels, part.stride, part.height) for part in complexity.parts]
    assert shapes[: len(parts)] == parts
    assert (complexity.params, complexity.macs) == (plain.params, plain.macs)
    before_stages = complexity.parts[: len(parts) - 1]
    assert sum(part.macs for part in before_stages) == plain.parts[0].macs


def test_info_shows_it(folder):
    write_config("stem.yaml", out_indices=("stem", -1))
    rows = [line.split() for line in run("info", "stem.yaml").stdout.splitlines() if line.split()]
    shown = {row[0]: (row[2], row[-1]) for row in rows if row[0] in ("stem", "maxpool", "layer1", "layer4")}
    assert shown == {"stem": ("2", "yes"), "maxpool": ("4", "no"), "layer1": ("4", "no"), "layer4": ("32", "yes")}


@pytest.mark.parametrize(
    ("options", "levels"),
    [((), ["stem", "layer1", "layer4"]), (("--fpn",), ["p1", "p2", "p5", "p6", "p7"])],
    ids=["maps", "fpn"],
)
@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_extract_writes_it(folder, options, levels, backend):
    write_config("stem.yaml", out_indices=("stem", 0, 3))
    make_picture("a.png", size=(96, 64))
    run("extract", "stem.yaml", "a.png", "--out", "out", "--backend", backend, *options)
    assert sorted(path.stem for path in Path("out/a.png").glob("*.npy")) == sorted(levels)
    assert Path("out/a.png/pyramid.png").is_file()


def test_a_subclass_that_builds_another_stem_has_it(images):
    class TwoSteps(ResNet):
        def _make_stem_layer(self, in_channels, stem_channels):
            super()._make_stem_layer(in_channels, stem_channels)
            self.conv1 = torch.nn.Conv2d(in_channels, stem_channels, 4, stride=4)
            self.maxpool = torch.nn.Identity()

    net = TwoSteps(18, base_channels=8, out_indices=("stem", 0))
    assert net.feature_info[0] == FeatureInfo("stem", -1, 8, 4)
    assert [out.shape[-1] for out in net(images)] == [16, 16]
