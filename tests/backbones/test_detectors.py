"""DetectoRS: where its layers stand, the feedback of the recursive feature pyramid, and what upstream gets wrong."""

import copy

import pytest
import torch
from cases import blocks
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone import DetectoRS_ResNet, DetectoRS_ResNeXt, FeatureInfo, ResNet, build_backbone
from resbackbone.blocks.detectors import DetectorsBottleneck
from resbackbone.layers import ConvAWS2d, DeformConv2d, SAConv2d

TINY = {"depth": 50, "base_channels": 8}
GROUPED = {"groups": 4, "base_width": 16}
AWS = {"conv_cfg": {"type": "ConvAWS"}}
SAC = {"sac": {"type": "SAC", "use_deform": True}, "stage_with_sac": (False, True, True, True)}
RFP = {"rfp_inplanes": 6}
BOTH = pytest.mark.parametrize(
    ("net_class", "options"), [(DetectoRS_ResNet, {}), (DetectoRS_ResNeXt, GROUPED)], ids=["ResNet", "ResNeXt"]
)


def build(net_class=DetectoRS_ResNet, **options):
    """Build with initialized weights."""
    return build_backbone({"type": net_class, **TINY, **options})


def feedback(net, images):
    """Random features of the right shapes for ``rfp_forward``, None where they are not used."""
    sizes = [[-(-side // (4 * 2**stage)) for side in images.shape[2:]] for stage in range(net.num_stages)]
    return [None] + [torch.randn(images.shape[0], net.rfp_inplanes, *size) for size in sizes[1:]]


def assert_same(outs, expected):
    assert len(outs) == len(expected)
    for out, reference in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, reference, rtol=0, atol=0)


# Where the layers stand


@BOTH
def test_sac_is_in_its_stages_and_every_other_convolution_is_of_conv_cfg(net_class, options):
    net = net_class(**TINY, **AWS, **SAC, **options)
    for stage, name in enumerate(net.res_layers):
        for block in getattr(net, name):
            assert type(block.conv2) is (SAConv2d if stage > 0 else ConvAWS2d)
            assert type(block.conv1) is type(block.conv3) is ConvAWS2d
            assert block.with_sac is (stage > 0)
            assert block.conv2.groups == options.get("groups", 1)
    assert net.layer2[0].conv2.stride == (2, 2)
    assert all(block.conv2.use_deform and block.conv2.bias is None for block in net.layer4)
    assert type(net.conv1) is type(net.layer1[0].downsample[0]) is ConvAWS2d


def test_caffe_style_strides_before_the_sac():
    net = DetectoRS_ResNet(**TINY, **SAC, style="caffe")
    assert (net.layer3[0].conv1.stride, net.layer3[0].conv2.stride) == ((2, 2), (1, 1))


def test_a_dilated_sac_keeps_the_size(randomize_norms):
    net = randomize_norms(DetectoRS_ResNet(**TINY, **SAC, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)))
    assert net.layer4[1].conv2.dilation == net.layer4[1].conv2.padding == (2, 2)
    assert [tuple(out.shape[2:]) for out in net(torch.randn(1, 3, 65, 97))] == [(17, 25), (9, 13), (5, 7), (5, 7)]


@BOTH
def test_feedback_enters_the_first_block_of_every_stage_but_the_first(net_class, options):
    net = net_class(**TINY, **RFP, **options)
    convs = {name: module for name, module in net.named_modules() if name.endswith("rfp_conv")}
    assert list(convs) == ["layer2.0.rfp_conv", "layer3.0.rfp_conv", "layer4.0.rfp_conv"]
    for conv, channels in zip(convs.values(), (64, 128, 256), strict=True):
        assert type(conv) is nn.Conv2d
        assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride) == (6, channels, (1, 1), (1, 1))
        assert conv.bias is not None
    assert [key for key in net_class(**TINY, **options).state_dict() if "rfp" in key] == []


def test_shortcuts_pool_only_where_they_stride():
    """The keys of mmdet's DetectoRS, whose stages differ in this from its ResNet."""
    assert [type(layer) for layer in DetectoRS_ResNet(**TINY, avg_down=True).layer1[0].downsample] == [
        nn.Conv2d,
        nn.BatchNorm2d,
    ]
    assert type(DetectoRS_ResNet(**TINY, avg_down=True).layer2[0].downsample[0]) is nn.AvgPool2d
    assert type(ResNet(**TINY, avg_down=True).layer1[0].downsample[0]) is nn.AvgPool2d


@BOTH
@pytest.mark.parametrize("position", ["after_conv1", "after_conv2", "after_conv3"])
def test_defect_04_plugins_have_the_width_they_follow(net_class, options, position):
    """In mmdet, DetectoRS_ResNeXt builds plugins for ``planes`` channels, which crash in its wider bottlenecks.

    Here, plugins have the width of the preceding convolution.
    """
    plugin = {"cfg": {"type": Width}, "position": position}
    net = net_class(**TINY, **AWS, plugins=[plugin], **options).eval()
    net(torch.randn(1, 3, 32, 32))  # the plugin itself compares its width with what it gets
    width = 8 if net_class is DetectoRS_ResNet else 64
    assert net.layer1[0].width_plugin.in_channels == (32 if position == "after_conv3" else width)


class Width(nn.Module):
    """A plugin that checks its width when it runs."""

    _abbr_ = "width_plugin"

    def __init__(self, in_channels):
        super().__init__()
        self.in_channels = in_channels

    def forward(self, x):
        assert x.shape[1] == self.in_channels
        return x


# What comes out


def test_images_come_first_on_request(images):
    plain, net = build(), build(output_img=True, out_indices=(1, 3))
    net.load_state_dict(plain.state_dict())
    outs = net.eval()(images)
    assert outs[0] is images
    assert_same(outs[1:], plain.eval()(images)[1::2])
    assert net.feature_info[0] == FeatureInfo("image", -1, 3, 1)
    assert [info.name for info in net.feature_info] == ["image", "layer2", "layer4"]
    assert (net.out_channels, net.out_strides) == ((3, 64, 256), (1, 8, 32))
    assert "image" not in [info.name for info in plain.feature_info]


def test_images_that_come_first_have_their_channels():
    net = DetectoRS_ResNet(**TINY, in_channels=5, output_img=True).eval()
    assert net.feature_info[0].channels == net(torch.randn(1, 5, 32, 32))[0].shape[1] == 5


@BOTH
def test_an_ordinary_resnet_checkpoint_keeps_its_features(randomize_norms, net_class, options):
    """A DetectoRS that has learnt nothing yet is the ResNet whose weights it loads."""
    plain_class = net_class.__bases__[-1]
    plain = randomize_norms(plain_class(**TINY, **options)).eval()
    net = build(net_class, **AWS, **SAC, **options).eval()
    report = net.load_state_dict(plain.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all(".conv2." in key for key in report.missing_keys)  # what SAC has beside its weight
    x = torch.randn(2, 3, 128, 128)
    for out, expected in zip(net(x), plain(x), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_features_are_finite_without_a_checkpoint(images):
    """In mmdet they are NaN: ConvAWS starts with filters of deviation 1, and norms in eval mode let that grow."""
    outs = build(**AWS, **SAC, norm_eval=True).train()(images)
    assert all(out.isfinite().all() for out in outs)


@pytest.mark.parametrize("options", [{"style": "caffe"}, {"norm_cfg": {"type": "GN", "num_groups": 4}}], ids=str)
def test_sac_trains(images, options):
    net = build(**AWS, **SAC, norm_eval=False, **options).train()
    with torch.no_grad():
        for block in blocks(net):
            nn.init.ones_(getattr(block, block.norm3_name).weight)
    sum(out.square().mean() for out in net(images)).backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    # At the start the farther convolution and both contexts are switched off, the switch itself is not.
    assert gradients["layer2.1.conv2.switch.weight"].any()
    assert gradients["layer2.1.conv2.offset_s.weight"].any()


# Feedback


@BOTH
@pytest.mark.parametrize("options2", [{}, {"deep_stem": True, "with_cp": True}, {"output_img": True}], ids=str)
def test_feedback_starts_without_effect(randomize_norms, net_class, options, options2):
    net = randomize_norms(build(net_class, **RFP, **AWS, **options, **options2)).eval()
    x = torch.randn(2, 3, 65, 97)
    outs = net(x)
    assert_same(net.rfp_forward(x, feedback(net, x)), outs[1:] if net.output_img else outs)


def test_feedback_is_added_before_the_last_relu(randomize_norms):
    block = randomize_norms(DetectorsBottleneck(32, 8, rfp_inplanes=6)).eval()
    x, rfp_feat = torch.randn(2, 32, 7, 9), torch.randn(2, 6, 7, 9)
    assert block.rfp_conv.weight.any()  # only init_weights() zeroes it
    out = block.relu(block.norm1(block.conv1(x)))
    out = block.norm3(block.conv3(block.relu(block.norm2(block.conv2(out)))))
    expected = (out + x + block.rfp_conv(rfp_feat)).relu()
    assert torch.equal(block.rfp_forward(x, rfp_feat), expected)
    assert not torch.equal(block(x), expected)


def test_feedback_reaches_its_stage_and_those_behind(randomize_norms):
    net = randomize_norms(build(**RFP)).eval()
    x = torch.randn(2, 3, 64, 64)
    before, feats = net(x), feedback(net, x)
    net.layer3[0].rfp_conv.weight.data.normal_()
    assert_same(net.rfp_forward(x, feats)[:2], before[:2])
    assert not torch.equal(net.rfp_forward(x, feats)[2], before[2])
    assert not torch.equal(net.rfp_forward(x, feats)[3], before[3])


def test_feedback_of_some_outputs(randomize_norms):
    net = randomize_norms(build(**RFP, out_indices=(1, 3))).eval()
    x = torch.randn(1, 3, 64, 64)
    assert_same(net.rfp_forward(x, feedback(net, x)), net(x))


def test_feedback_of_a_pyramid_with_further_levels(randomize_norms):
    net = randomize_norms(build(**RFP)).eval()
    x = torch.randn(1, 3, 64, 64)
    assert_same(net.rfp_forward(x, [*feedback(net, x), torch.randn(1, 6, 1, 1)]), net(x))


@pytest.mark.parametrize("with_cp", [False, True, "norms"])
def test_feedback_trains_both_ways(randomize_norms, with_cp):
    """Into the feedback's convolutions and into what is fed back; with checkpointing the same, statistics included."""
    nets = [randomize_norms(build(**RFP, norm_eval=False, with_cp=flag)).train() for flag in (False, with_cp)]
    nets[1].load_state_dict(nets[0].state_dict())
    x, gradients = torch.randn(2, 3, 64, 64), []
    feats = [feat if feat is None else feat.requires_grad_() for feat in feedback(nets[0], x)]
    for net in nets:
        for block in (net.layer2[0], net.layer3[0], net.layer4[0]):
            nn.init.constant_(block.rfp_conv.weight, 0.1)
        sum(out.square().mean() for out in net.rfp_forward(x, feats)).backward()
        gradients.append([feat.grad for feat in feats[1:]])
        for feat in feats[1:]:
            feat.grad = None
        assert net.layer4[0].rfp_conv.weight.grad.any()
        assert {int(norm.num_batches_tracked) for norm in net.modules() if isinstance(norm, _BatchNorm)} == {1}
    assert_same(gradients[1], gradients[0])
    assert all(gradient.any() for gradient in gradients[0])
    for name, parameter in nets[0].named_parameters():
        assert torch.equal(parameter.grad, nets[1].get_parameter(name).grad), name
    for name, buffer in nets[0].named_buffers():
        assert torch.equal(buffer, nets[1].get_buffer(name)), name


def test_feedback_needs_its_entrance(images):
    with pytest.raises(ValueError, match="`rfp_forward` needs a backbone that was built with `rfp_inplanes`, got None"):
        DetectoRS_ResNet(**TINY).rfp_forward(images, [None] * 4)


def test_feedback_needs_one_entry_per_stage(images):
    with pytest.raises(ValueError, match="`rfp_feats` must have one entry per stage, at least 4, got 3"):
        DetectoRS_ResNet(**TINY, **RFP).rfp_forward(images, [None] * 3)


# Initialization: defect 8


@BOTH
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"zero_init_residual": False},
        {"init_cfg": {"type": "Kaiming", "layer": "Conv2d"}},
        {"init_cfg": [{"type": "Normal", "layer": "Conv2d", "std": 0.01, "bias": 1.0}]},
    ],
    ids=str,
)
def test_defect_08_feedback_and_switches_start_at_zero(net_class, options, how):
    """In mmdet, detectors_resnet.py:69 zero-initializes the feedback, but line 296 overwrites it with random weights.

    Here, it is zero after ``init_weights()`` with any other arguments, and SAC starts as a plain convolution.
    """
    net = build(net_class, **RFP, **AWS, **SAC, **options, **how)
    convs = [module for name, module in net.named_modules() if name.endswith("rfp_conv")]
    assert len(convs) == 3
    assert not any(parameter.any() for conv in convs for parameter in conv.parameters())
    for layer in (module for module in net.modules() if isinstance(module, SAConv2d)):
        for part in (layer.pre_context, layer.post_context, layer.offset_s, layer.offset_l):
            assert not part.weight.any()
            assert not part.bias.any()
        assert not layer.weight_diff.any()
        assert not layer.switch.weight.any()
        assert layer.switch.bias.item() == 1
        assert layer.weight.any()
    ends_at_zero = how.get("zero_init_residual", True)
    assert all(bool(block.norm3.weight.any()) is not ends_at_zero for block in blocks(net))


@BOTH
def test_defect_08_layers_are_built_once(built_convs, net_class, options):
    """In mmdet, every stage is built, discarded and built again, in ResNeXt with its blocks twice.

    Here, layers are built once.
    """
    net = net_class(**TINY, **AWS, **SAC, **RFP, **options)
    assert len(built_convs) == sum(isinstance(module, nn.Conv2d) for module in net.modules())


def test_an_ordinary_pretrained_checkpoint_leaves_the_feedback_at_zero(randomize_norms, tmp_path):
    torch.save(randomize_norms(ResNet(**TINY)).state_dict(), tmp_path / "resnet.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "resnet.pth")}
    net = build(**RFP, **AWS, init_cfg=init_cfg)
    assert net.layer2[1].norm3.weight.all()
    assert not net.layer2[0].rfp_conv.weight.any()
    assert not net.layer2[0].rfp_conv.bias.any()
    loaded = net.layer2[1].conv2
    torch.testing.assert_close(loaded.standardized_weight(), loaded.weight, rtol=1e-4, atol=1e-6)


def test_a_pretrained_checkpoint_of_its_own_fills_the_feedback(randomize_norms, tmp_path):
    trained = randomize_norms(DetectoRS_ResNet(**TINY, **RFP, **AWS))
    torch.save(trained.state_dict(), tmp_path / "detectors.pth")
    net = build(**RFP, **AWS, init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "detectors.pth")})
    for key, value in trained.state_dict().items():
        assert torch.equal(net.state_dict()[key], value), key


# Arguments


def test_dcn_and_sac_in_different_stages(randomize_norms):
    dcn = {"type": "DCNv2", "deform_groups": 1, "fallback_on_stride": True}
    sac = {"type": "SAC"}
    before = copy.deepcopy((dcn, sac))
    net = randomize_norms(
        DetectoRS_ResNet(
            **TINY,
            dcn=dcn,
            stage_with_dcn=(False, True, False, False),
            sac=sac,
            stage_with_sac=(False, False, True, False),
        )
    )
    assert type(net.layer2[0].conv2) is nn.Conv2d  # falls back
    assert isinstance(net.layer2[1].conv2, DeformConv2d)
    assert {type(block.conv2) for block in net.layer3} == {SAConv2d}
    assert {type(block.conv2) for block in net.layer4} == {nn.Conv2d}
    assert (dcn, sac) == before
    assert len(net(torch.randn(1, 3, 64, 64))) == 4


@BOTH
@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"depth": 18}, KeyError, "`depth` of DetectoRS_ResNe.* must be one of 50, 101, 152; got 18"),
        ({"sac": "SAC"}, TypeError, "`sac` must be a dict, got 'SAC'"),
        ({"sac": {"use_deform": True}}, KeyError, "`sac` needs a `type`"),
        ({"sac": {"type": "SACC"}}, KeyError, "unknown convolution type 'SACC'; did you mean 'SAC'"),
        ({**SAC, "stage_with_sac": (True, True)}, ValueError, "`stage_with_sac` must have 4 entries"),
        ({**SAC, "stage_with_sac": (0, 1, 1, 1)}, TypeError, r"`stage_with_sac\[0\]` must be True or False"),
        ({"stage_with_sac": True}, TypeError, "`stage_with_sac` must be a list or tuple"),
        ({**SAC, "num_stages": 5}, ValueError, "`num_stages` must be from 1 to 4, got 5"),
        (
            {**SAC, "dcn": {"type": "DCN"}, "stage_with_dcn": (True, False, False, True)},
            ValueError,
            r"`stage_with_sac` and `stage_with_dcn` must not name the same stage, got both for \[3\]",
        ),
        ({**AWS, "dcn": {"type": "DCN"}}, ValueError, "`conv_cfg` must be None where there is `dcn`"),
        ({"rfp_inplanes": 0}, ValueError, "`rfp_inplanes` must be at least 1, got 0"),
        ({"rfp_inplanes": "256"}, TypeError, "`rfp_inplanes` must be an integer"),
        ({"output_img": 1}, TypeError, "`output_img` must be True or False"),
        ({"pretrained": ["a.pth"]}, TypeError, "`pretrained` must be a path, a URL or None"),
        ({"pretrained": "a.pth", "init_cfg": {"type": "Pretrained"}}, ValueError, "`init_cfg` or `pretrained`"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_built(
    built_convs, net_class, options, wrong, error, text
):
    with pytest.raises(error, match=text):
        net_class(**{**TINY, **options, **wrong})
    assert not built_convs


@pytest.mark.parametrize(
    ("init_cfg", "text"), [({"checkpoint": "a.pth"}, "type"), ({"type": "Trained", "checkpoint": "a.pth"}, "Trained")]
)
def test_initializers_that_there_are_not_are_refused(init_cfg, text):
    with pytest.raises(KeyError, match=text):
        build(init_cfg=init_cfg)


def test_a_misspelt_argument_is_answered_with_the_nearest():
    with pytest.raises(TypeError, match="DetectoRS_ResNeXt has no argument 'rfp_inplane'; did you mean 'rfp_inplanes'"):
        build_backbone({"type": "DetectoRS_ResNeXt", "depth": 50, "rfp_inplane": 64})


def test_a_block_has_sac_or_dcn():
    with pytest.raises(ValueError, match="give a block `sac` or `dcn`, not both"):
        DetectorsBottleneck(32, 8, sac={"type": "SAC"}, dcn={"type": "DCN"})


@pytest.mark.slow
def test_every_tracer_follows_a_whole_detectors(randomize_norms):
    net = randomize_norms(build(**AWS, **SAC, output_img=True)).eval()
    x, other = torch.randn(2, 3, 128, 128), torch.randn(1, 3, 160, 131)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(net, (x,), dynamic_shapes=(dynamic,)).module()
    for graph, sample in ((compiled, x), (exported, other), (torch.fx.symbolic_trace(net), other)):
        with torch.no_grad():
            for out, expected in zip(graph(sample), net(sample), strict=True):
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
