"""Subclasses as people wrote them for mmdet's ResNet, with the import changed alone: their ``forward`` and hooks."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone import FeatureInfo, build_backbone
from resbackbone.backbones.resnet import BasicBlock, Bottleneck, ResLayer, ResNet
from resbackbone.inference import optimize
from resbackbone.layers import build_conv_layer, build_norm_layer

TINY = {"depth": 18, "base_channels": 8}


def run_stages(self, x):
    """The loop that every such ``forward`` ends with."""
    outs = []
    for i, layer_name in enumerate(self.res_layers):
        x = getattr(self, layer_name)(x)
        if i in self.out_indices:
            outs.append(x)
    return tuple(outs)


class WithDepth(ResNet):
    """A second stem, for a depth map, as RGB-D detectors have."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv1_d = build_conv_layer(self.conv_cfg, 1, self.stem_channels, 7, stride=2, padding=3, bias=False)
        self.norm1_d_name, norm1_d = build_norm_layer(self.norm_cfg, self.stem_channels, postfix="1_d")
        self.add_module(self.norm1_d_name, norm1_d)

    def forward(self, x, depth=None):
        if depth is None:
            x, depth = x[:, :3], x[:, 3:]
        x = self.relu(self.norm1(self.conv1(x))) + self.relu(getattr(self, self.norm1_d_name)(self.conv1_d(depth)))
        return run_stages(self, self.maxpool(x))


class WithoutStem(ResNet):
    """The stages alone, on features of another net, as two-stage fusions have."""

    def _make_stem_layer(self, in_channels, stem_channels):
        pass

    def forward(self, x):
        return run_stages(self, x)


class WithDeletedStem(ResNet):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        del self.conv1, self.relu, self.maxpool
        delattr(self, self.norm1_name)

    def forward(self, x):
        return run_stages(self, x)


class OfAList(ResNet):
    def forward(self, images):
        return super().forward(torch.stack(images))


class OfBytes(ResNet):
    def forward(self, x):
        return super().forward(x.float() / 255)


class OfVideos(ResNet):
    """Frames as one batch, in front of a fusion over time."""

    def forward(self, x):
        return [out.unflatten(0, x.shape[:2]).mean(1) for out in super().forward(x.flatten(0, 1))]


class OfQueryAndSupport(ResNet):
    """As in few-shot detection: images with a mask go through a stem of their own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.meta_conv = build_conv_layer(self.conv_cfg, 4, self.stem_channels, 7, stride=2, padding=3, bias=False)

    def forward(self, x, use_meta_conv=False):
        x = self.meta_conv(x) if use_meta_conv else self.conv1(x)
        return run_stages(self, self.maxpool(self.relu(self.norm1(x))))


class OfABatchDict(ResNet):
    def forward(self, batch, *, scale=1.0):
        return {"features": super().forward(batch["image"] * scale)}


class WithHighResolutionStem(ResNet):
    """Two strided 3x3s, hooks overridden by the names that they have in mmdet."""

    def _make_stem_layer(self, in_channels, stem_channels):
        self.conv1 = build_conv_layer(self.conv_cfg, in_channels, stem_channels, 3, stride=2, padding=1, bias=False)
        self.norm1_name, norm1 = build_norm_layer(self.norm_cfg, stem_channels, postfix=1)
        self.add_module(self.norm1_name, norm1)
        self.conv2 = build_conv_layer(self.conv_cfg, stem_channels, stem_channels, 3, stride=2, padding=1, bias=False)
        self.norm2_name, norm2 = build_norm_layer(self.norm_cfg, stem_channels, postfix=2)
        self.add_module(self.norm2_name, norm2)
        self.relu = nn.ReLU(inplace=True)

    @property
    def norm2(self):
        return getattr(self, self.norm2_name)

    def _freeze_stages(self):
        if self.frozen_stages >= 0:
            for module in (self.conv1, self.norm1, self.conv2, self.norm2):
                module.eval()
                for parameter in module.parameters():
                    parameter.requires_grad = False
        for i in range(1, self.frozen_stages + 1):
            stage = getattr(self, f"layer{i}")
            stage.eval()
            for parameter in stage.parameters():
                parameter.requires_grad = False

    def train(self, mode=True):
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return run_stages(self, self.relu(self.norm2(self.conv2(x))))


class WithLateralInputs(ResNet):
    """Features of a neck fed back after each stage, as recursive pyramids do."""

    arch_settings = {50: (Bottleneck, (1, 1, 1, 1))}  # noqa: RUF012

    def __init__(self, depth, rfp_inplanes, **kwargs):
        self.rfp_inplanes = rfp_inplanes
        super().__init__(depth, **kwargs)
        self.rfp_convs = nn.ModuleList(nn.Conv2d(rfp_inplanes, c, 1) for c in self.out_channels)

    def make_res_layer(self, **kwargs):
        return ResLayer(**kwargs)

    def forward(self, x, feedback=None):
        x = self.maxpool(self.relu(self.norm1(self.conv1(x))))
        outs = []
        for i, layer_name in enumerate(self.res_layers):
            x = getattr(self, layer_name)(x)
            if feedback is not None:
                x = x + self.rfp_convs[i](feedback[i])
            outs.append(x)
        return tuple(outs)


def randn(*shape):
    return torch.randn(shape)


BYTES = torch.arange(2 * 3 * 64 * 64, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(2, 3, 64, 64)
FEEDBACK = [torch.ones(2, 4, side, side) for side in (16, 8, 4, 2)]
CALLS = [
    (WithDepth, (randn(2, 4, 64, 64),), {}),
    (WithDepth, (randn(2, 3, 64, 64), randn(2, 1, 64, 64)), {}),
    (WithDepth, (), {"x": randn(2, 3, 64, 64), "depth": randn(2, 1, 64, 64)}),
    (WithoutStem, (randn(2, 8, 16, 16),), {}),
    (WithDeletedStem, (randn(2, 8, 16, 16),), {}),
    (OfAList, ([randn(3, 64, 64), randn(3, 64, 64)],), {}),
    (OfAList, (), {"images": [randn(3, 64, 64), randn(3, 64, 64)]}),
    (OfBytes, (BYTES,), {}),
    (OfVideos, (randn(2, 3, 3, 64, 64),), {}),
    (OfQueryAndSupport, (randn(2, 3, 64, 64),), {}),
    (OfQueryAndSupport, (randn(2, 4, 64, 64),), {"use_meta_conv": True}),
    (OfABatchDict, ({"image": randn(2, 3, 64, 64)},), {"scale": 0.5}),
    (WithHighResolutionStem, (randn(2, 3, 64, 64),), {}),
    (WithLateralInputs, (randn(2, 3, 64, 64),), {"feedback": FEEDBACK}),
]
every_call = pytest.mark.parametrize(
    ("net_class", "args", "kwargs"), [pytest.param(*call, id=f"{call[0].__name__}-{i}") for i, call in enumerate(CALLS)]
)


def build(net_class, **options):
    if net_class is WithLateralInputs:
        return net_class(50, rfp_inplanes=4, base_channels=8, **options)
    return net_class(**TINY, **options)


def tensors(outs):
    return outs["features"] if isinstance(outs, dict) else outs


@every_call
@pytest.mark.parametrize("norm_eval", [True, False])
def test_its_own_forward_gets_what_it_is_called_with(net_class, args, kwargs, norm_eval):
    net = build(net_class, frozen_stages=1, norm_eval=norm_eval)
    net.train()
    outs = tensors(net(*args, **kwargs))
    assert [out.shape[1] for out in outs] == list(net.out_channels)
    sum(out.square().mean() for out in outs).backward()
    assert all(parameter.grad is None for parameter in net.layer1.parameters())
    assert all(parameter.grad is not None for parameter in net.layer2.parameters())
    norms = [module for module in net.layer2.modules() if isinstance(module, _BatchNorm)]
    assert not any(norm.training for norm in net.layer1.modules())
    assert all(norm.training is not norm_eval for norm in norms)
    net.eval()
    expected = tensors(net(*args, **kwargs))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), nn.DataParallel(net)):
        assert all(map(torch.equal, tensors(twin(*args, **kwargs)), expected))


@pytest.mark.parametrize(
    ("net_class", "args"), [(c, a) for c, a, k in CALLS if len(a) == 1 and not k and isinstance(a[0], torch.Tensor)]
)
@torch.no_grad()
def test_optimized_it_computes_the_same_for_one_tensor(randomize_norms, net_class, args):
    net = randomize_norms(build(net_class))
    net.eval()
    for out, reference in zip(optimize(net)(*args), net(*args), strict=True):
        torch.testing.assert_close(out, reference, rtol=1e-3, atol=1e-3)


def test_what_takes_no_tensor_is_told_so_when_optimized():
    fast = optimize(OfAList(**TINY))
    with pytest.raises(TypeError, match="an optimized OfAList accepts one tensor, got list; stack its images first"):
        fast([torch.zeros(3, 64, 64)])


def test_a_stem_of_ones_own_has_a_feature_info_and_freezes():
    net = WithHighResolutionStem(**TINY, frozen_stages=0)
    assert net.out_strides == (4, 8, 16, 32)
    net.train()
    assert not net.conv2.training
    assert not net.norm2.training
    assert not net.conv2.weight.requires_grad
    assert net.layer1[0].conv1.weight.requires_grad


def test_what_super_is_handed_is_checked(images):
    class Forgetful(ResNet):
        def forward(self, x):
            return super().forward(x[0])

    with pytest.raises(ValueError, match=r"Forgetful takes images of shape \(N, 3, H, W\), got \(3, 64, 64\)"):
        Forgetful(**TINY)(images)


class HandBuilt(ResNet):
    """A constructor that does everything itself, as several of mmdet's do."""

    def __init__(self, out_indices=(0, 1), frozen_stages=-1, norm_eval=True, init_cfg=None):
        super(ResNet, self).__init__(init_cfg)
        self.in_channels = 3
        self.stem_channels = self.inplanes = 8
        self.conv_cfg, self.norm_cfg, self.norm_eval = None, {"type": "BN"}, norm_eval
        self.deep_stem, self.frozen_stages, self.out_indices = False, frozen_stages, out_indices
        self._make_stem_layer(3, 8)
        self.res_layers = []
        for index, planes in enumerate((8, 16)):
            layer = self.make_res_layer(
                block=BasicBlock, inplanes=self.inplanes, planes=planes, num_blocks=1, stride=index + 1
            )
            self.inplanes = planes
            self.add_module(f"layer{index + 1}", layer)
            self.res_layers.append(f"layer{index + 1}")
        self._freeze_stages()


def test_a_constructor_that_skips_ours_has_a_feature_info_all_the_same(images):
    net = HandBuilt(out_indices=("stem", 0, 1))
    assert net.feature_info == (
        FeatureInfo("stem", -1, 8, 2),
        FeatureInfo("layer1", 0, 8, 4),
        FeatureInfo("layer2", 1, 16, 8),
    )
    assert [tuple(out.shape[1:]) for out in net(images)] == [(8, 32, 32), (8, 16, 16), (16, 8, 8)]


def test_it_is_built_from_a_config(registry):
    registry.register_module(module=WithDepth)
    net = build_backbone({"type": "WithDepth", **TINY})
    assert len(net(torch.randn(1, 4, 64, 64))) == 4


class SqueezedBlock(Bottleneck):
    """A block with a forward pass of its own, in mmdet's words."""

    expansion = 2

    def __init__(self, inplanes, planes, ratio=2, **kwargs):
        super().__init__(inplanes, planes, **kwargs)
        self.squeeze = nn.Conv2d(planes * self.expansion, planes * self.expansion // ratio, 1)

    def forward(self, x):  # type: ignore[override]
        identity = x
        out = self.relu(self.norm1(self.conv1(x)))
        if self.with_plugins:
            out = self.forward_plugin(out, self.after_conv1_plugin_names)
        out = self.relu(self.norm2(self.conv2(out)))
        out = self.norm3(self.conv3(out))
        out = out * self.squeeze(out).mean().sigmoid()
        if self.downsample is not None:
            identity = self.downsample(x)
        return self.relu(out + identity)


class SqueezedResNet(ResNet):
    arch_settings = {26: (SqueezedBlock, (2, 2, 2, 2))}  # noqa: RUF012  # as users write it

    def __init__(self, ratio=4, **kwargs):
        self.ratio = ratio
        super().__init__(**kwargs)

    def make_res_layer(self, **kwargs):
        return ResLayer(ratio=self.ratio, **kwargs)


def test_a_subclass_with_another_block_and_expansion_works(images):
    net = SqueezedResNet(depth=26, frozen_stages=2, with_cp=True, base_channels=8).train()
    assert net.out_channels == (16, 32, 64, 128)
    assert [out.shape[1] for out in net(images)] == [16, 32, 64, 128]
    assert net.layer1[0].squeeze.out_channels == 4
    assert net.feat_dim == 128
    net.init_weights()
    assert not any(block.norm3.weight.any() for stage in net.res_layers for block in getattr(net, stage))


class LargeStrideStem(ResNet):
    def _make_stem_layer(self, in_channels, stem_channels):
        super()._make_stem_layer(in_channels, stem_channels)
        self.maxpool = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1))


def test_a_subclass_with_another_stem_reports_its_stride(images):
    net = LargeStrideStem(18, frozen_stages=0, base_channels=8)
    assert net.out_strides == (8, 16, 32, 64)
    assert [64 // out.shape[2] for out in net(images)] == [8, 16, 32, 64]


class OldBlock(nn.Module):
    """A block that shares nothing with ours and knows only mmdet's arguments."""

    expansion = 1

    def __init__(
        self, inplanes, planes, stride=1, dilation=1, downsample=None, style="pytorch", with_cp=False, conv_cfg=None,
        norm_cfg=None, dcn=None, plugins=None, init_cfg=None,
    ):  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation)
        self.downsample = downsample or nn.Identity()

    def forward(self, x):
        return self.conv(x) + self.downsample(x)


def test_a_block_that_knows_only_mmdets_arguments_works(images):
    class OldResNet(ResNet):
        arch_settings = {10: (OldBlock, (1, 1, 1, 1))}  # noqa: RUF012

    net = OldResNet(10, dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1), base_channels=8)
    assert [tuple(out.shape[1:]) for out in net(images)] == [(8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 4, 4)]


class HandBuiltResNet(ResNet):
    """A constructor that skips ResNet's, as mmdet's RegNet and DetectoRS do."""

    def __init__(self, frozen_stages=-1, init_cfg=None):
        super(ResNet, self).__init__(init_cfg)
        self.in_channels = 3
        self.conv_cfg, self.norm_cfg, self.norm_eval = None, {"type": "BN"}, False
        self.deep_stem, self.frozen_stages, self.out_indices = False, frozen_stages, (0, 1)
        self._make_stem_layer(3, 8)
        self.res_layers = []
        for index, (inplanes, planes) in enumerate(((8, 8), (8, 16))):
            layer = self.make_res_layer(
                block=BasicBlock,
                inplanes=inplanes,
                planes=planes,
                num_blocks=1,
                stride=index + 1,
                norm_cfg=self.norm_cfg,
            )
            self.add_module(f"layer{index + 1}", layer)
            self.res_layers.append(f"layer{index + 1}")
        self._freeze_stages()


@pytest.mark.parametrize("frozen_stages", [-1, 1])
def test_a_subclass_that_builds_by_hand_runs_and_freezes(images, frozen_stages):
    net = HandBuiltResNet(frozen_stages).train()
    assert [tuple(out.shape[1:]) for out in net(images)] == [(8, 16, 16), (16, 8, 8)]
    frozen = frozen_stages >= 0
    for part in (net.conv1, net.norm1, net.layer1):
        assert all(parameter.requires_grad is not frozen for parameter in part.parameters())
    assert net.norm1.training is not frozen
    assert all(parameter.requires_grad for parameter in net.layer2.parameters())
