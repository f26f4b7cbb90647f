"""The library inside mmdet: whole detectors, registries, subclasses, the neck, our config; all on CPU."""

import copy
import itertools
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from initialization_parity import compare_starts
from mmengine.config import Config
from PIL import Image
from sweep_hosts import compare_backbones, compare_tensors, config_tree, gradients_of, randomize
from torch import nn

import resbackbone
from resbackbone.inference import export
from resbackbone.necks import FPN

HOST = "mmdet"
OUR_CONFIG = Path(__file__).parents[2] / "configs/hosts/mmdet/faster-rcnn_r50_fpn.py"

pytestmark = [
    pytest.mark.skipif(find_spec(HOST) is None, reason="mmdet is not installed; tools/test_hosts.sh installs it"),
    pytest.mark.usefixtures("default_scope"),
]


def host_config():
    return Config.fromfile(config_tree(HOST) / "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py")


def build_detector(config, backbone_type):
    """Build the model of a config with another type of backbone, and nothing to download."""
    from mmdet.registry import MODELS

    import resbackbone.integrations.mmdet  # noqa: F401

    model = copy.deepcopy(config.model)
    model.backbone.update(type=backbone_type, init_cfg=None)
    return MODELS.build(model)


@pytest.fixture
def native_class():
    from mmdet.models.backbones import ResNet

    return ResNet  # the registry's "ResNet" is ours as soon as a test has imported the integration


@pytest.fixture
def data():
    """Two images of different size with two boxes each, as a data loader hands them over."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for height, width in ((128, 160), (160, 128)):
        inputs.append(torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8))
        sample = DetDataSample(
            metainfo={"img_shape": (height, width), "ori_shape": (height, width), "scale_factor": (1.0, 1.0)}
        )
        boxes = torch.tensor([[10.0, 20.0, 90.0, 100.0], [40.0, 5.0, 120.0, 60.0]])
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([3, 17]))
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def test_whole_detector_identical(native_class, data, train_step):
    native, ours = (build_detector(host_config(), type_) for type_ in (native_class, "ResNet"))
    assert type(native.backbone) is native_class
    assert isinstance(ours.backbone, resbackbone.ResNet)
    assert list(native.state_dict()) == list(ours.state_dict())
    randomize(native)
    ours.load_state_dict(native.state_dict())

    predictions = []
    for detector in (native, ours):
        detector.eval()
        with torch.no_grad():
            predictions.append([s.pred_instances for s in detector.test_step(copy.deepcopy(data))])
    for left, right in zip(*predictions, strict=True):
        assert len(left) > 0
        assert compare_tensors("prediction", dict(left.items()), dict(right.items())) == []

    losses = [train_step(detector, data) for detector in (native, ours)]
    assert {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"} <= losses[0].keys()
    assert losses[0] == losses[1]
    assert compare_tensors("gradient of", gradients_of(native), gradients_of(ours)) == []
    assert compare_tensors("after the step", native.state_dict(), ours.state_dict()) == []


def test_init_weights_of_a_whole_detector(native_class, data, train_step):
    native, ours = (build_detector(host_config(), type_) for type_ in (native_class, "ResNet"))
    assert compare_starts(native, ours) == []
    backbone = ours.backbone
    assert not any(block.bn3.weight.any() for name in backbone.res_layers for block in getattr(backbone, name))
    assert (backbone.layer1[0].bn2.weight == 1).all()
    # He's normal over what goes out: a variance of 2 / (channels * kernel area).
    assert backbone.conv1.weight.std() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)

    before = copy.deepcopy(backbone.state_dict())
    train_step(ours, data)
    moved = {key.split(".")[0] for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"layer2", "layer3", "layer4"}  # frozen_stages=1, norm_eval=True


def build(**config):
    from mmdet.registry import MODELS

    import resbackbone.integrations.mmdet  # noqa: F401

    return MODELS.build(config)


@pytest.fixture
def host_registry():
    """The registry of mmdet; what a test registers there goes when it ends."""
    from mmdet.registry import MODELS

    import resbackbone.integrations.mmdet  # noqa: F401  # before the snapshot, or its names would go too, for good

    registered = dict(MODELS.module_dict)
    yield MODELS
    MODELS.module_dict.clear()
    MODELS.module_dict.update(registered)


def test_layers_that_a_user_registered_in_mmdet(host_registry):
    @host_registry.register_module()
    class ScaledBatchNorm(nn.BatchNorm2d):
        pass

    @host_registry.register_module()
    class Gate(nn.Module):
        def __init__(self, in_channels, start):
            super().__init__()
            self.factor = nn.Parameter(torch.full((in_channels, 1, 1), start))

        def forward(self, x):
            return x * self.factor

    plugin = {"cfg": {"type": "Gate", "start": 0.5}, "position": "after_conv2", "stages": (False, False, False, True)}
    net = build(type="ResNet", depth=50, norm_cfg={"type": "ScaledBatchNorm"}, plugins=[plugin])
    assert type(net.bn1) is ScaledBatchNorm
    assert net.layer4[0].gate.factor.shape == (512, 1, 1)
    assert not hasattr(net.layer3[0], "gate")
    net(torch.zeros(2, 3, 64, 64))[-1].sum().backward()
    assert net.layer4[2].gate.factor.grad is not None


# `zero_init_residual=False` because mmdet ignores True in blocks that are not exactly its own; ours does not.


def make_wide_variant(module):
    """A variant as users write them: a block that rebuilds a convolution, arguments of its own through ResLayer."""
    from mmcv.cnn import build_conv_layer, build_norm_layer

    class WideBottleneck(module.Bottleneck):
        expansion = 2

        def __init__(self, inplanes, planes, ratio=1.0, **kwargs):
            super().__init__(inplanes, planes, **kwargs)
            width = int(planes * ratio)
            self.norm1_name, norm1 = build_norm_layer(self.norm_cfg, width, postfix=1)
            self.norm2_name, norm2 = build_norm_layer(self.norm_cfg, width, postfix=2)
            self.conv1 = build_conv_layer(self.conv_cfg, inplanes, width, 1, stride=self.conv1_stride, bias=False)
            self.add_module(self.norm1_name, norm1)
            self.conv2 = build_conv_layer(
                self.conv_cfg,
                width,
                width,
                3,
                stride=self.conv2_stride,
                padding=self.dilation,
                dilation=self.dilation,
                bias=False,
            )
            self.add_module(self.norm2_name, norm2)
            self.conv3 = build_conv_layer(self.conv_cfg, width, planes * self.expansion, 1, bias=False)

    class WideNet(module.ResNet):
        arch_settings = {26: (WideBottleneck, (1, 2, 2, 1))}  # noqa: RUF012

        def __init__(self, ratio=1.0, **kwargs):
            self.ratio = ratio
            super().__init__(**kwargs)

        def make_res_layer(self, **kwargs):
            return module.ResLayer(ratio=self.ratio, **kwargs)

    options = {"avg_down": True, "strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2), "frozen_stages": 1}
    return WideNet(depth=26, ratio=1.5, zero_init_residual=False, **options)


def make_own_forward_variant(module):
    """A block with a forward of its own, downsampling last, behind a stem of its own."""

    class LinearOutBlock(module.BasicBlock):
        def forward(self, x):
            identity = x if self.downsample is None else self.downsample(x)
            out = self.relu(self.norm1(self.conv1(x)))
            return self.norm2(self.conv2(out)) * 0.5 + identity

    class OwnStemNet(module.ResNet):
        arch_settings = {10: (LinearOutBlock, (2, 1, 1, 2))}  # noqa: RUF012

        def make_res_layer(self, **kwargs):
            return module.ResLayer(downsample_first=False, **kwargs)

        def _make_stem_layer(self, in_channels, stem_channels):
            super()._make_stem_layer(in_channels, stem_channels)
            self.conv1 = nn.Conv2d(in_channels, stem_channels, 3, stride=2, padding=1, bias=False)

        def forward(self, x):
            x = self.maxpool(self.relu(self.norm1(self.conv1(x))))
            outs = []
            for name in self.res_layers:
                x = getattr(self, name)(x)
                outs.append(x)
            return tuple(outs[i] for i in self.out_indices)

    return OwnStemNet(depth=10, zero_init_residual=False, frozen_stages=0, norm_eval=False, out_indices=(1, 3))


def make_plugin_variant(module):
    """ResNet as it is, in every option that reaches into the blocks."""
    plugins = [{"cfg": {"type": "ContextBlock", "ratio": 0.25, "postfix": "_a"}, "position": "after_conv3"}]
    return module.ResNet(50, 1, 32, 32, norm_cfg={"type": "GN", "num_groups": 8}, style="caffe", plugins=plugins)


@pytest.mark.parametrize("make", [make_wide_variant, make_own_forward_variant, make_plugin_variant])
def test_a_subclass_for_mmdet_works_after_changing_its_import(make):
    import mmdet.models.backbones.resnet as theirs

    import resbackbone.backbones.resnet as ours

    nets = make(theirs), make(ours)
    assert compare_starts(*nets) == []
    images = torch.randn(2, nets[0].conv1.in_channels, 64, 64, generator=torch.Generator().manual_seed(1))
    assert compare_backbones(*nets, images) == []


@pytest.mark.parametrize("depth", [18, 50])
def test_with_cp_gives_what_mmdet_gives_without_it(native_class, depth):
    """Not what mmdet's `with_cp` gives, which sums gradients in another order and moves statistics twice."""
    options = {"depth": depth, "norm_eval": False}
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert compare_backbones(native_class(**options), build(type="ResNet", with_cp=True, **options), images) == []


LEVELS = (
    {"num_outs": 4},
    {"num_outs": 6},
    {"num_outs": 5, "start_level": 1},
    {"num_outs": 2, "start_level": 1, "end_level": 2},
    {"num_outs": 3, "start_level": 1, "end_level": 3},
)


@pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: "-".join(f"{key}={n}" for key, n in levels.items()))
@pytest.mark.parametrize("add_extra_convs", [False, True, "on_input", "on_lateral", "on_output"])
def test_fpn_identical(add_extra_convs, levels):
    from mmdet.models.necks import FPN as HostFPN

    generator = torch.Generator().manual_seed(0)
    channels = (8, 12, 16, 24)
    maps = [torch.randn(2, c, 64 >> i, 64 >> i, generator=generator) for i, c in enumerate(channels)]
    for relu, norm_cfg, act_cfg, no_norm in itertools.product(
        (False, True), (None, {"type": "BN"}, {"type": "GN", "num_groups": 4}), (None, {"type": "ReLU"}), (False, True)
    ):
        options = {
            "in_channels": list(channels),
            "out_channels": 16,
            "add_extra_convs": add_extra_convs,
            "relu_before_extra_convs": relu,
            "no_norm_on_lateral": no_norm,
            "norm_cfg": norm_cfg,
            "act_cfg": act_cfg,
            **levels,
        }
        native, ours = HostFPN(**copy.deepcopy(options)), FPN(**options)
        assert compare_necks(native, ours, maps) == [], options


@pytest.mark.parametrize(
    "upsample_cfg",
    [{"mode": "nearest", "scale_factor": 2}, {"mode": "bilinear", "align_corners": False}],
    ids=lambda cfg: cfg["mode"],
)
def test_fpn_upsampling_identical(upsample_cfg):
    from mmdet.models.necks import FPN as HostFPN

    options = {"in_channels": [4, 4], "out_channels": 8, "num_outs": 3, "upsample_cfg": upsample_cfg}
    assert compare_necks(HostFPN(**options), FPN(**options), [torch.rand(2, 4, 16, 24), torch.rand(2, 4, 8, 12)]) == []


def compare_necks(native, ours, maps):
    """Compare initial weights drawn from one seed, outputs and gradients."""
    outputs = []
    for neck in (native, ours):
        torch.manual_seed(0)
        neck.init_weights()
        outputs.append(dict(enumerate(neck(maps))))
        torch.autograd.backward([out.square().mean() for out in outputs[-1].values()])
    return [
        *([] if list(native.state_dict()) == list(ours.state_dict()) else ["other keys"]),
        *compare_tensors("state", native.state_dict(), ours.state_dict()),
        *compare_tensors("output", *outputs),
        *compare_tensors("gradient of", gradients_of(native), gradients_of(ours)),
    ]


@pytest.fixture
def coco(tmp_path):
    """A COCO dataset of two images, in place of the one that our config names."""
    images, annotations = [], []
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for number, (width, height) in enumerate([(96, 64), (80, 64)], start=1):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train2017" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        box = {"id": number, "image_id": number, "category_id": 1, "bbox": [8, 8, 40, 40], "area": 1600, "iscrowd": 0}
        annotations.append(box)
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_our_config_trains(coco, train_step):
    from mmdet.registry import DATASETS
    from mmengine.dataset import pseudo_collate

    config = Config.fromfile(OUR_CONFIG)
    config.resize.scale = (160, 128)
    dataset_config = config.train_dataloader.dataset
    dataset_config.data_root = str(coco)
    dataset_config.pipeline[2].scale = (160, 128)
    dataset = DATASETS.build(dataset_config)
    detector = build_detector(config, config.model.backbone.type)
    assert isinstance(detector.backbone, resbackbone.ResNet)
    detector.init_weights()
    losses = train_step(detector, pseudo_collate([dataset[0], dataset[1]]))
    assert torch.isfinite(losses["loss"])


def test_our_config_is_the_hosts_recipe(native_class, data, train_step):
    theirs, ours = host_config(), Config.fromfile(OUR_CONFIG)
    for key in ("train_cfg", "val_cfg", "test_cfg", "param_scheduler", "optim_wrapper", "auto_scale_lr"):
        assert ours[key] == theirs[key], key
    detectors = build_detector(theirs, native_class), build_detector(ours, "ResNet")
    assert compare_starts(*detectors) == []
    losses = [train_step(detector, data) for detector in detectors]
    assert losses[0] == losses[1]
    assert detectors[0].test_cfg == detectors[1].test_cfg


@torch.no_grad()
def test_a_detectors_backbone_and_neck_are_exported(tmp_path):
    config = host_config()
    config.model.backbone.update(depth=18, base_channels=8)
    config.model.neck.in_channels = [8, 16, 32, 64]
    detector = build_detector(config, resbackbone.ResNet).eval()
    exported = export(detector, tmp_path / "net.pt2", "torch-export")
    assert [level.name for level in exported.levels] == ["p2", "p3", "p4", "p5", "p6"]
    images = torch.randn(1, 3, 160, 224)
    outs = torch.export.load(exported.path).module()(images)
    assert all(torch.equal(*pair) for pair in zip(outs, detector.extract_feat(images), strict=True))
