"""Whole detectors and segmentors on CPUs find the same with an optimized, folding or channels_last backbone."""

import copy
from importlib.util import find_spec

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from sweep_hosts import config_tree

from resbackbone.inference import optimize
from resbackbone.training import fold_frozen_norms

SLOW = pytest.mark.slow
DETECTORS = [
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco",
    pytest.param("retinanet/retinanet_r50_fpn_1x_coco", marks=SLOW),
    pytest.param("reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco", marks=SLOW),
    pytest.param("mask_rcnn/mask-rcnn_r50_fpn_1x_coco", marks=SLOW),
    pytest.param("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco", marks=SLOW),
    pytest.param("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco", marks=SLOW),
]
SEGMENTORS = [
    "fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024",
    pytest.param("upernet/upernet_r50_4xb2-40k_cityscapes-512x1024", marks=SLOW),
]
LAST = torch.channels_last


def optimized(model):
    model.backbone = optimize(model.backbone)
    return model


WAYS = {
    "optimized": optimized,
    "folded": fold_frozen_norms,
    "channels_last": lambda model: model.to(memory_format=LAST),
}
every_way = pytest.mark.parametrize("way", WAYS)


def one_process(config):
    """Replace the norms of several processes, which do not train on CPUs."""
    if isinstance(config, dict):
        for key, value in config.items():
            config[key] = "BN" if value == "SyncBN" else one_process(value)
    elif isinstance(config, list):
        config[:] = map(one_process, config)
    return config


def build(host, name):
    """Build a config's model with our backbone and random weights; nothing is downloaded."""
    pytest.importorskip(host)
    __import__(f"resbackbone.integrations.{host}")
    registry = __import__(f"{host}.registry", fromlist=["MODELS"]).MODELS
    path = config_tree(host) / f"{name}.py"
    if not path.exists():
        pytest.skip(f"this {host} has no {name}")
    config = one_process(Config.fromfile(path).model)
    config.pop("pretrained", None)
    if "size" in config.data_preprocessor:
        config.data_preprocessor.size = (64, 96)  # what images are padded to for training
    for part in (config, config.get("neck")):
        if not isinstance(part, dict):
            continue
        backbone = part.get("backbone") or part.get("rfp_backbone") or {}
        for key in ("init_cfg", "pretrained"):
            if key in backbone:
                backbone[key] = None
    with DefaultScope.overwrite_default_scope(host):
        torch.manual_seed(0)
        model = registry.build(config)
        model.init_weights()
    assert type(model.backbone).__module__.startswith("resbackbone.")
    torch.manual_seed(1)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_var.uniform_(0.5, 1.5)
    return model


def detection_data():
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    generator = torch.Generator().manual_seed(0)
    data = {"inputs": [], "data_samples": []}
    for height, width in ((96, 128), (128, 96)):
        data["inputs"].append(torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8))
        shape = (height, width)
        sample = DetDataSample(metainfo={"img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)})
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        masks[0, 20:80, 10:70], masks[1, 5:60, 30:90] = 1, 1
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[10.0, 20.0, 70.0, 80.0], [30.0, 5.0, 90.0, 60.0]]),
            labels=torch.tensor([3, 17]),
            masks=BitmapMasks(masks.numpy(), height, width),
        )
        data["data_samples"].append(sample)
    return data


def segmentation_data():
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    data = {"inputs": [], "data_samples": []}
    for _ in range(2):
        data["inputs"].append(torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8))
        sample = SegDataSample(metainfo={"img_shape": (64, 96), "ori_shape": (64, 96)})
        labels = torch.randint(0, 19, (1, 64, 96), generator=generator)
        sample.gt_sem_seg = PixelData(data=labels)
        data["data_samples"].append(sample)
    return data


def losses(model, data):
    model.train()
    data = model.data_preprocessor(copy.deepcopy(data), training=True)
    torch.manual_seed(0)  # samplers draw
    with torch.no_grad():
        found = model(**data, mode="loss")
    return {
        name: torch.stack([part.mean() for part in value]) if isinstance(value, list) else value.mean()
        for name, value in found.items()
    }


def predictions(model, data):
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return model.test_step(copy.deepcopy(data))


def allow_low_scores(config):
    """Random heads are sure of nothing."""
    for key, value in list(config.items()):
        if isinstance(value, dict):
            allow_low_scores(value)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict):
                    allow_low_scores(item)
        elif key == "score_thr":
            config[key] = 0.0


def assert_losses_agree(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-5, atol=1e-6), f"{name}: {got[name]} for {value}"


def assert_same_boxes(got, expected):
    """Every box is found again, to a thousandth of a pixel; equal scores may change places."""
    assert len(got) == len(expected) > 0
    for label in expected.labels.unique():
        ours, theirs = (found.bboxes[found.labels == label] for found in (got, expected))
        assert len(ours) == len(theirs)
        distances = (theirs[:, None] - ours[None]).abs().amax(2)
        assert distances.amin(1).max() < 1e-3
        assert distances.amin(0).max() < 1e-3
    assert torch.allclose(got.scores.sort()[0], expected.scores.sort()[0], atol=1e-5)


@every_way
@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.skipif(find_spec("mmdet") is None, reason="mmdet is not installed; tools/test_hosts.sh installs it")
@pytest.mark.filterwarnings("ignore:hooks of:UserWarning")
def test_w11_whole_detectors(name, way):
    plain = build("mmdet", name)
    changed = WAYS[way](copy.deepcopy(plain))
    data = detection_data()
    for part in (plain, changed):
        for module in part.modules():
            if isinstance(getattr(module, "test_cfg", None), dict):
                allow_low_scores(module.test_cfg)
    for got, expected in zip(predictions(changed, data), predictions(plain, data), strict=True):
        assert_same_boxes(got.pred_instances, expected.pred_instances)
    if way != "optimized":
        assert_losses_agree(losses(changed, data), losses(plain, data))


@every_way
@pytest.mark.parametrize("name", SEGMENTORS)
@pytest.mark.skipif(find_spec("mmseg") is None, reason="mmseg is not installed; tools/test_hosts.sh installs it")
def test_w11_whole_segmentors(name, way):
    plain = build("mmseg", name)
    changed = WAYS[way](copy.deepcopy(plain))
    data = segmentation_data()
    for got, expected in zip(predictions(changed, data), predictions(plain, data), strict=True):
        assert (got.seg_logits.data - expected.seg_logits.data).abs().max() < 1e-4
        assert (got.pred_sem_seg.data == expected.pred_sem_seg.data).float().mean() > 0.999
    if way != "optimized":
        assert_losses_agree(losses(changed, data), losses(plain, data))
