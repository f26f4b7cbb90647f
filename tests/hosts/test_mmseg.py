"""The library inside mmseg: whole segmentors, subclasses, our config; all on CPU."""

import copy
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

HOST = "mmseg"
OUR_CONFIG = Path(__file__).parents[2] / "configs/hosts/mmseg/fcn_r50-v1c-d8.py"
CROP = (64, 96)  # pixels; the configs' 512x1024 take minutes on a CPU

pytestmark = [
    pytest.mark.skipif(find_spec(HOST) is None, reason="mmseg is not installed; tools/test_hosts.sh installs it"),
    pytest.mark.usefixtures("default_scope"),
]


def host_config():
    return Config.fromfile(config_tree(HOST) / "fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py")


def build_segmentor(config, backbone_type, pretrained=None):
    """Build the model of a config with another type of backbone and other weights, for small crops."""
    from mmseg.registry import MODELS

    import resbackbone.integrations.mmseg  # noqa: F401

    model = copy.deepcopy(config.model)
    model.pretrained = pretrained
    model.backbone.update(type=backbone_type, init_cfg=None)
    model.data_preprocessor.size = CROP
    torch.manual_seed(0)  # the heads draw some of their weights as they are built
    return MODELS.build(model)


@pytest.fixture
def native_class():
    from mmseg.models.backbones import ResNetV1c

    return ResNetV1c  # the registry's "ResNetV1c" is ours as soon as a test has imported the integration


@pytest.fixture
def data():
    """Two labeled images, as a data loader hands them over."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for _ in range(2):
        inputs.append(torch.randint(0, 256, (3, *CROP), generator=generator, dtype=torch.uint8))
        sample = SegDataSample(metainfo={"img_shape": CROP, "ori_shape": CROP})
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 19, (1, *CROP), generator=generator))
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def test_whole_segmentor_identical(native_class, data, train_step):
    native, ours = (build_segmentor(host_config(), type_) for type_ in (native_class, "ResNetV1c"))
    assert type(native.backbone) is native_class
    assert isinstance(ours.backbone, resbackbone.ResNetV1c)
    assert list(native.state_dict()) == list(ours.state_dict())
    randomize(native)
    ours.load_state_dict(native.state_dict())

    predictions = []
    for segmentor in (native, ours):
        segmentor.eval()
        with torch.no_grad():
            samples = segmentor.test_step(copy.deepcopy(data))
        predictions.append(
            {f"{key} {i}": sample.get(key).data for i, sample in enumerate(samples) for key in sample.keys()}  # noqa: SIM118
        )
    assert {"seg_logits 0", "pred_sem_seg 1"} <= predictions[0].keys()
    assert compare_tensors("prediction", *predictions) == []

    losses = [train_step(segmentor, data) for segmentor in (native, ours)]
    assert {"decode.loss_ce", "aux.loss_ce"} <= losses[0].keys()
    assert losses[0] == losses[1]
    assert compare_tensors("gradient of", gradients_of(native), gradients_of(ours)) == []
    assert compare_tensors("after the step", native.state_dict(), ours.state_dict()) == []


def test_init_weights_of_a_whole_segmentor(native_class):
    native, ours = (build_segmentor(host_config(), type_) for type_ in (native_class, "ResNetV1c"))
    assert compare_starts(native, ours) == []
    assert not any(
        block.bn3.weight.any() for name in ours.backbone.res_layers for block in getattr(ours.backbone, name)
    )


@pytest.mark.filterwarnings("ignore:.pretrained. is the old spelling:FutureWarning")  # mmseg hands it over like this
def test_weights_named_as_mmsegs_configs_name_them(native_class, tmp_path):
    config = host_config()
    native = native_class(**{key: value for key, value in config.model.backbone.items() if key != "type"})
    randomize(native)
    torch.save(native.state_dict(), tmp_path / "weights.pth")
    segmentor = build_segmentor(config, "ResNetV1c", pretrained=str(tmp_path / "weights.pth"))
    segmentor.init_weights()
    assert isinstance(segmentor.backbone, resbackbone.ResNetV1c)
    assert compare_tensors("loaded", native.state_dict(), segmentor.backbone.state_dict()) == []


def make_multi_grid_variant(module):
    """A variant with a block of its own, through mmseg's own arguments of ResLayer."""

    class ScaledBottleneck(module.Bottleneck):
        def __init__(self, inplanes, planes, scale=1.0, **kwargs):
            super().__init__(inplanes, planes, **kwargs)
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x):
            return super().forward(x) * self.scale

    class ScaledNet(module.ResNet):
        arch_settings = {29: (ScaledBottleneck, (1, 2, 3, 3))}  # noqa: RUF012

        def __init__(self, scale, **kwargs):
            self.scale = scale
            super().__init__(**kwargs)

        def make_res_layer(self, **kwargs):
            return module.ResLayer(scale=self.scale, **kwargs)

    options = {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "multi_grid": (1, 2, 4), "contract_dilation": True}
    # False because mmseg ignores True in blocks that are not exactly its own; norm_eval has another default in mmseg.
    return ScaledNet(0.5, depth=29, zero_init_residual=False, norm_eval=False, **options)


def test_a_subclass_for_mmseg_works_after_changing_its_import():
    import mmseg.models.backbones.resnet as theirs

    import resbackbone.backbones.resnet as ours

    nets = make_multi_grid_variant(theirs), make_multi_grid_variant(ours)
    assert compare_starts(*nets) == []
    assert compare_backbones(*nets, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))) == []


@pytest.fixture
def cityscapes(tmp_path):
    """A Cityscapes dataset of two images, in place of the one that our config names."""
    generator = np.random.default_rng(0)
    for folder, name, shape, high in (
        ("leftImg8bit", "leftImg8bit", (128, 192, 3), 256),
        ("gtFine", "gtFine_labelTrainIds", (128, 192), 19),
    ):
        (tmp_path / folder / "train").mkdir(parents=True)
        for number in range(2):
            pixels = generator.integers(0, high, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / "train" / f"{number}_{name}.png")
    return tmp_path


def test_our_config_trains(cityscapes, train_step):
    from mmengine.dataset import pseudo_collate
    from mmseg.registry import DATASETS

    config = Config.fromfile(OUR_CONFIG)
    dataset_config = config.train_dataloader.dataset
    dataset_config.data_root = str(cityscapes)
    resize, crop = dataset_config.pipeline[2:4]
    resize.scale, crop.crop_size = (192, 128), CROP
    dataset = DATASETS.build(dataset_config)
    segmentor = build_segmentor(config, config.model.backbone.type)
    assert isinstance(segmentor.backbone, resbackbone.ResNetV1c)
    segmentor.init_weights()
    losses = train_step(segmentor, pseudo_collate([dataset[0], dataset[1]]))
    assert torch.isfinite(losses["loss"])


def test_our_config_is_the_hosts_recipe(native_class, data, train_step):
    theirs, ours = host_config(), Config.fromfile(OUR_CONFIG)
    for key in ("train_cfg", "val_cfg", "test_cfg", "param_scheduler", "val_evaluator"):
        assert ours[key] == theirs[key], key
    assert ours.optim_wrapper.optimizer == theirs.optim_wrapper.optimizer
    segmentors = build_segmentor(theirs, native_class), build_segmentor(ours, ours.model.backbone.type)
    assert compare_starts(*segmentors) == []
    losses = [train_step(segmentor, data) for segmentor in segmentors]
    assert losses[0] == losses[1]
    assert segmentors[0].test_cfg == segmentors[1].test_cfg
