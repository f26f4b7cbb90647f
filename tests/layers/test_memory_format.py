"""The memory format of what is returned: contiguous unless channels_last was asked for, as plain layers have it."""

import copy

import pytest
import torch
from cases import every_case, make
from torch import nn

from resbackbone import DetectoRS_ResNet, ResNet, ResNetV1d, SharedHead
from resbackbone.inference import optimize, quantize
from resbackbone.integrations._mmcv import _guarded
from resbackbone.layers import ConvNormAct
from resbackbone.layers.conv_norm import set_folding
from resbackbone.layers.memory_format import is_channels_last, to_contiguous
from resbackbone.necks import FPN
from resbackbone.training import fold_frozen_norms

CL = torch.channels_last
FORMATS = [torch.contiguous_format, CL]
every_format = pytest.mark.parametrize("format_", FORMATS, ids=["contiguous", "channels_last"])

MAKERS = {
    "onednn": lambda net, images: optimize(net),
    "bfloat16": lambda net, images: optimize(net, "bfloat16"),
    "eager": lambda net, images: optimize(net, backend="eager"),
    "not prepacked": lambda net, images: optimize(net, prepack_bytes=0),
    "quantize": lambda net, images: quantize(net, images),
    "compile": lambda net, images: optimize(net, backend="compile"),
    "folding": lambda net, images: fold_frozen_norms(copy.deepcopy(net)),
}


def tensors(outs):
    if isinstance(outs, torch.Tensor):
        return [outs]
    return [tensor for out in (outs.values() if isinstance(outs, dict) else outs) for tensor in tensors(out)]


def formats(outs):
    return ["channels_last" if is_channels_last(out) else out.is_contiguous() for out in tensors(outs)]


class Named(nn.Module):
    """Returns nested outputs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        c2, *others = self.net(x)
        return {"first": c2, "others": [tuple(others)]}


@every_format
@pytest.mark.parametrize("wrap", [lambda net: net, Named], ids=["tuple", "nested"])
@pytest.mark.parametrize("maker", [name for name in MAKERS if name != "compile"])
def test_outputs_have_the_format_that_was_asked_for(randomize_norms, images, maker, wrap, format_):
    net = wrap(randomize_norms(ResNetV1d(18, base_channels=8))).eval()
    images = images.contiguous(memory_format=format_)
    fast = MAKERS[maker](net, images)
    for _ in range(3):  # a size that comes back gets weights of its own
        with torch.no_grad():
            assert formats(fast(images)) == formats(net(images))


@pytest.mark.slow
@every_format
def test_compiled_outputs_have_the_format_that_was_asked_for(randomize_norms, images, format_):
    net = randomize_norms(ResNet(18, base_channels=8, stage_blocks=(1, 1, 1, 1))).eval()
    images = images.contiguous(memory_format=format_)
    assert formats(optimize(net, backend="compile")(images)) == formats(net(images))


@every_case
@pytest.mark.filterwarnings("ignore:folding has no effect:UserWarning")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_folding_net_returns_the_plain_nets_format(images, case, mode):
    net = make(case, norm_eval=True)
    getattr(net, mode)()
    for weights in FORMATS:
        for format_ in FORMATS:
            plain = net.to(memory_format=weights)
            given = images.contiguous(memory_format=format_)
            outs = formats(fold_frozen_norms(copy.deepcopy(plain))(given))
            if weights is format_ is torch.contiguous_format:
                assert outs == [True] * len(outs)
            else:  # instance norms return contiguous maps all the same, and folding may keep what was asked for
                expected = formats(plain(given))
                assert all(got in (wanted, "channels_last") for got, wanted in zip(outs, expected, strict=True))


@pytest.mark.parametrize("with_cp", [False, True, "norms"])
def test_recomputing_changes_no_format_and_no_gradient(randomize_norms, images, with_cp):
    net = randomize_norms(ResNet(50, base_channels=8, with_cp=with_cp)).train()
    folding = fold_frozen_norms(copy.deepcopy(net))
    for each in (net, folding):
        outs = each(images)
        assert formats(outs) == [True] * 4
        sum(out.square().mean() for out in outs).backward()
    for (name, expected), (_, got) in zip(net.named_parameters(), folding.named_parameters(), strict=True):
        assert (got.grad - expected.grad).abs().max() <= 1e-5 * expected.grad.abs().max(), name


def layers_and_inputs():
    norm_cfg = {"type": "BN"}
    yield "ConvNormAct", ConvNormAct(16, 8, 3, norm_cfg=norm_cfg), torch.randn(2, 16, 9, 8)
    yield "FPN", FPN([16, 32], 8, 3, norm_cfg=norm_cfg), [torch.randn(2, 16, 8, 8), torch.randn(2, 32, 4, 4)]
    yield "SharedHead", SharedHead(18, stage=1), torch.randn(3, 64, 7, 7)
    net = ResNet(50, base_channels=8)
    yield "a stage", net.layer1, torch.randn(2, 8, 8, 8)
    yield "a block", net.layer1[1], torch.randn(2, 32, 8, 8)
    yield "a shortcut", net.layer1[0].downsample, torch.randn(2, 8, 8, 8)


@pytest.mark.parametrize("name", [name for name, _, _ in layers_and_inputs()])
@every_format
def test_layers_that_foreign_code_calls_one_by_one(name, format_):
    layer, given = next((layer, given) for found, layer, given in layers_and_inputs() if found == name)
    layer = layer.eval()
    given = (
        [x.contiguous(memory_format=format_) for x in given]
        if isinstance(given, list)
        else given.to(memory_format=format_)
    )
    expected = layer(given)
    set_folding(layer, True)
    outs = layer(given)
    assert formats(outs) == formats(expected)
    for out, reference in zip(tensors(outs), tensors(expected), strict=True):
        assert torch.allclose(out, reference, atol=1e-5)


@every_format
def test_the_second_look_of_detectors(images, format_):
    net = make("DetectoRS_ResNet", rfp_inplanes=4, norm_eval=True).train()
    fed = [torch.randn(2, 4, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)]
    images, *fed = (x.contiguous(memory_format=format_) for x in (images, *fed))
    expected = net.rfp_forward(images, fed)
    assert isinstance(net, DetectoRS_ResNet)
    assert formats(fold_frozen_norms(net).rfp_forward(images, fed)) == formats(expected)


def test_a_subclass_with_its_own_forward(randomize_norms, images):
    class TwoStems(ResNet):
        def forward(self, x):
            x = self.maxpool(self.relu(self.conv_norm(x, self.conv1, self.norm1)))
            return {"two": self.layer2(self.layer1(x)), "again": [self.layer1(x)]}

    net = fold_frozen_norms(randomize_norms(TwoStems(18, base_channels=8)).train())
    assert formats(net(images)) == [True, True]


def test_foreign_models_get_contiguous_maps_from_each_part(randomize_norms, images):
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = randomize_norms(ResNet(18, base_channels=8))
            self.neck = FPN(self.backbone.out_channels, 8, 5, norm_cfg={"type": "BN"})

        def forward(self, x):
            self.seen = self.backbone(x)
            return self.neck(self.seen)

    model = fold_frozen_norms(Foreign()).eval()
    outs = model(images)
    assert formats(model.seen) == [True] * 4
    assert formats(outs) == [True] * 5


def test_after_an_error_the_next_call_is_as_ever(randomize_norms, images):
    net = fold_frozen_norms(randomize_norms(ResNet(18, base_channels=8)).train())
    with pytest.raises(ValueError, match="takes images of shape"):
        net(images[:, :2])
    assert formats(net(images)) == [True] * 4


def test_one_channel_and_one_pixel_count_as_contiguous():
    assert not is_channels_last(torch.zeros(2, 1, 4, 4).contiguous(memory_format=CL))
    assert not is_channels_last(torch.zeros(2, 4, 1, 1).contiguous(memory_format=CL))
    assert not is_channels_last(torch.zeros(4, 4))
    assert is_channels_last(torch.zeros(1, 3, 4, 4).contiguous(memory_format=CL))
    net = optimize(ResNet(18, base_channels=8, in_channels=1).eval())
    assert formats(net(torch.zeros(2, 1, 64, 64).contiguous(memory_format=CL))) == [True] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 16, 32, 40), (1, 17, 33, 32), (2, 3, 64, 64), (0, 16, 32, 32)])
def test_contiguous_copies_of_large_maps(dtype, shape):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=CL).requires_grad_()
    out = to_contiguous([x])[0]
    assert out.is_contiguous()
    assert torch.equal(out, x)
    pull = torch.randn(shape).to(dtype)
    (grad,) = torch.autograd.grad(out, x, pull)
    assert torch.equal(grad, pull)


def test_contiguous_copies_of_large_maps_differentiate_twice():
    x = torch.randn(1, 16, 32, 32, dtype=torch.float64).contiguous(memory_format=CL).requires_grad_()
    out = to_contiguous(x).pow(3).sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.allclose(second, 6 * x)


@pytest.mark.parametrize("signature", ["(input: Tensor, output: Tensor) -> None", "", "(*args, **kwargs)"])
@pytest.mark.parametrize("num_positional", [0, 1, 2])
def test_guarded_operators_read_tensors_given_by_position_and_by_keyword(signature, num_positional):
    def operator(*args, **kwargs):
        given = dict(zip(("input", "output"), args, strict=False)) | kwargs
        assert all(tensor.is_contiguous() for tensor in given.values())
        given["output"].copy_(given["input"] + 1)

    operator.__doc__ = f"operator{signature}"
    maps = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    before, out = maps.clone(), torch.zeros_like(maps)
    given = {"input": maps, "output": out}
    _guarded(operator)(*list(given.values())[:num_positional], **dict(list(given.items())[num_positional:]))
    assert torch.equal(maps, before)
    assert torch.equal(out, before + 1)
