"""The layers of deformable convolution: their arguments, keys, initialization and old checkpoints."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from resbackbone.layers import DeformConv2d, ModulatedDeformConv2d, Module, build_conv_layer
from resbackbone.layers.deform_conv import rename_old_offsets
from resbackbone.registry import MODELS

both = pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2d], ids=("v1", "v2"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groups": 3}, ValueError, r"`groups` must divide `in_channels` \(=4\), got 3"),
        ({"groups": 4}, ValueError, r"`groups` must divide `out_channels` \(=6\), got 4"),
        ({"deform_groups": 3}, ValueError, r"`deform_groups` must divide `in_channels` \(=4\), got 3"),
        ({"groups": 0}, ValueError, "`groups` must be at least 1, got 0"),
        ({"stride": 0}, ValueError, r"`stride\[0\]` must be at least 1, got 0"),
        ({"padding": -1}, ValueError, r"`padding\[0\]` must be at least 0, got -1"),
        ({"dilation": (1, 2, 3)}, ValueError, r"`dilation` must have 2 entries \(vertical, horizontal\), got 3"),
        ({"padding": "same"}, TypeError, "`padding` must be a list or tuple, got 'same' of type str"),
        ({"deform_groups": 1.0}, TypeError, "`deform_groups` must be an integer, got 1.0 of type float"),
        ({"bias": "auto"}, TypeError, "`bias` must be True or False, got 'auto'"),
        (
            {"backend": "mmvc"},
            ValueError,
            "`backend` must be one of 'auto', 'mmcv', 'torchvision', 'torch'; got 'mmvc'",
        ),
    ],
)
@both
def test_wrong_arguments_are_refused(
    cls: type[DeformConv2d], arguments: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cls(4, 6, 3, **arguments)


@both
def test_deformable_groups_is_a_deprecated_name(cls: type[DeformConv2d]) -> None:
    with pytest.warns(FutureWarning, match="`deformable_groups` is deprecated, write `deform_groups`"):
        assert cls(4, 6, 3, deformable_groups=2).deform_groups == 2
    with (
        pytest.warns(FutureWarning, match="deprecated"),
        pytest.raises(
            ValueError, match=r"`deform_groups` \(=4\) and its .* `deformable_groups` \(=2\) must not differ"
        ),
    ):
        cls(4, 6, 3, deform_groups=4, deformable_groups=2)


def test_registered_names_build_the_layers() -> None:
    assert type(MODELS.build({"type": "DCN", "in_channels": 4, "out_channels": 6, "kernel_size": 3})) is DeformConv2d
    cfg = {"type": "DCNv2", "deform_groups": 2}
    layer = build_conv_layer(cfg, 4, 6, 3, stride=2, padding=1, bias=False)
    assert type(layer) is ModulatedDeformConv2d
    assert (layer.stride, layer.deform_groups, layer.bias) == ((2, 2), 2, None)
    assert "deform_groups=2, bias=False, backend='auto'" in repr(layer)


def test_state_dict_has_mmcv_keys_and_shapes() -> None:
    shapes = {key: tuple(value.shape) for key, value in DeformConv2d(4, 6, 3, deform_groups=2).state_dict().items()}
    assert shapes == {"weight": (6, 4, 3, 3), "conv_offset.weight": (36, 4, 3, 3), "conv_offset.bias": (36,)}
    shapes = {key: tuple(value.shape) for key, value in ModulatedDeformConv2d(4, 6, 3, groups=2).state_dict().items()}
    expected = {"weight": (6, 2, 3, 3), "bias": (6,), "conv_offset.weight": (27, 4, 3, 3), "conv_offset.bias": (27,)}
    assert shapes == expected


@pytest.mark.parametrize("as_hook", [True, False])
@both
def test_old_key_names_load(cls: type[DeformConv2d], as_hook: bool) -> None:
    source, target = (nn.ModuleDict({"layer4": nn.ModuleDict({"conv2": cls(4, 6, 3)})}) for _ in range(2))
    nn.init.constant_(target["layer4"]["conv2"].conv_offset.weight, 7.0)
    new = source.state_dict()
    old = {key.replace("conv2.conv_offset", "conv2_offset"): value for key, value in new.items()}
    if as_hook:
        target["layer4"].register_load_state_dict_pre_hook(rename_old_offsets)
    else:
        rename_old_offsets(target, old)
    target.load_state_dict(old, strict=True)
    assert ("layer4.conv2_offset.weight" in old) is as_hook  # torch gives hooks a copy of what the caller holds
    assert all(torch.equal(value, new[key]) for key, value in target.state_dict().items())


def test_only_old_key_names_are_renamed() -> None:
    net = nn.ModuleDict({"conv1": DeformConv2d(4, 6, 3), "conv2": DeformConv2d(4, 6, 3), "conv2_offset": nn.ReLU()})
    state = net.state_dict() | {"conv1_offset.weight": torch.zeros(1), "conv2_offset.bias": torch.zeros(1)}
    del state["conv2.conv_offset.bias"]
    kept = dict(state)
    rename_old_offsets(net, state)
    assert state == kept  # conv1 has its key already, and conv2_offset is a module of its own


@both
def test_initialization(cls: type[DeformConv2d]) -> None:
    torch.manual_seed(0)
    layer = cls(64, 32, 3, groups=2, bias=True)
    bound = math.sqrt(6 / (32 * 9)) if cls is DeformConv2d else 1 / math.sqrt(64 * 9)
    assert 0.99 * bound < layer.weight.abs().max() <= bound
    assert layer.bias.eq(0).all()
    assert all(parameter.eq(0).all() for parameter in layer.conv_offset.parameters())


@both
def test_offsets_stay_zero_under_a_kaiming_init_cfg(cls: type[DeformConv2d]) -> None:
    class Parent(Module):
        def __init__(self) -> None:
            super().__init__(init_cfg={"type": "Kaiming", "layer": "Conv2d"})
            self.conv1 = nn.Conv2d(4, 4, 1)
            self.conv2 = cls(4, 6, 3)

    parent = Parent()
    plain, deformable = parent.conv1.weight.clone(), parent.conv2.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmengine's first import uses what torch deprecates
        parent.init_weights()
    assert not torch.equal(parent.conv1.weight, plain)
    assert torch.equal(parent.conv2.weight, deformable)
    assert all(parameter.eq(0).all() for parameter in parent.conv2.conv_offset.parameters())
