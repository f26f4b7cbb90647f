"""``norm_eval`` holds from construction on, whether anybody calls ``train()`` or not, in every class."""

import copy
import pickle
import warnings

import pytest
import torch
from cases import CASES, arguments_of, every_case, make
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone import MODELS, ResNet, ResNetV1d, build_backbone
from resbackbone.backbones import Backbone, ResNetV2, SharedHead
from resbackbone.checkpoints import load_checkpoint
from resbackbone.layers import build_norm_layer
from resbackbone.training import fold_frozen_norms, freeze, sync_batch_norms

TINY = {"depth": 18, "base_channels": 8}


def batch_norms(net):
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]


def statistics(net):
    return {name: buffer.clone() for name, buffer in net.named_buffers() if "running" in name or "num_batches" in name}


def assert_nothing_moves(net, images):
    before = statistics(net)
    assert net.training
    net(images)
    net(images)
    assert [name for name, buffer in statistics(net).items() if not torch.equal(buffer, before[name])] == []


@every_case
def test_statistics_stay_where_nobody_calls_train(images, case):
    net = make(case, norm_eval=True)
    assert_nothing_moves(net, images)
    modes = {name: module.training for name, module in net.named_modules()}
    net.train()
    assert {name: module.training for name, module in net.named_modules()} == modes


@every_case
def test_without_norm_eval_norms_follow_the_batch_as_before(images, case):
    net = make(case, norm_eval=False)
    assert all(norm.training for norm in batch_norms(net))
    assert all(module.training for module in net.modules() if not list(module.children()))


def replaced_by_torch(net):
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


def replaced_by_mmengine(net):
    from mmengine.model import revert_sync_batchnorm

    return revert_sync_batchnorm(replaced_by_torch(net))


def synced(net):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "in one process")
        return sync_batch_norms(net)


def loaded(net):
    net.load_state_dict({key: value + 1 for key, value in make("ResNetV1d").state_dict().items()})
    return net


def initialized(net):
    net.init_weights()
    return net


def unfrozen(net):
    net.freeze(2)
    freeze(nn.Sequential(net), -1)
    return net


DOORS = [
    copy.deepcopy,
    lambda net: pickle.loads(pickle.dumps(net)),
    loaded,
    initialized,
    unfrozen,
    replaced_by_torch,
    replaced_by_mmengine,
    synced,
    fold_frozen_norms,
    lambda net: net.double().float(),
    lambda net: net.to(memory_format=torch.channels_last),
]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_what_is_done_to_a_net_leaves_its_norms_in_eval(images, door):
    net = door(make("ResNetV1d", norm_eval=True))
    assert batch_norms(net)
    assert not any(norm.training for norm in batch_norms(net))
    if door is not replaced_by_torch:  # whose norms want a GPU
        assert_nothing_moves(net, images)


def test_after_loading_a_checkpoint(images, tmp_path):
    torch.save(make("ResNet").state_dict(), tmp_path / "net.pth")
    net = make("ResNet", norm_eval=True)
    load_checkpoint(net, tmp_path / "net.pth")
    assert_nothing_moves(net, images)
    config = {"type": "ResNet", **arguments_of("ResNet", norm_eval=True)}
    assert_nothing_moves(build_backbone(config, checkpoint=tmp_path / "net.pth"), images)
    assert_nothing_moves(MODELS.build(config), images)


def test_the_shared_head(images):
    for net_class in (SharedHead, type("Mine", (SharedHead,), {})):
        assert_nothing_moves(net_class(18), torch.randn(2, 256, 7, 7))
        assert all(norm.training for norm in batch_norms(net_class(18, norm_eval=False)))


class WithMoreNorms(ResNetV1d):
    """Norms beside ours, as a subclass for mmdet adds them: after the inherited constructor."""

    def __init__(self, depth, **kwargs):
        super().__init__(depth, **kwargs)
        _, self.norm1_d = build_norm_layer(self.norm_cfg, self.stem_channels)
        self.head = nn.Sequential(nn.Conv2d(64, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        x = self.maxpool(self.norm1_d(self.stem(x)))
        for name in self.res_layers:
            x = getattr(self, name)(x)
        return self.head(x)


class Below(WithMoreNorms):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bn_last = nn.SyncBatchNorm(8)


class Mixin:
    def __init__(self, *args, name="", **kwargs):
        super().__init__(*args, **kwargs)
        self.name = name


class MixedIn(Mixin, WithMoreNorms):
    """The outermost constructor is none of ours."""


class ByHand(ResNet):
    def __init__(self, depth, init_cfg=None, **kwargs):
        super(ResNet, self).__init__(init_cfg)
        self.deep_stem, self.frozen_stages, self.out_indices = False, -1, (0,)
        self.conv_cfg, self.norm_cfg, self.norm_eval = None, {"type": "BN"}, True
        self._make_stem_layer(3, 8)
        layer = self.make_res_layer(block=self.arch_settings[18][0], inplanes=8, planes=8, num_blocks=1)
        self.add_module("layer1", layer)
        self.res_layers = ["layer1"]


@pytest.mark.parametrize("net_class", [WithMoreNorms, Below, MixedIn, ByHand])
def test_norms_that_a_subclass_adds(images, net_class):
    net = net_class(**TINY)
    assert not any(norm.training for norm in batch_norms(net))
    assert_nothing_moves(net, images)
    assert_nothing_moves(copy.deepcopy(net), images)


def test_a_subclass_that_turns_norm_eval_off_keeps_norms_in_train_mode():
    class Off(ResNet):
        def __init__(self, depth, **kwargs):
            super().__init__(depth, **kwargs)
            self.norm_eval = False

    assert all(norm.training for norm in batch_norms(Off(**TINY)))


def test_a_norm_behind_the_last_stage(images):
    net = ResNetV2(**TINY, final_norm=True)
    assert not net.bn.training
    assert_nothing_moves(net, images)


def test_inside_of_a_model_that_trains(images):
    model = nn.Sequential(build_backbone({"type": "ResNet", **TINY}))
    assert_nothing_moves(model, images)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_signatures_and_errors_of_constructors_stay():
    with pytest.raises(TypeError, match="unexpected keyword argument 'dept'"):
        ResNet(18, **{"dept": 1})
    with pytest.warns(FutureWarning, match="old spelling") as warned:
        ResNet(**TINY, pretrained="net.pth")
    assert warned[0].filename == __file__
    assert all(issubclass(cls, Backbone) for cls in (WithMoreNorms, Below, MixedIn, ByHand))
    assert len(CASES) > 20
