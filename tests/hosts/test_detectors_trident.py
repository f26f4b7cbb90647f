"""DetectoRS, TridentNet, the shared head and their layers give the numbers of mmdet's and mmcv's, to the bit."""

import copy
import warnings
from importlib.util import find_spec

import pytest
import torch
from sweep_hosts import compare_backbones, compare_tensors, randomize
from torch import nn

import resbackbone
from resbackbone import blocks, layers
from resbackbone.backbones import ResLayer, SharedHead

if find_spec("mmdet") is None:
    pytest.skip("mmdet is not installed; tools/test_hosts.sh installs it", allow_module_level=True)

HOST = "mmdet"  # whose default scope `default_scope` sets
AWS = {"conv_cfg": {"type": "ConvAWS"}}
SAC = {"sac": {"type": "SAC", "use_deform": True}, "stage_with_sac": (False, True, True, True)}
PLAIN_SAC = {"sac": {"type": "SAC"}, "stage_with_sac": (True, False, True, True)}
DCN = {"dcn": {"type": "DCNv2", "deform_groups": 1}}
GROUPED = {"groups": 4, "base_width": 8}
PLUGIN = {"cfg": {"type": "ContextBlock", "ratio": 1 / 4}, "position": "after_conv3"}
TRIDENT = {
    "num_branch": 3,
    "test_branch_idx": 1,
    "trident_dilations": (1, 2, 3),
    "num_stages": 3,
    "strides": (1, 2, 2),
    "dilations": (1, 1, 1),
    "out_indices": (2,),
}
# The class and its options; the first few as in mmdet's configs.
BACKBONES = {
    "rfp": ("DetectoRS_ResNet", {**AWS, "output_img": True}),
    "sac": ("DetectoRS_ResNet", {**AWS, **SAC}),
    "detectors": ("DetectoRS_ResNet", {**AWS, **SAC, "output_img": True, "frozen_stages": 1, "norm_eval": True}),
    "detectors-101": ("DetectoRS_ResNet", {**AWS, **SAC, "output_img": True, "depth": 101}),
    "rfp-second-look": ("DetectoRS_ResNet", {**AWS, **SAC, "rfp_inplanes": 16}),
    "sac-not-deformable": ("DetectoRS_ResNet", {**AWS, **PLAIN_SAC}),
    "sac-caffe-deep": ("DetectoRS_ResNet", {**SAC, "style": "caffe", "deep_stem": True, "avg_down": True}),
    "detectors-ws": (
        "DetectoRS_ResNet",
        {"conv_cfg": {"type": "ConvWS"}, "norm_cfg": {"type": "GN", "num_groups": 4}},
    ),
    "detectors-dcn": ("DetectoRS_ResNet", {**DCN, "stage_with_dcn": (False, True, True, True)}),
    "detectors-plugin": ("DetectoRS_ResNet", {**AWS, **PLAIN_SAC, "plugins": [PLUGIN]}),
    "detectors-x": ("DetectoRS_ResNeXt", {**GROUPED}),
    "detectors-x-sac": ("DetectoRS_ResNeXt", {**GROUPED, **AWS, **SAC, "output_img": True}),
    "detectors-x-dcn": ("DetectoRS_ResNeXt", {**GROUPED, **DCN, "stage_with_dcn": (False, False, True, True)}),
    "trident-caffe": (
        "TridentResNet",
        {
            **TRIDENT,
            "style": "caffe",
            "frozen_stages": 1,
            "norm_cfg": {"type": "BN", "requires_grad": False},
            "norm_eval": True,
        },
    ),
    "trident": ("TridentResNet", TRIDENT),
    "trident-all": ("TridentResNet", {**TRIDENT, "test_branch_idx": -1, "out_indices": (0, 1, 2)}),
    "trident-two": ("TridentResNet", {**TRIDENT, "num_branch": 2, "trident_dilations": (1, 4)}),
    "trident-deep": ("TridentResNet", {**TRIDENT, "deep_stem": True, "avg_down": True}),
    "trident-101": ("TridentResNet", {**TRIDENT, "depth": 101}),
    "trident-plugin": ("TridentResNet", {**TRIDENT, "plugins": [{**PLUGIN, "stages": (False, True, True)}]}),
    "trident-dcn": ("TridentResNet", {**TRIDENT, **DCN, "stage_with_dcn": (False, True, False)}),
    "trident-ws": ("TridentResNet", {**TRIDENT, "conv_cfg": {"type": "ConvWS"}}),
}
SLOW = {"detectors-101", "trident-101"}


def native_backbone(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about third parties, while it is imported
        from mmdet.models import backbones
    return getattr(backbones, name)


def images_of(size, seed=1):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pair(name, **options):
    options = {"depth": 50, "base_channels": 16, "norm_eval": False, **options}
    return (
        native_backbone(name)(**copy.deepcopy(options)),
        getattr(resbackbone, name)(**copy.deepcopy(options)),
    )


def compare_modules(native, ours, *inputs, run=lambda module, *args: module(*args)):
    """Compare output and every gradient, the inputs' among them, after one pass with the same random weights."""
    randomize(native)
    assert list(native.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(native.state_dict())
    found = []
    for module in (native, ours):
        args = [x.clone().requires_grad_() for x in inputs]
        outs = run(module, *args)
        outs = outs if isinstance(outs, tuple) else (outs,)
        generator = torch.Generator().manual_seed(2)
        torch.autograd.backward(outs, [torch.randn(out.shape, generator=generator) for out in outs])
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        results = {f"output {index}": out.detach() for index, out in enumerate(outs)}
        results |= {f"input gradient {index}": x.grad for index, x in enumerate(args)}
        found.append({**results, **gradients, **{name: b.clone() for name, b in module.named_buffers()}})
    differences = compare_tensors("", *found)
    assert not differences, "\n".join(differences)
    return found[0]


# Layers


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 4, "dilation": 2}], ids=str)
@pytest.mark.parametrize(("name", "own"), [("ConvWS2d", {}), ("ConvWS2d", {"eps": 0.1}), ("ConvAWS2d", {})])
def test_standardised_convolutions_are_mmcvs(name, own, options):
    from mmcv import cnn
    from mmcv.cnn.bricks import conv_ws

    native_class = getattr(cnn, name, None) or getattr(conv_ws, name)
    arguments = {"in_channels": 8, "out_channels": 12, "kernel_size": 3, **options, **own}
    x = torch.randn(2, 8, 15, 13)
    compare_modules(native_class(**arguments), getattr(layers, name)(**arguments), x)


def test_an_ordinary_checkpoint_sets_gamma_and_beta_as_in_mmcv():
    from mmcv.cnn import ConvAWS2d

    plain, native, ours = nn.Conv2d(8, 12, 3), ConvAWS2d(8, 12, 3), layers.ConvAWS2d(8, 12, 3)
    for layer in (native, ours):
        layer.load_state_dict(plain.state_dict())
    for key, value in native.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize("use_deform", [False, True])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 4}, {"dilation": 2, "padding": 2}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_sac_is_mmcvs(use_deform, options, bias):
    from mmcv.ops import SAConv2d

    arguments = {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 1, "bias": bias, **options}
    native = SAConv2d(**arguments, use_deform=use_deform)
    ours = layers.SAConv2d(**arguments, use_deform=use_deform, backend="mmcv")
    assert list(native.state_dict()) == list(ours.state_dict())
    for key, value in ours.state_dict().items():
        assert native.state_dict()[key].shape == value.shape
        if key not in ("weight", "bias"):  # they are drawn
            assert torch.equal(native.state_dict()[key], value), key
    found = compare_modules(native, ours, torch.randn(2, 8, 17, 12))
    if use_deform:
        assert found["offset_l.weight"].abs().max() > 0


@pytest.mark.parametrize("backend", ["torch", "mmcv", "auto"])
def test_every_backend_of_sac_reads_offsets_in_mmcvs_order(backend):
    from mmcv.ops import SAConv2d

    native = SAConv2d(8, 12, 3, padding=1, use_deform=True)
    ours = layers.SAConv2d(8, 12, 3, padding=1, use_deform=True, backend=backend)
    randomize(native)
    ours.load_state_dict(native.state_dict())
    x = torch.randn(2, 8, 17, 12)
    torch.testing.assert_close(ours(x), native(x), rtol=1e-4, atol=1e-4)


def test_small_maps_are_ours_alone():
    """In mmcv the reflection wants more than two pixels."""
    from mmcv.ops import SAConv2d

    x = torch.randn(1, 8, 2, 2)
    with pytest.raises(RuntimeError, match="Padding size should be less"):
        SAConv2d(8, 12, 3, padding=1)(x)
    assert layers.SAConv2d(8, 12, 3, padding=1)(x).shape == (1, 12, 2, 2)


# Backbones


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*case, id=id_, marks=[pytest.mark.slow] if id_ in SLOW else []) for id_, case in BACKBONES.items()],
)
def test_identical(name, options):
    size = 128 if {"sac", "dcn"} & set(options) else 64  # mmcv's layers want maps of 3x3 pixels at least
    native, ours = pair(name, **options)
    differences = compare_backbones(native, ours, images_of(size))
    assert not differences, "\n".join(differences)


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")  # mmdet does not say `use_reentrant`
def test_checkpointing_of_trident_is_mmdets_training_without():
    """In mmdet it raises AttributeError: defect 6."""
    native, ours = pair("TridentResNet", **TRIDENT)
    ours = resbackbone.TridentResNet(depth=50, base_channels=16, norm_eval=False, with_cp=True, **TRIDENT)
    differences = compare_backbones(native, ours, images_of(64))
    assert not differences, "\n".join(differences)
    with pytest.raises(AttributeError, match="'list' object has no attribute 'requires_grad'"):
        pair("TridentResNet", **TRIDENT, with_cp=True)[0](images_of(64).requires_grad_())


@pytest.mark.parametrize("name", ["DetectoRS_ResNet", "DetectoRS_ResNeXt"])
@pytest.mark.parametrize("options", [{}, {"deep_stem": True, "out_indices": (1, 3), "output_img": True}], ids=str)
def test_rfp_forward_is_mmdets(name, options):
    own = GROUPED if name == "DetectoRS_ResNeXt" else {}
    native, ours = pair(name, **AWS, **SAC, **own, **options, rfp_inplanes=6)
    feats = [torch.randn(2, 6, 128 // stride, 128 // stride) for stride in (4, 8, 16, 32)]

    def run(module, images, *rfp_feats):
        return module.rfp_forward(images, [None, *rfp_feats])

    compare_modules(native, ours, images_of(128), *feats[1:], run=run)


def test_the_neck_of_detectors_takes_ours_for_both_looks(default_scope):
    """The RFP of mmdet, whose second backbone is built from a config, over our first."""
    from mmdet.registry import MODELS as MMDET

    options = {"depth": 50, "base_channels": 16, **AWS, **SAC}
    rfp_backbone = {**options, "rfp_inplanes": 4 * 8}
    neck_cfg = {
        "type": "RFP",
        "rfp_steps": 2,
        "aspp_out_channels": 8,
        "aspp_dilations": (1, 3, 6, 1),
        "in_channels": [64, 128, 256, 512],
        "out_channels": 32,
        "num_outs": 5,
    }
    outs = []
    for type_ in (native_backbone("DetectoRS_ResNet"), resbackbone.DetectoRS_ResNet):
        backbone = MMDET.build({"type": type_, **copy.deepcopy(options), "output_img": True})
        neck = MMDET.build({**neck_cfg, "rfp_backbone": {"type": type_, **copy.deepcopy(rfp_backbone)}})
        for module in (backbone, neck):
            randomize(module)
            module.eval()
        with torch.no_grad():
            outs.append(neck(backbone(images_of(128))))
    assert type(neck.rfp_modules[0]) is resbackbone.DetectoRS_ResNet
    assert compare_tensors("level", *(dict(enumerate(levels)) for levels in outs)) == []


# Shared head, simplified block, reversed stage


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 50, "style": "caffe", "norm_cfg": {"type": "BN", "requires_grad": False}},
        {"depth": 18, "stage": 2, "norm_eval": False},
        {"depth": 50, "stage": 1, "stride": 1, "dilation": 2, "norm_eval": False},
        {"depth": 50, "stage": 1, "dcn": {"type": "DCN", "deform_groups": 1}},
    ],
    ids=str,
)
def test_the_shared_head_is_mmdets(options):
    from mmdet.models.roi_heads.shared_heads import ResLayer as NativeHead

    native, ours = NativeHead(**copy.deepcopy(options)), SharedHead(**options)
    native.train()  # returns None in mmdet
    x = torch.randn(2, ours.in_channels, 7, 9)
    compare_modules(native, ours.train(), x)
    assert [m.training for m in native.modules()] == [m.training for m in ours.modules()]


@pytest.mark.parametrize("norm_cfg", [None, {"type": "BN"}], ids=str)
@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"conv_cfg": {"type": "ConvWS"}}], ids=str)
def test_the_simplified_block_is_mmdets(norm_cfg, options):
    from mmdet.models.layers import ResLayer as NativeLayer
    from mmdet.models.layers import SimplifiedBasicBlock

    native = NativeLayer(SimplifiedBasicBlock, 8, 8, 2, norm_cfg=norm_cfg, **options)
    ours = ResLayer(blocks.SimplifiedBasicBlock, 8, 8, 2, norm_cfg=norm_cfg, **options)
    compare_modules(native.train(), ours.train(), torch.randn(2, 8, 9, 11))


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"stride": 2, "avg_down": True}, {"num_blocks": 1}], ids=str)
def test_a_stage_reversed_for_hourglass_is_mmdets(block, options):
    from mmdet.models.backbones import resnet
    from mmdet.models.layers import ResLayer as NativeLayer

    # Hourglass has blocks without expansion, where `planes` in and out are channels in and out.
    classes = [type(block, (getattr(where, block),), {"expansion": 1}) for where in (resnet, blocks)]
    arguments = {"inplanes": 8, "planes": 12, "num_blocks": 3, "downsample_first": False, **options}
    native, ours = NativeLayer(classes[0], **arguments), ResLayer(classes[1], **arguments)
    compare_modules(native.train(), ours.train(), torch.randn(2, 8, 9, 11))
