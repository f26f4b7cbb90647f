"""Whole detectors and segmentors on CPUs find the same with an optimized, folding or channels_last backbone."""

import copy
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from sweep_hosts import config_tree, randomize

from resbackbone.inference import optimize
from resbackbone.training import fold_frozen_norms

SLOW = pytest.mark.slow
GRID = "grid_rcnn/grid-rcnn_r50_fpn_gn-head_1x_coco"
DETECTORS = [
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco",
    pytest.param("retinanet/retinanet_r50_fpn_1x_coco", marks=SLOW),
    pytest.param("reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco", marks=SLOW),
    pytest.param("mask_rcnn/mask-rcnn_r50_fpn_1x_coco", marks=SLOW),
    pytest.param("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco", marks=SLOW),
    pytest.param("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco", marks=SLOW),
    pytest.param(GRID, marks=SLOW),
    pytest.param("libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco", marks=SLOW),
    pytest.param("dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco", marks=SLOW),
    pytest.param("dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco", marks=SLOW),
    pytest.param("tridentnet/tridentnet_r50-caffe_1x_coco", marks=SLOW),
    pytest.param("deformable_detr/deformable-detr_r50_16xb2-50e_coco", marks=SLOW),
]
SEGMENTORS = [
    "fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024",
    pytest.param("upernet/upernet_r50_4xb2-40k_cityscapes-512x1024", marks=SLOW),
    pytest.param("pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024", marks=SLOW),
    pytest.param("deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024", marks=SLOW),
    pytest.param("point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024", marks=SLOW),
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


def adapted(config):
    """Replace what needs several processes, a download or chance."""
    if isinstance(config, dict):
        for key, value in config.items():
            if value == "SyncBN":
                config[key] = "BN"
            elif key == "pretrained" or (isinstance(value, dict) and value.get("type") == "Pretrained"):
                config[key] = None
            elif key == "max_per_img":
                config[key] = min(value, 200)  # proposals, for the tests' speed
            elif key == "mask_thr_binary":
                config[key] = -1  # probabilities instead of bits, which rounding can turn over
            else:
                adapted(value)
    elif isinstance(config, list):
        for item in config:
            adapted(item)
    return config


def build(host, name):
    """Build a config's model with our backbone and random weights; nothing is downloaded."""
    pytest.importorskip(host)
    __import__(f"resbackbone.integrations.{host}")
    registry = __import__(f"{host}.registry", fromlist=["MODELS"]).MODELS
    path = config_tree(host) / f"{name}.py"
    if not path.exists():
        pytest.skip(f"this {host} has no {name}")
    config = adapted(Config.fromfile(path).model)
    config.backbone.norm_eval = True  # norms that train are not folded in training
    config.data_preprocessor.std = [58.0, 57.0, 57.0]  # caffe's 1 makes activations, and their rounding, large
    if "size" in config.data_preprocessor:
        config.data_preprocessor.size = (128, 128)  # what images are padded to for training
    with DefaultScope.overwrite_default_scope(host):
        torch.manual_seed(0)
        model = registry.build(config)
        model.init_weights()
    assert type(model.backbone).__module__.startswith("resbackbone.")
    draw_weights(model, host)
    return model


def draw_weights(model, host):
    """Draw what starts at zero or one: every weight of backbones and segmentors, the statistics elsewhere."""
    torch.manual_seed(1)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0  # the mask depends on the memory format
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    for module in model.modules():
        ours = type(module).__module__.startswith("resbackbone.backbones")
        if host == "mmseg" or (ours and not type(module).__name__.startswith("DetectoRS")):  # those would explode
            randomize(module)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.uniform_(0.1, 0.3)  # large ones would make activations grow with every block


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
        data["inputs"].append(torch.randint(0, 256, (3, 128, 128), generator=generator, dtype=torch.uint8))
        sample = SegDataSample(metainfo={"img_shape": (128, 128), "ori_shape": (128, 128)})
        labels = torch.randint(0, 19, (1, 128, 128), generator=generator)
        sample.gt_sem_seg = PixelData(data=labels)
        data["data_samples"].append(sample)
    return data


def losses(model, data):
    model.train()
    data = model.data_preprocessor(copy.deepcopy(data), training=True)
    torch.manual_seed(0)  # samplers draw
    found = model(**data, mode="loss")
    parts = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
    return {name: torch.stack([part.detach().mean() for part in value]) for name, value in parts.items()}


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
        assert torch.allclose(got[name], value, rtol=1e-5, atol=0), f"{name}: {got[name]} for {value}"


def assert_same_instances(got, expected):
    """Every box is found again, to a thousandth of a pixel, with its mask; equal scores may change places."""
    assert len(got) == len(expected) > 0
    for label in expected.labels.unique():
        ours, theirs = (found[found.labels == label] for found in (got, expected))
        assert len(ours) == len(theirs)
        distances = (theirs.bboxes[:, None] - ours.bboxes[None]).abs().amax(2)
        assert distances.amin(1).max() < 1e-3
        assert distances.amin(0).max() < 1e-3
        if "masks" in expected:
            differences = (ours.masks[distances.argmin(1)].int() - theirs.masks.int()).abs()
            assert differences.max() <= 1  # of 255
            assert (differences > 0).float().mean() < 1e-3
    assert torch.allclose(got.scores.sort()[0], expected.scores.sort()[0], atol=1e-5)


def assert_same_maps(got, expected):
    """Every pixel has the same class, if the plain model's is the best by more than rounding."""
    assert torch.allclose(got.seg_logits.data, expected.seg_logits.data, rtol=0, atol=1e-4)
    best = expected.seg_logits.data.topk(2, dim=0)[0]
    sure = best[0] - best[1] > 1e-3
    assert sure.float().mean() > 0.9
    ours, theirs = got.pred_sem_seg.data[0][sure], expected.pred_sem_seg.data[0][sure]
    assert torch.equal(ours, theirs)


@pytest.fixture
def nms_of_float64(monkeypatch):
    """Have mmcv's operator, which reads float32 only, round what it gets."""
    operators = import_module("mmcv.ops.nms").ext_module
    nms = operators.nms
    monkeypatch.setattr(operators, "nms", lambda boxes, scores, **rest: nms(boxes.float(), scores.float(), **rest))


@every_way
@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.skipif(find_spec("mmdet") is None, reason="mmdet is not installed; tools/test_hosts.sh installs it")
@pytest.mark.filterwarnings("ignore:hooks of:UserWarning")
@pytest.mark.filterwarnings("ignore:.*_bboxes is deprecated:UserWarning")  # says mmdet of its own Grid R-CNN
def test_whole_detectors(name, way, nms_of_float64):
    plain = build("mmdet", name)
    changed = copy.deepcopy(plain)
    if name == GRID and way == "channels_last":
        changed.backbone.to(memory_format=LAST)  # its own head takes a view of what its layers return
    else:
        changed = WAYS[way](changed)
    data = detection_data()
    for part in (plain, changed):
        for module in part.modules():
            if isinstance(getattr(module, "test_cfg", None), dict):
                allow_low_scores(module.test_cfg)
    for got, expected in zip(predictions(changed, data), predictions(plain, data), strict=True):
        assert_same_instances(got.pred_instances, expected.pred_instances)
    if way == "optimized":
        return
    if hasattr(plain, "roi_head"):  # one proposal more, where rounding decides, and the losses differ by 1e-4
        plain, changed = plain.double(), changed.double()
    assert_losses_agree(losses(changed, data), losses(plain, data))


@every_way
@pytest.mark.parametrize("name", SEGMENTORS)
@pytest.mark.skipif(find_spec("mmseg") is None, reason="mmseg is not installed; tools/test_hosts.sh installs it")
def test_whole_segmentors(name, way):
    plain = build("mmseg", name)
    changed = WAYS[way](copy.deepcopy(plain))
    data = segmentation_data()
    for got, expected in zip(predictions(changed, data), predictions(plain, data), strict=True):
        assert_same_maps(got, expected)
    if way != "optimized":
        assert_losses_agree(losses(changed, data), losses(plain, data))
