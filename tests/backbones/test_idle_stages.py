"""Stages after the last output: neither run nor trained, but in the state dict, and there again when needed."""

import copy
import logging
import pickle
import re

import pytest
import torch
from cases import CASES, every_class, make
from torch import nn

from resbackbone import ResNet, build_backbone
from resbackbone.analysis.cost import measure
from resbackbone.backbones import DetectoRS_ResNet, ResNetRS
from resbackbone.inference import optimize
from resbackbone.training import freeze, param_groups

TINY = {"depth": 18, "base_channels": 8}


def trains(net):
    """The children that train."""
    return [name for name, child in net.named_children() if any(p.requires_grad for p in child.parameters())]


def without_gradient(net, images):
    net.zero_grad()
    sum(out.square().mean() for out in net(images)).backward()
    return [name for name, parameter in net.named_parameters() if parameter.requires_grad and parameter.grad is None]


@every_class
@pytest.mark.parametrize("out_indices", [(0,), (0, 1), ("stem",), ("stem", 1)], ids=str)
@pytest.mark.parametrize("with_cp", [False, "norms"])
def test_every_parameter_that_trains_gets_a_gradient(randomize_norms, images, case, out_indices, with_cp):
    net = randomize_norms(make(case, out_indices=out_indices, with_cp=with_cp)).train()
    assert without_gradient(net, images) == []
    assert "layer3" not in trains(net)


@every_class
def test_outputs_and_keys_are_those_of_the_whole_net(randomize_norms, images, case):
    whole = randomize_norms(make(case, out_indices=(0, 1, 2))).eval()
    net = make(case, out_indices=(0, 1)).eval()
    net.load_state_dict(whole.state_dict())  # strictly
    assert list(net.state_dict()) == list(whole.state_dict())
    assert all(map(torch.equal, net(images), whole(images)))


def test_what_comes_later_does_not_run(images):
    net = build_backbone({"type": "ResNet", **TINY}, out_indices=(0, 1))
    ran = []
    for name in net.res_layers:
        getattr(net, name).register_forward_hook(lambda *_, name=name: ran.append(name))
    net(images)
    assert ran == ["layer1", "layer2"]
    rs = ResNetRS(50, base_channels=8, out_indices=("stem",))
    rs.maxpool.register_forward_hook(lambda *_: ran.append("maxpool"))
    rs(images)
    assert "maxpool" not in ran
    assert trains(rs) == ["stem"]


def test_a_hint_names_the_option(caplog, monkeypatch):
    monkeypatch.setattr("resbackbone.utils.logs._run_logger", lambda: None)  # that of a run in another test
    with caplog.at_level(logging.INFO, logger="resbackbone"):
        ResNet(**TINY, out_indices=(0, 1))
    assert "`num_stages=2, strides=(1, 2), dilations=(1, 1)` leaves it out" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="resbackbone"):
        ResNet(**TINY, out_indices=(0, 3))
    assert caplog.text == ""


GIVEN = {
    "nothing": {},
    "dilated": {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)},
    "dcn": {"dcn": {"type": "DCNv2", "backend": "torch"}, "stage_with_dcn": (False, True, True, True)},
    "dcn_behind": {"dcn": {"type": "DCNv2", "backend": "torch"}, "stage_with_dcn": (False, False, False, True)},
    "plugins": {
        "plugins": [
            {"cfg": {"type": "SELayer", "ratio": 4}, "position": "after_conv2", "stages": (False, True, True, False)},
            {"cfg": {"type": "SELayer", "ratio": 4, "postfix": "_a"}, "position": "after_conv2"},
        ]
    },
    "multi_grid": {"depth": 50, "multi_grid": (1, 2, 4)},
    "stage_blocks": {"stage_blocks": (1, 2, 1, 1)},
    "stage_blocks_and_multi_grid": {"stage_blocks": (1, 2, 1, 2), "multi_grid": (1, 2)},
    "drop_path_rate": {"drop_path_rate": 0.2},
    "frozen_stages": {"frozen_stages": 4},
}


def named_arguments(caplog, make_net):
    """Build a net; return it and the arguments that the line in the log names."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="resbackbone"):
        net = make_net()
    found = re.search(r"; `(.*)` leaves it out", caplog.text)
    return net, eval(f"dict({found[1]})") if found else {}


def assert_same_outputs(randomize_norms, images, net, shorter):
    randomize_norms(net).eval()
    kept = shorter.state_dict().keys()
    shorter.load_state_dict({name: value for name, value in net.state_dict().items() if name in kept})
    assert len(shorter.res_layers) < len(net.res_layers)
    assert shorter.feature_info == net.feature_info
    for out, reference in zip(shorter.eval()(images), net(images), strict=True):
        assert torch.equal(out, reference)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("out_indices", [(0, 1), (1,), (-3, -4), ("stem", 0), ("stem",)], ids=str)
def test_the_hint_can_be_followed(randomize_norms, images, caplog, monkeypatch, given, out_indices):
    monkeypatch.setattr("resbackbone.utils.logs._run_logger", lambda: None)
    if given == "plugins" and out_indices != (0, 1):
        pytest.skip("one is enough")
    config = {**TINY, **GIVEN[given], "out_indices": out_indices}
    if given == "plugins":
        config["depth"] = 50
    net, arguments = named_arguments(caplog, lambda: ResNet(**config))
    assert arguments["num_stages"] == max([index % 4 for index in out_indices if index != "stem"], default=0) + 1
    shorter, further = named_arguments(caplog, lambda: ResNet(**config | arguments))
    assert not further
    assert shorter.frozen_stages == min(net.frozen_stages, arguments["num_stages"])
    assert_same_outputs(randomize_norms, images, net, shorter)
    for name in shorter.res_layers:
        rates = [[getattr(block, "drop_path_rate", 0) for block in getattr(one, name)] for one in (shorter, net)]
        assert rates[0] == pytest.approx(rates[1])


@every_class
def test_the_hint_can_be_followed_with_every_class(randomize_norms, images, caplog, monkeypatch, case):
    monkeypatch.setattr("resbackbone.utils.logs._run_logger", lambda: None)
    net, arguments = named_arguments(caplog, lambda: make(case, out_indices=(0, 1)))
    assert "neither run nor trained" in caplog.text
    assert bool(arguments) is (case not in ("RegNet", "TridentResNet"))  # which have no fewer stages
    if arguments:
        assert_same_outputs(randomize_norms, images, net, make(case, out_indices=(0, 1), **arguments))


@pytest.mark.parametrize("flags", [(False, True, True, True), (False, False, True, True)])
def test_the_hint_can_be_followed_with_switchable_convolutions(randomize_norms, images, caplog, monkeypatch, flags):
    monkeypatch.setattr("resbackbone.utils.logs._run_logger", lambda: None)
    sac = {"type": "SAC", "use_deform": False}
    config = {"base_channels": 8, "out_indices": (0, 1), "sac": sac, "stage_with_sac": flags}
    net, arguments = named_arguments(caplog, lambda: DetectoRS_ResNet(50, **config))
    assert_same_outputs(randomize_norms, images, net, DetectoRS_ResNet(50, **config | arguments))


def test_no_hint_names_what_a_constructor_does_not_take(caplog, monkeypatch):
    class Fixed(ResNet):
        def __init__(self, width):
            super().__init__(18, base_channels=width, out_indices=(0,))

    monkeypatch.setattr("resbackbone.utils.logs._run_logger", lambda: None)
    assert named_arguments(caplog, lambda: Fixed(8))[1] == {}
    assert caplog.messages[-1].endswith("neither run nor trained")


def test_the_features_that_are_fed_back_end_there_too(images):
    net = DetectoRS_ResNet(50, base_channels=8, rfp_inplanes=4, out_indices=(0, 1)).train()
    feedback = [torch.randn(2, 4, side, side) for side in (16, 8, 4, 2)]
    outs = net.rfp_forward(images, feedback)
    assert len(outs) == 2
    sum(out.square().mean() for out in outs).backward()
    assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("frozen_stages", [-1, 1, 4])
def test_freezing_and_unfreezing_leave_it_so(images, frozen_stages):
    net = ResNet(**TINY, out_indices=(0, 1), norm_eval=False, frozen_stages=frozen_stages)
    assert not {"layer3", "layer4"} & set(trains(net))
    freeze(nn.Sequential(net), -1)
    assert trains(net) == ["conv1", "bn1", "layer1", "layer2"]
    assert without_gradient(net.train(), images) == []
    net.freeze(4)
    assert trains(net) == []
    net.freeze(-1)
    assert trains(net) == ["conv1", "bn1", "layer1", "layer2"]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert trains(twin.train()) == trains(net)


@pytest.mark.parametrize("frozen_stages", [-1, 4])
def test_a_stage_that_is_needed_again_trains_again(images, frozen_stages):
    net = ResNet(**TINY, out_indices=(0, 1), frozen_stages=frozen_stages)
    net.out_indices = (0, 1, 2)
    net.train()
    assert len(net(images)) == 3
    assert ("layer3" in trains(net)) is (frozen_stages < 0)
    assert "layer4" not in trains(net)
    net.freeze(-1)
    assert "layer3" in trains(net)


def test_a_wrapper_around_forward_changes_nothing(images):
    net = ResNet(**TINY, out_indices=(0,))
    inherited = net.forward
    net.forward = lambda *args, **kwargs: inherited(*args, **kwargs)  # as libraries for mixed precision do
    assert without_gradient(net.train(), images) == []
    assert trains(net) == ["conv1", "bn1", "layer1"]


def test_somebody_who_runs_a_stage_by_hand_can_train_it(images):
    net = ResNet(**TINY, out_indices=(2,))
    net.layer4.requires_grad_(True)
    net.train()
    net.layer4(net(images)[-1]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.layer4.parameters())


class AllStages(ResNet):
    def forward(self, x):
        x = self.maxpool(self.relu(self.norm1(self.conv1(x))))
        for name in self.res_layers:
            x = getattr(self, name)(x)
        return (x,)


class OneMore(ResNet):
    def forward(self, x):
        return (self.layer4(super().forward(x)[-1]),)


@pytest.mark.parametrize(("net_class", "out_indices"), [(AllStages, (0, 1)), (OneMore, (2,))])
def test_a_subclass_with_its_own_forward_trains_every_stage(images, net_class, out_indices):
    net = net_class(**TINY, out_indices=out_indices).train()
    assert without_gradient(net, images) == []
    assert trains(net) == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]


def test_a_subclass_that_inherits_forward_does_not():
    assert trains(type("Mine", (ResNet,), {})(**TINY, out_indices=(0,))) == ["conv1", "bn1", "layer1"]


def test_parameter_groups_optimized_nets_and_costs(randomize_norms, images):
    net = randomize_norms(ResNet(**TINY, out_indices=(0, 1))).eval()
    listed = {id(parameter) for group in param_groups(net, lr=0.1, weight_decay=0.1) for parameter in group["params"]}
    assert not listed & {id(parameter) for parameter in net.layer3.parameters()}
    for out, reference in zip(optimize(net)(images), net(images), strict=True):
        torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-4)
    assert measure(net).params == measure(ResNet(**TINY)).params
    assert len(CASES) > 20
