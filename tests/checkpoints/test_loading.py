"""Loading checkpoints of the real libraries: equal features at every level. What does not fit is refused."""

import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from faulty_server import serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from resbackbone import ResNet, SharedHead, build_backbone
from resbackbone.checkpoints import convert_state_dict, find_weights, load_checkpoint
from resbackbone.checkpoints.saving import save_weights
from resbackbone.cli import app
from resbackbone.data.preprocessing import CAFFE, DETECTRON, TORCHVISION, Preprocessing, preprocessing_of

SAME = {"rtol": 0, "atol": 0}


def levels_of(model, names, images):
    """Return the outputs of the children with those names, in eval mode."""
    outs = []
    handles = [model.get_submodule(name).register_forward_hook(lambda *args: outs.append(args[-1])) for name in names]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return outs


def assert_features(net, expected, images, **tolerance):
    with torch.no_grad():
        features = net.eval()(images)
    assert len(features) == len(expected) == 4
    for feature, reference in zip(features, expected, strict=True):
        assert reference.std() > 0
        torch.testing.assert_close(feature, reference, **(tolerance or SAME))


STAGES = ("layer1", "layer2", "layer3", "layer4")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvision(torchvision, randomize_norms, images, tmp_path, name):
    model = randomize_norms(torchvision.models.get_model(name))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    net = build_backbone(name)
    report = load_checkpoint(net, tmp_path / "model.pth")
    assert_features(net, levels_of(model, STAGES, images), images)
    assert (report.layout, report.ignored, report.missing) == ("native", ("fc.weight", "fc.bias"), ())
    assert set(report.loaded) == set(net.state_dict())
    assert net.preprocessing == TORCHVISION


@pytest.mark.parametrize(
    ("config", "name", "layout"),
    [
        ("resnet18_v1d", "resnet18d", "timm"),
        ("skresnet18", "skresnet18", "timm"),
        ("resnest14", "resnest14d", "timm"),
        ("regnety_400mf", "regnety_004", "timm-regnet"),
    ],
)
def test_timm(timm, randomize_norms, images, tmp_path, config, name, layout):
    model = randomize_norms(timm.create_model(name)).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    net = build_backbone(config)
    assert load_checkpoint(net, tmp_path / "model.safetensors").layout == layout
    with torch.no_grad():
        expected = model.forward_intermediates(images, indices=4, intermediates_only=True)
    assert_features(net, expected, images, rtol=1e-5, atol=1e-5)


def test_timms_old_names(timm, randomize_norms, images, tmp_path):
    """Its first SE-ResNet has Caffe's strides and another padding of the pool; so only the stages are compared."""
    model = randomize_norms(timm.create_model("legacy_seresnet50"))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    net = build_backbone("seresnet50", style="caffe").eval()
    load_checkpoint(net, tmp_path / "model.pth")
    x, *expected = levels_of(model, ("pool0", *STAGES), images)
    for stage, reference in zip(STAGES, expected, strict=True):
        x = net.get_submodule(stage)(x)
        torch.testing.assert_close(x, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ("resnet50", {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck"}),
        ("resnet18", {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}),
    ],
)
def test_hugging_face(randomize_norms, images, tmp_path, config, sizes):
    transformers = pytest.importorskip("transformers")
    model = randomize_norms(transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))).eval()
    model.save_pretrained(tmp_path, max_shard_size="20MB")  # the index and several files
    source = next(iter([*tmp_path.glob("*.index.json"), tmp_path / "model.safetensors"]))
    net = build_backbone(config)
    assert load_checkpoint(net, source).layout == "huggingface"
    with torch.no_grad():
        expected = model.resnet(images, output_hidden_states=True).hidden_states[1:]
    assert_features(net, expected, images)


def test_rt_detr(randomize_norms, images, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck"}
    config = transformers.RTDetrResNetConfig(**sizes, out_features=["stage1", "stage2", "stage3", "stage4"])
    model = randomize_norms(transformers.RTDetrResNetBackbone(config)).eval()
    torch.save({f"model.backbone.model.{key}": value for key, value in model.state_dict().items()}, tmp_path / "m.pth")
    net = build_backbone("resnet50_v1d")
    load_checkpoint(net, tmp_path / "m.pth")
    with torch.no_grad():
        assert_features(net, model(images).feature_maps, images)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("kind", ["sequential", "getter", "extractor"])
def test_a_torchvision_net_as_sequential(torchvision, randomize_norms, images, tmp_path, name, kind):
    model = randomize_norms(torchvision.models.get_model(name)).eval()
    expected = levels_of(model, STAGES, images)
    if kind == "sequential":
        weights = torch.nn.Sequential(torch.nn.Sequential(*list(model.children())[:-2]), torch.nn.Linear(1, 1))
    elif kind == "getter":
        from torchvision.models._utils import IntermediateLayerGetter

        weights = IntermediateLayerGetter(model, {stage: stage for stage in STAGES})
    else:
        from torchvision.models.feature_extraction import create_feature_extractor

        weights = create_feature_extractor(model, list(STAGES))
    torch.save({"model": weights.state_dict()}, tmp_path / "model.pth")
    net = build_backbone(name)
    load_checkpoint(net, tmp_path / "model.pth")
    assert_features(net, expected, images)


@pytest.mark.parametrize(("config", "name"), [("resnetv2_18", "resnetv2_18"), ("resnetv2_50d", "resnetv2_50d")])
def test_timms_pre_activation_nets_with_features_only(timm, randomize_norms, images, tmp_path, config, name):
    model = randomize_norms(timm.create_model(name, features_only=True)).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    net = build_backbone(config)
    assert load_checkpoint(net, tmp_path / "model.safetensors").layout == "timm-resnetv2"
    with torch.no_grad():
        assert_features(net, model(images)[1:], images, rtol=1e-5, atol=1e-5)


def test_big_transfers_own_file(timm, randomize_norms, images, tmp_path):
    """Timm's own reader of such files builds the same net."""
    model = randomize_norms(timm.create_model("resnetv2_50x1_bit", num_classes=10)).eval()
    weights = convert_state_dict(model.state_dict(), "timm-resnetv2", "bit")
    save_weights(weights, tmp_path / "BiT-M-R50x1.npz")
    theirs = timm.create_model("resnetv2_50x1_bit", num_classes=10).eval()
    theirs.load_pretrained(str(tmp_path / "BiT-M-R50x1.npz"))
    assert all(
        torch.equal(*pair) for pair in zip(theirs.state_dict().values(), model.state_dict().values(), strict=True)
    )
    net = build_backbone("resnetv2_50x1_bit", final_norm=True)
    report = load_checkpoint(net, tmp_path / "BiT-M-R50x1.npz")
    assert (report.layout, report.ignored) == ("bit", ("fc.weight", "fc.bias"))
    assert net.preprocessing == Preprocessing(mean=(127.5,) * 3, std=(127.5,) * 3)
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, indices=4, norm=True, intermediates_only=True)
    assert_features(net, expected, images, rtol=1e-5, atol=1e-5)


def test_hugging_faces_bit(torchvision, randomize_norms, images, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = randomize_norms(transformers.BitModel(transformers.BitConfig())).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    net = build_backbone("resnetv2_50")
    with pytest.raises(ValueError, match="does not fit ResNetV2"):  # batch norms are no group norms
        load_checkpoint(net, tmp_path / "model.pth")
    net = build_backbone("resnetv2_50x1_bit")
    assert load_checkpoint(net, tmp_path / "model.pth").layout == "huggingface"
    with torch.no_grad():
        expected = model(images, output_hidden_states=True).hidden_states[1:]
    assert_features(net, expected, images)


# Libraries that cannot be installed here: files in their documented layout, of one of our nets.


@pytest.fixture
def source(randomize_norms):
    torch.manual_seed(1)
    return randomize_norms(ResNet(50, base_channels=8)).eval()


def numpy_of(tensors):
    return {key: tensor.numpy() for key, tensor in tensors.items()}


def save_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("layout", ["detectron2", "paddle", "mmpretrain"])
def test_a_pickle_of_arrays(source, images, tmp_path, layout):
    weights = numpy_of(convert_state_dict(source.state_dict(), "native", layout))
    if layout == "detectron2":
        weights = {"model": weights, "__author__": "somebody", "matching_heuristics": True}
    save_pickle(weights, tmp_path / "model.pkl")
    net = ResNet(50, base_channels=8)
    report = load_checkpoint(net, tmp_path / "model.pkl")
    assert report.layout == ("native" if layout == "mmpretrain" else layout)  # a plain net has the same names there
    assert_features(net, source(images), images)
    assert net.preprocessing == (CAFFE if layout == "detectron2" else TORCHVISION)


@pytest.mark.parametrize("layout", ["pycls", "torchvision-regnet", "timm-regnet"])
def test_regnets(randomize_norms, images, tmp_path, layout):
    source = randomize_norms(build_backbone("regnety_400mf")).eval()
    weights = convert_state_dict(source.state_dict(), "native", layout)
    torch.save({"model_state": weights, "epoch": 99}, tmp_path / "m.pyth")
    net = build_backbone("regnety_400mf")
    assert load_checkpoint(net, tmp_path / "m.pyth").layout == layout
    assert_features(net, source(images), images)


def test_torchvisions_regnet(torchvision, randomize_norms, images, tmp_path):
    model = randomize_norms(torchvision.models.get_model("regnet_x_400mf"))
    torch.save(model.state_dict(), tmp_path / "m.pth")
    net = build_backbone("regnetx_400mf_tv")
    load_checkpoint(net, tmp_path / "m.pth")
    assert_features(net, levels_of(model, [f"trunk_output.block{stage}" for stage in (1, 2, 3, 4)], images), images)


def test_caffe2(source, images, tmp_path):
    """Frozen norms without statistics have the same outputs."""
    blobs = numpy_of(convert_state_dict(source.state_dict(), "native", "caffe2"))
    blobs |= {f"{key}_momentum": value for key, value in blobs.items()} | {"lr": np.float32(0.1)}
    save_pickle({"blobs": blobs, "cfg": "text"}, tmp_path / "R-50.pkl")
    net = ResNet(50, base_channels=8, style="caffe")
    report = load_checkpoint(net, tmp_path / "R-50.pkl")
    assert (report.layout, report.unexpected) == ("caffe2", ())
    pytorch = ResNet(50, base_channels=8)
    load_checkpoint(pytorch, tmp_path / "R-50.pkl")
    assert_features(pytorch, source(images), images, rtol=1e-5, atol=1e-5)
    assert net.preprocessing == DETECTRON


def test_weights_of_caffe_on_torchvisions_images(source, tmp_path):
    """Order and std are folded into the first convolution; features differ by rounding."""
    weights = convert_state_dict(source.state_dict(), "native", "detectron2")
    save_pickle({"model": numpy_of(weights)}, tmp_path / "m.pkl")
    as_it_is, converted = (ResNet(50, base_channels=8) for _ in range(2))
    load_checkpoint(as_it_is, tmp_path / "m.pkl")
    report = load_checkpoint(converted, tmp_path / "m.pkl", normalization="torchvision")
    assert converted.preprocessing == TORCHVISION
    assert "RGB" in report.adapted[-1]
    pixels = torch.randint(0, 256, (1, 3, 64, 64)).float()  # RGB
    bgr = pixels.flip(1) - torch.tensor(CAFFE.mean)[:, None, None]
    rgb = (pixels - torch.tensor(TORCHVISION.mean)[:, None, None]) / torch.tensor(TORCHVISION.std)[:, None, None]
    with torch.no_grad():
        for left, right in zip(as_it_is.eval()(bgr), converted.eval()(rgb), strict=True):
            assert ((left - right).abs().max() / left.abs().max()).item() < 1e-5


# Adaptation


@pytest.mark.parametrize("in_channels", [1, 2, 4, 6])
def test_other_numbers_of_channels(source, tmp_path, in_channels):
    torch.save(source.state_dict(), tmp_path / "m.pth")
    net = ResNet(50, base_channels=8, in_channels=in_channels)
    report = load_checkpoint(net, tmp_path / "m.pth")
    assert report.adapted == (f"conv1.weight accepts {in_channels} channels in place of 3",)
    gray = torch.randn(1, 1, 64, 64)  # a gray image means to it what it means to the other
    outs = [source(gray.expand(-1, 3, -1, -1)), net.eval()(gray.expand(-1, in_channels, -1, -1))]
    if in_channels in (1, 6):
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
    given = source.conv1.weight
    if in_channels == 1:
        torch.testing.assert_close(net.conv1.weight, given.sum(1, keepdim=True))
        mean, std = (sum(numbers) / 3 for numbers in (TORCHVISION.mean, TORCHVISION.std))
        assert net.preprocessing == Preprocessing(mean=(mean,), std=(std,))
    else:
        repeated = torch.cat([given, given], 1)[:, :in_channels]
        torch.testing.assert_close(net.conv1.weight, repeated * 3 / in_channels)
        assert net.preprocessing is None


@pytest.mark.parametrize(
    ("trained", "taken", "expected"),
    [
        (3, 3, TORCHVISION),
        (3, 1, TORCHVISION.gray()),
        (1, 1, TORCHVISION.gray()),
        *(
            (trained, taken, None)
            for trained in (1, 2, 4, 13)
            for taken in (1, 2, 3, 4, 13)
            if (trained, taken) != (1, 1)
        ),
        *((3, taken, None) for taken in (2, 4, 13)),
    ],
)
def test_preprocessing_is_known_for_color_and_gray_only(tmp_path, trained, taken, expected):
    source = ResNet(18, base_channels=2, in_channels=trained)
    torch.save(source.state_dict(), tmp_path / "m.pth")
    net = ResNet(18, base_channels=2, in_channels=taken)
    report = load_checkpoint(net, tmp_path / "m.pth")
    assert net.preprocessing == expected
    if expected is None:
        with pytest.raises(
            ValueError, match=r"the preprocessing of the loaded weights is unknown.* set `net\.preprocessing ="
        ):
            preprocessing_of(net)
    else:
        assert preprocessing_of(net) == expected
    weight = source.conv1.weight
    if taken == 1 != trained:
        torch.testing.assert_close(net.conv1.weight, weight.sum(1, keepdim=True))
    else:  # the n-th channel gets the filters of the n-th, and of the first again behind the last
        repeated = weight[:, [channel % trained for channel in range(taken)]]
        torch.testing.assert_close(net.conv1.weight, repeated * (trained / taken))
    changed = (f"conv1.weight accepts {taken} channels in place of {trained}",) if trained != taken else ()
    assert report.adapted == changed
    net.preprocessing = TORCHVISION
    assert preprocessing_of(net) == TORCHVISION


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_preprocessing_is_unknown_after_training_on_other_channels(tmp_path, channels):
    weights = {
        f"state_dict.backbone.{key}": value for key, value in ResNet(18, in_channels=channels).state_dict().items()
    }
    own = {"channels": torch.arange(channels), "mean": torch.ones(channels), "std": torch.ones(channels)}
    torch.save(
        weights | {f"state_dict.data_preprocessor.{key}": value for key, value in own.items()}, tmp_path / "m.pth"
    )
    net = ResNet(18, in_channels=channels)
    load_checkpoint(net, tmp_path / "m.pth")
    assert net.preprocessing is None


def test_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(ResNet(18, in_channels=13).state_dict(), tmp_path / "m.pth")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    result = CliRunner().invoke(app, ["extract", "resnet18", "a.png", "--checkpoint", "m.pth", "--out", "features"])
    assert result.exit_code == 2
    assert "the preprocessing of the loaded weights is unknown" in result.output


def test_group_norms_of_any_name(tmp_path):
    source = ResNet(18, base_channels=8, norm_cfg={"type": "GN", "num_groups": 4})
    other = {re.sub(r"\bgn(?=\d\.)", "bn", key): value + 1 for key, value in source.state_dict().items()}
    torch.save(other, tmp_path / "m.pth")
    net = ResNet(18, base_channels=8, norm_cfg={"type": "GN", "num_groups": 4})
    load_checkpoint(net, tmp_path / "m.pth")
    assert all(torch.equal(*pair) for pair in zip(net.state_dict().values(), other.values(), strict=True))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"dcn": {"type": "DCN", "deform_groups": 1}, "stage_with_dcn": (False, False, False, True)}, "conv_offset"),
        ({"plugins": [{"cfg": {"type": "SELayer"}, "position": "after_conv3"}]}, "se_layer"),
        ({"type": "DetectoRS_ResNet", "conv_cfg": {"type": "ConvAWS"}}, "weight_gamma"),
        ({"type": "DetectoRS_ResNet", "sac": {"type": "SAC"}, "stage_with_sac": (False, False, False, True)}, "switch"),
        ({"type": "DetectoRS_ResNet", "rfp_inplanes": 8}, "rfp_conv"),
    ],
)
def test_an_ordinary_checkpoint_for_a_net_with_more(source, images, tmp_path, options, kept):
    """Layers without effect at initialization may be missing; features are those of the plain net, plugins excepted."""
    torch.save(source.state_dict(), tmp_path / "m.pth")
    net = build_backbone({"type": "ResNet", "depth": 50, "base_channels": 8, **options})
    report = load_checkpoint(net, tmp_path / "m.pth")
    assert report.kept
    assert all(kept in key or "num_batches" in key or "weight_" in key or "context" in key for key in report.kept)
    if "plugins" not in options:
        assert_features(net, source(images), images, rtol=1e-3, atol=1e-3)


# Strictness


def refuse(net, path, match, **options):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        load_checkpoint(net, path, **options)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.preprocessing is None


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda s: s.pop("layer3.0.conv1.weight"), r"1 missing.*layer3\.0\.conv1\.weight"),
        (lambda s: s.pop("bn1.running_var"), r"1 missing.*bn1\.running_var"),
        (lambda s: s.update({"layer1.3.conv1.weight": torch.zeros(8)}), r"1 unexpected.*layer1\.3\.conv1\.weight"),
        (lambda s: s.update({"layer1.0.downsample.2.weight": torch.zeros(8)}), "1 unexpected"),
        (lambda s: s.update({"layer2.0.bn1.weight": torch.zeros(3)}), r"bn1\.weight \(3,\) for \(16,\)"),
        (lambda s: s.update({"layer2.0.bn1.weight": s["layer2.0.bn1.weight"].long()}), r"\(16,\) of int64 for \(16,\)"),
        (lambda s: s["layer4.2.conv3.weight"].view(-1)[5:6].fill_(float("nan")), r"layer4\.2\.conv3\.weight \(NaN\)"),
    ],
)
def test_a_misfit_changes_nothing(source, tmp_path, spoil, match):
    weights = {key: value.clone() for key, value in source.state_dict().items()}
    spoil(weights)
    torch.save(weights, tmp_path / "m.pth")
    refuse(ResNet(50, base_channels=8), tmp_path / "m.pth", match)


def test_another_architecture_is_refused(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "m.pth")
    for net in (ResNet(101, base_channels=8), ResNet(18, base_channels=8), build_backbone("resnet50_v1d")):
        refuse(net, tmp_path / "m.pth", "nothing was changed")


def test_fewer_stages_are_no_fault(source, images, tmp_path):
    torch.save(source.state_dict(), tmp_path / "m.pth")
    options = {"num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (2,)}
    net = ResNet(50, base_channels=8, **options)
    report = load_checkpoint(net, tmp_path / "m.pth")
    assert {key.split(".")[0] for key in report.ignored} == {"layer4"}
    assert torch.equal(net.eval()(images)[0], source(images)[2])


def test_strict(source, tmp_path):
    weights = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    torch.save(weights | {"neck.weight": torch.zeros(1)}, tmp_path / "m.pth")
    assert load_checkpoint(ResNet(50, base_channels=8), tmp_path / "m.pth").ignored == ("neck.weight",)
    refuse(ResNet(50, base_channels=8), tmp_path / "m.pth", r"neck\.weight", strict="all")
    net = build_backbone("resnet50_v1d", base_channels=8)
    report = load_checkpoint(net, tmp_path / "m.pth", strict=False)
    assert "layer4.2.conv3.weight" in report.loaded
    assert "stem.0.weight" in report.missing
    assert "conv1.weight" in report.ignored
    with pytest.raises(ValueError, match="`strict` must be one of"):
        load_checkpoint(net, tmp_path / "m.pth", strict="heads")


def test_a_prefix_tells_which_of_two(source, tmp_path):
    weights = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    others = {f"img_backbone.{key}": value + 1 for key, value in source.state_dict().items()}
    torch.save({"state_dict": weights | others}, tmp_path / "m.pth")
    net = ResNet(50, base_channels=8)
    report = load_checkpoint(net, tmp_path / "m.pth", prefix="img_backbone.")
    assert torch.equal(net.conv1.weight, source.conv1.weight + 1)
    assert (
        load_checkpoint(net, tmp_path / "m.pth").adapted[-1]
        == "not the backbone with prefix 'state_dict.img_backbone.'"
    )
    assert torch.equal(net.conv1.weight, source.conv1.weight)
    assert report.adapted == ("backbone with prefix 'state_dict.img_backbone.'",)


def test_a_net_without_memory_is_filled(source, images, tmp_path):
    torch.save(source.state_dict(), tmp_path / "m.pth")
    with torch.device("meta"):
        net = ResNet(50, base_channels=8, frozen_stages=1)
    load_checkpoint(net, tmp_path / "m.pth")
    assert_features(net, source(images), images)
    assert not net.layer1[0].conv1.weight.requires_grad
    assert net.layer2[0].conv1.weight.requires_grad


def test_the_report_is_a_table(source, tmp_path):
    torch.save({"backbone." + key: value for key, value in source.state_dict().items()}, tmp_path / "m.pth")
    text = str(load_checkpoint(ResNet(50, base_channels=8), tmp_path / "m.pth"))
    assert re.search(r"loaded +│ +318", text)
    assert "backbone with prefix 'backbone.'" in text


# From a config


def test_build_backbone_loads(source, images, tmp_path):
    torch.save(source.state_dict(), tmp_path / "m.pth")
    net = build_backbone({"type": "ResNet", "depth": 50, "base_channels": 8}, checkpoint=tmp_path / "m.pth")
    assert_features(net, source(images), images)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.pth"):
        build_backbone("resnet18", checkpoint=tmp_path / "nowhere.pth")


def test_the_shared_head_loads_its_stage_of_a_whole_checkpoint(tmp_path):
    torch.manual_seed(1)
    weights = ResNet(18).state_dict()
    torch.save(weights, tmp_path / "m.pth")
    head = SharedHead(18, init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "m.pth")})
    head.init_weights()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in head.state_dict().items())


@pytest.mark.parametrize("as_list", [False, True])
def test_init_cfg_loads_in_the_same_way(source, images, tmp_path, as_list):
    torch.save({"model": convert_state_dict(source.state_dict(), "native", "detectron2")}, tmp_path / "m.pth")
    init = {"type": "Pretrained", "checkpoint": str(tmp_path / "m.pth")}
    config = {"type": "ResNet", "depth": 50, "base_channels": 8, "init_cfg": [init] if as_list else init}
    net = build_backbone(config)
    assert_features(net, source(images), images)
    assert net.preprocessing == CAFFE
    with pytest.raises(ValueError, match="does not fit ResNet"):
        build_backbone(config | {"depth": 101})
    with pytest.warns(FutureWarning, match="old spelling"):
        old = build_backbone({"type": "ResNet", "depth": 50, "base_channels": 8, "pretrained": init["checkpoint"]})
    assert_features(old, source(images), images)


def test_init_cfg_inside_a_model(source, tmp_path):
    """The ``init_weights`` of a host's model calls that of the backbone."""
    from mmengine.model import BaseModel

    torch.save(source.state_dict(), tmp_path / "m.pth")
    init = {"type": "Pretrained", "checkpoint": str(tmp_path / "m.pth")}

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = ResNet(50, base_channels=8, init_cfg=init)

        def forward(self, x):
            return self.backbone(x)

    model = Model()
    model.init_weights()
    assert all(torch.equal(*pair) for pair in zip(model.backbone.parameters(), source.parameters(), strict=True))


# Random changes of keys and shapes


LAYOUTS = ["native", "timm", "mmpretrain", "detectron2", "huggingface", "paddle"]


def tiny(seed):
    torch.manual_seed(seed)
    net = ResNet(18, base_channels=2)
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    return net


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_checkpoint_loads_silently_wrong(tmp_path, data):
    """Either every tensor of the net is loaded, or there is an error and nothing has changed."""
    source, net = tiny(seed=1), tiny(seed=2)
    weights = convert_state_dict(source.state_dict(), "native", data.draw(st.sampled_from(LAYOUTS)))
    words = st.text("abcxyz._0123456789", min_size=1, max_size=12)
    for name in data.draw(st.lists(st.sampled_from(sorted(weights)), max_size=3, unique=True)):
        tensor = weights.pop(name)
        what = data.draw(st.sampled_from(["dropped", "renamed", "extended", "of another shape"]))
        if what == "renamed":
            weights[data.draw(words)] = tensor
        elif what == "extended":
            weights[f"{name}.{data.draw(words)}"] = tensor
        elif what == "of another shape":
            weights[name] = torch.cat([tensor.flatten(), torch.zeros(1)])
    prefix = data.draw(st.one_of(st.just(""), st.builds("{}.".format, words)))
    junk = data.draw(st.dictionaries(words, st.just(torch.zeros(2)), max_size=3))
    torch.save({**junk, **{f"{prefix}{name}": tensor for name, tensor in weights.items()}}, tmp_path / "m.pth")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    try:
        load_checkpoint(net, tmp_path / "m.pth")
    except ValueError:
        expected = before
    else:
        expected = source.state_dict()
    for key, value in net.state_dict().items():
        assert torch.equal(value, expected[key]) or key.endswith("num_batches_tracked"), key


# Downloads


def test_a_url_and_a_catalogued_name(source, images, tmp_path, monkeypatch):
    """The file is downloaded, and its catalog entry is used."""
    torch.save(source.state_dict(), tmp_path / "m.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with serve() as web:
        web.content = (tmp_path / "m.pth").read_bytes()
        net = ResNet(50, base_channels=8)
        report = load_checkpoint(net, f"{web.url}/r50.pth")
        assert_features(net, source(images), images)
        assert report.source == f"{web.url}/r50.pth"
        odd = Preprocessing(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), order="BGR", size=160)
        known = find_weights("torchvision://resnet50")
        known = replace(known, url=f"{web.url}/known.pth", sha256=None, preprocessing=odd)
        monkeypatch.setattr("resbackbone.checkpoints.hub.sources.find_weights", lambda name: known)
        net = ResNet(50, base_channels=8)
        load_checkpoint(net, "torchvision://resnet50")
        assert net.preprocessing == odd
