"""Checkpoints that the hosts write, with all that they hold beside weights, and `init_cfg` inside the hosts' models."""

import copy
import importlib
from importlib.util import find_spec

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from sweep_hosts import build_pair, config_tree, import_host, randomize

from resbackbone import build_backbone
from resbackbone.checkpoints import load_checkpoint

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
FOUR = {"out_indices": (0, 1, 2, 3)}
# The host's type and options, our config, the layout that is found.
BACKBONES = [
    ("mmdet", {"type": "ResNet", "depth": 50}, "resnet50", "native"),
    ("mmdet", {"type": "ResNeXt", "depth": 50, "groups": 32, "base_width": 4}, "resnext50_32x4d", "native"),
    ("mmdet", {"type": "RegNet", "arch": "regnetx_400mf"}, "regnetx_400mf", "native"),
    ("mmseg", {"type": "ResNetV1c", "depth": 50}, "resnet50_v1c", "native"),
    ("mmseg", {"type": "ResNetV1d", "depth": 18}, "resnet18_v1d", "native"),
    ("mmpretrain", {"type": "ResNetV1c", "depth": 50, **FOUR}, "resnet50_v1c", "mmpretrain"),
    ("mmpretrain", {"type": "ResNetV1d", "depth": 50, **FOUR}, "resnet50_v1d", "mmpretrain"),
    ("mmpretrain", {"type": "SEResNet", "depth": 50, **FOUR}, "seresnet50", "native"),
    ("mmpretrain", {"type": "ResNeSt", "depth": 50, **FOUR}, "resnest50", "mmpretrain"),
]


def require(host):
    if find_spec(host) is None:
        pytest.skip(f"{host} is not installed; tools/test_hosts.sh installs it")


@pytest.fixture
def wrap():
    """What a Runner saves: weights below a prefix, beside metadata, logs and an optimizer."""

    def checkpoint(net):
        hub = MessageHub.get_instance("test")
        hub.update_scalar("train/loss", 0.5)
        hub.update_info("iter", 7)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        return {
            "meta": {"epoch": 3, "iter": 7, "cfg": "model = dict()", "dataset_meta": {"classes": ("a", "b")}},
            "state_dict": {f"backbone.{key}": value for key, value in net.state_dict().items()},
            "message_hub": hub.state_dict(),
            "optimizer": optimizer.state_dict(),
        }

    return checkpoint


@pytest.mark.parametrize(("host", "options", "config", "layout"), BACKBONES)
def test_features_are_the_hosts(tmp_path, wrap, host, options, config, layout):
    require(host)
    native, _ = build_pair(host, options)
    randomize(native)
    torch.save(wrap(native), tmp_path / "epoch_3.pth")
    net = build_backbone(config)
    report = load_checkpoint(net, tmp_path / "epoch_3.pth")
    assert (report.layout, report.missing, report.unexpected, report.ignored) == (layout, (), (), ())
    native.eval()
    net.eval()
    with torch.no_grad():
        for ours, theirs in zip(net(IMAGES), native(IMAGES), strict=True):
            assert torch.equal(ours, theirs)


@pytest.fixture
def faster_rcnn():
    """The Faster R-CNN of mmdet's own config, with our backbone."""
    require("mmdet")
    import_host("mmdet")
    importlib.import_module("resbackbone.integrations.mmdet")
    return Config.fromfile(config_tree("mmdet") / "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py").model


def build_detector(config):
    from mmdet.registry import MODELS

    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(config)


def test_init_cfg_in_a_detector_takes_anybodys_weights(tmp_path, faster_rcnn):
    """detectron2's names, which mmengine would load nothing of, without an error."""
    from resbackbone.checkpoints import convert_state_dict

    source = build_backbone("resnet50")
    randomize(source)
    weights = {"model": convert_state_dict(source.state_dict(), target="detectron2")}
    torch.save(weights, tmp_path / "R-50.pkl")
    config = copy.deepcopy(faster_rcnn)
    config.backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "R-50.pkl")}
    model = build_detector(config)
    model.init_weights()
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
    config.backbone.depth = 101
    with pytest.raises(ValueError, match="does not fit ResNet, nothing was changed"):
        build_detector(config).init_weights()


def test_a_plugin_keeps_its_initialization(tmp_path, faster_rcnn):
    """GCNet's configs put attention into a backbone whose checkpoint has none."""
    source = build_backbone("resnet50")
    torch.save(source.state_dict(), tmp_path / "m.pth")
    config = copy.deepcopy(faster_rcnn)
    plugin = {"cfg": {"type": "ContextBlock", "ratio": 1 / 16}, "position": "after_conv3"}
    config.backbone.update(plugins=[plugin], init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "m.pth")})
    model = build_detector(config)
    model.init_weights()
    assert torch.equal(model.backbone.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
