"""``init_cfg`` of every module: which initializers it may name, and that checkpoints go through the safe reader."""

import contextlib
import copy
import math
import pickle
from functools import partial
from pathlib import Path

import mmengine.model
import pytest
import torch
from hostile_configs import EVIL, SPELLINGS, TINY, evil_module
from init_cfg_modules import MODULES, PRETRAINED_CONFIGS, Payload, ThirdPartyHolder, ThirdPartyPlugin, fpn
from mmengine.logging import MMLogger
from mmengine.model import BaseInit, BaseModule, PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from resbackbone import MODELS, ResNet, SharedHead, build_backbone
from resbackbone.registry.init_cfg import check_init_cfg
from resbackbone.training.classification import ImageClassifier
from resbackbone.utils import logs

every_module = pytest.mark.parametrize("module", MODULES)
every_pretrained_config = pytest.mark.parametrize("spelling", PRETRAINED_CONFIGS)


@pytest.fixture(params=["pickle", "torch", "old torch"])
def payload(request, tmp_path):
    """A file that leaves a mark if its pickle is run; the test fails if it is there in the end."""
    file, mark = tmp_path / "payload.pth", tmp_path / "mark"
    content = {"state_dict": {"conv1.weight": torch.zeros(1)}, "meta": Payload(mark)}
    if request.param == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=request.param == "torch")
    yield str(file)
    assert not mark.exists()


@every_module
@every_pretrained_config
def test_no_spelling_of_pretrained_runs_what_a_file_holds(payload, module, spelling):
    net = MODULES[module](PRETRAINED_CONFIGS[spelling](payload))
    with pytest.raises(ValueError):  # noqa: PT011  # in various words
        net.init_weights()


def test_pretrained_in_an_override_and_by_its_old_spelling(payload):
    override = {"type": "Constant", "val": 1, "layer": "Conv2d", "override": {"name": "conv1"}}
    entry_points = [
        {**override, "override": {"name": "layer1", "type": "Pretrained", "checkpoint": payload}},
        {**override, "override": [{"name": "conv1", "type": PretrainedInit, "checkpoint": payload}]},
        {"type": "mmengine.model.weight_init.PretrainedInit", "checkpoint": payload, "override": {"name": "layer1"}},
    ]
    for init_cfg in entry_points:
        with pytest.raises(ValueError):  # noqa: PT011  # in various words
            ResNet(18, base_channels=4, init_cfg=init_cfg).init_weights()
    for old in (ResNet, SharedHead):
        with pytest.warns(FutureWarning, match="old spelling"):
            net = old(18, pretrained=payload)
        with pytest.raises(ValueError):  # noqa: PT011  # in various words
            net.init_weights()


@every_module
@every_pretrained_config
def test_an_empty_file_is_an_error(tmp_path, module, spelling):
    torch.save({}, tmp_path / "empty.pth")
    net = MODULES[module](PRETRAINED_CONFIGS[spelling](str(tmp_path / "empty.pth")))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError):  # noqa: PT011  # in various words
        net.init_weights()
    assert net.state_dict().keys() == before.keys()


@pytest.mark.parametrize("prefix", ["", "neck.", "state_dict.", "state_dict.neck."])
@pytest.mark.parametrize("named", [False, True])
@every_pretrained_config
def test_a_neck_loads_its_own_weights(tmp_path, prefix, named, spelling):
    torch.manual_seed(1)
    weights = {key: torch.randn_like(value) for key, value in fpn(None).state_dict().items()}
    inner = prefix.removeprefix("state_dict.")
    content = {f"{inner}{key}": value for key, value in weights.items()}
    if inner:
        content["head.weight"] = torch.ones(1)
    torch.save({"state_dict": content} if prefix.startswith("state") else content, tmp_path / "neck.pth")
    init_cfg = PRETRAINED_CONFIGS[spelling](str(tmp_path / "neck.pth"))
    last = init_cfg[-1] if isinstance(init_cfg, (list, tuple)) else init_cfg
    last.pop("prefix", None)
    if named and inner:
        last["prefix"] = inner
    net = fpn(init_cfg)
    given = repr(init_cfg)
    net.init_weights()
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    assert repr(net.init_cfg) == given


def test_a_neck_refuses_what_does_not_fit(tmp_path):
    weights = fpn(None).state_dict()
    file = tmp_path / "neck.pth"
    for change in (
        lambda w: w.pop("fpn_convs.0.conv.bias"),
        lambda w: w.update({"fpn_convs.0.conv.bias": torch.zeros(9)}),
        lambda w: w.update({"fpn_convs.7.conv.bias": torch.zeros(9)}),
        lambda w: w.update({"fpn_convs.0.conv.bias": torch.full((4,), torch.nan)}),
    ):
        changed = dict(weights)
        change(changed)
        torch.save(changed, file)
        net = fpn({"type": "Pretrained", "checkpoint": str(file)})
        with pytest.raises(ValueError, match=r"fpn_convs\.[07]\.conv\.bias"):
            net.init_weights()
    torch.save({"a": weights, "b": weights}, file)
    with pytest.raises(ValueError, match=r"with the prefixes 'a\.' and 'b\.'; choose one by `prefix`"):
        fpn({"type": "Pretrained", "checkpoint": str(file)}).init_weights()
    fpn({"type": "Pretrained", "checkpoint": str(file), "prefix": "b."}).init_weights()


def test_a_plugin_of_mmengines_kind_loads_its_own_weights(tmp_path):
    weights = {"conv.weight": torch.full((4, 4, 1, 1), 2.0), "conv.bias": torch.full((4,), 3.0)}
    torch.save(weights, tmp_path / "plugin.pth")
    init_cfg = {"type": "mmengine.Pretrained", "checkpoint": str(tmp_path / "plugin.pth")}
    cfg = {"type": ThirdPartyPlugin, "init_cfg": init_cfg}
    plugin = {"cfg": cfg, "position": "after_conv2", "stages": (True, False, False, False)}
    net = build_backbone({**TINY, "plugins": [plugin]})
    for block in net.layer1:
        assert (block.third_party_plugin.conv.weight == 2).all()
        assert block.third_party_plugin.init_cfg == init_cfg


@pytest.fixture
def mark(tmp_path):
    with evil_module(tmp_path) as mark:
        yield mark
        assert not mark.exists()


def build_and_initialize(module, init_cfg):
    net = MODULES[module](init_cfg)
    (net.backbone if module == "its backbone" else net).relu = nn.ReLU()
    net.init_weights()


NO_INITIALIZERS = (*SPELLINGS, "torch.nn.Conv2d", "mmengine.runner.Runner", "ReLU", "pretrained")


@pytest.mark.parametrize("place", ["type", "scope", "override", "list"])
@every_module
def test_initializers_are_found_and_never_imported(mark, module, place):
    for spelling in NO_INITIALIZERS:
        init_cfg = {
            "type": {"type": spelling, "layer": "Conv2d"},
            "scope": {"type": "Constant", "val": 0, "_scope_": spelling or EVIL},
            "override": {"type": "Constant", "val": 0, "override": {"name": "relu", "type": spelling}},
            "list": [{"type": "Constant", "val": 0}, {"type": spelling}],
        }[place]
        with pytest.raises((KeyError, TypeError)):
            build_and_initialize(module, init_cfg)


@pytest.mark.parametrize("wrong", [5, None, Path, len, dict, nn.ReLU.forward, b"Constant", ["Constant"]])
def test_what_is_no_initializer_is_refused(wrong):
    with pytest.raises((KeyError, TypeError)):
        fpn({"type": wrong, "layer": "Conv2d"}).init_weights()


def test_initializers_of_mmengine_and_of_users_work(monkeypatch):
    class Sevens:
        def __call__(self, module):
            for parameter in module.parameters():
                nn.init.constant_(parameter, 7)

    monkeypatch.setattr(WEIGHT_INITIALIZERS, "_module_dict", {**WEIGHT_INITIALIZERS.module_dict, "Sevens": Sevens})
    for type_ in ("Sevens", "mmengine.Sevens", Sevens):
        net = fpn({"type": type_})
        net.init_weights()
        assert all((parameter == 7).all() for parameter in net.parameters())
    for type_ in ("Caffe2Xavier", "mmengine.Caffe2Xavier", "mmengine.model.Caffe2XavierInit", "TruncNormal"):
        fpn({"type": type_, "layer": "Conv2d"}).init_weights()
    net = ResNet(
        18,
        base_channels=4,
        init_cfg={"type": "Constant", "val": 2, "layer": "Conv2d", "override": {"name": "conv1", "type": "Sevens"}},
    )
    net.init_weights()
    assert (net.conv1.weight == 7).all()
    assert (net.layer1[0].conv1.weight == 2).all()


BAD = {
    "NaN": ({"type": "Constant", "val": math.nan}, "val"),
    "text for a number": ({"type": "Constant", "val": "a"}, "val='a'"),
    "list for a number": ({"type": "Constant", "val": [1]}, r"val=\[1\]"),
    "text for a bias": ({"type": "Constant", "val": 1, "bias": "a"}, "bias='a'"),
    "negative std": ({"type": "Normal", "std": -1}, "std=-1"),
    "negative std, cut off": ({"type": "TruncNormal", "std": -1}, "std=-1"),
    "text for std": ({"type": "Normal", "std": "0.01"}, "std='0.01'"),
    "distribution": ({"type": "Kaiming", "distribution": "foo"}, "distribution='foo'"),
    "distribution of Xavier": ({"type": "Xavier", "distribution": "foo"}, "distribution='foo'"),
    "mode": ({"type": "Kaiming", "mode": "bogus"}, "mode='bogus'"),
    "nonlinearity": ({"type": "Kaiming", "nonlinearity": "bogus"}, "nonlinearity='bogus'"),
    "empty range": ({"type": "Uniform", "a": 1, "b": -1}, "a=1, b=-1"),
}
PLACES = {
    "alone": lambda cfg: cfg,
    "with a layer": lambda cfg: {**cfg, "layer": "Conv2d"},
    "in a list": lambda cfg: [{"type": "Kaiming", "layer": "Conv2d"}, cfg],
    "in an override": lambda cfg: {"type": "Constant", "val": 0, "override": {"name": "conv1", **cfg}},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrong", BAD)
def test_initializers_that_cannot_draw_are_refused_before_anything_is_built(wrong, place, monkeypatch):
    cfg, named = BAD[wrong]
    init_cfg = PLACES[place](cfg)
    monkeypatch.setattr(nn.BatchNorm2d, "__init__", lambda *args, **kwargs: pytest.fail("something was built"))
    refusal = pytest.raises((TypeError, ValueError), match=rf"`init_cfg.*{named}")
    with refusal:
        build_backbone({"type": "ResNet", "depth": 18, "base_channels": 4, "init_cfg": init_cfg})
    with refusal:
        fpn(init_cfg)
    with refusal:
        ImageClassifier({"type": "ResNet", "depth": 18, "base_channels": 4}, num_classes=2, init_cfg=init_cfg)


def test_an_initializer_of_a_user_is_tried_on_a_convolution():
    class Center(BaseInit):
        """Ones in the middle of each kernel."""

        def __call__(self, module):
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    _, _, height, width = layer.weight.shape
                    nn.init.zeros_(layer.weight)
                    with torch.no_grad():
                        layer.weight[:, :, height // 2, width // 2] = torch.ones(())

    state = torch.random.get_rng_state()
    net = ResNet(18, base_channels=4, init_cfg={"type": Center})
    net.init_weights()
    assert (net.conv1.weight[:, :, 3, 3] == 1).all()
    torch.random.set_rng_state(state)
    check_init_cfg({"type": "Normal", "layer": "Conv2d"})
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_checkpoint_is_loaded_by_an_initializer_of_any_name(tmp_path, monkeypatch):
    class Weights(PretrainedInit):
        """A user's, by another name."""

    class Pretrained:
        """A user's that loads no checkpoint."""

        def __init__(self, value):
            self.value = value

        def __call__(self, module):
            for parameter in module.parameters():
                nn.init.constant_(parameter, self.value)

    monkeypatch.setattr(WEIGHT_INITIALIZERS, "_module_dict", {**WEIGHT_INITIALIZERS.module_dict, "Weights": Weights})
    torch.save({key: torch.full_like(value, 5) for key, value in fpn(None).state_dict().items()}, tmp_path / "a.pth")
    for init_cfg in ({"type": "Weights", "checkpoint": str(tmp_path / "a.pth")}, {"type": Pretrained, "value": 5}):
        net = fpn(init_cfg)
        net.init_weights()
        assert all((parameter == 5).all() for parameter in net.parameters())
    with pytest.raises(TypeError, match="takes `checkpoint`, `prefix`"):
        fpn({"type": "Weights", "checkpoint": "a.pth", "strict": False})


def test_what_pretrained_takes(tmp_path):
    for wrong in ({}, {"checkpoint": "x.pth", "strict": False}):
        with pytest.raises(TypeError, match="takes `checkpoint`, `prefix`"):
            fpn({"type": "Pretrained", **wrong}).init_weights()
    with pytest.raises(FileNotFoundError):
        fpn({"type": "Pretrained", "checkpoint": str(tmp_path / "none.pth")}).init_weights()


@pytest.fixture
def without_runner(monkeypatch):
    """No log of a run, which another test may have begun."""
    monkeypatch.setattr(MMLogger, "_instance_dict", {})


@pytest.mark.usefixtures("without_runner")
def test_one_line_says_which_weights_were_loaded(tmp_path, caplog):
    net = ResNet(18, base_channels=4)
    torch.save({"backbone": net.state_dict(), "head": {"weight": torch.ones(1)}}, tmp_path / "r18.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "r18.pth")}
    with caplog.at_level("INFO", logger="resbackbone"):
        build_backbone({"type": "ResNet", "depth": 18, "base_channels": 4, "init_cfg": init_cfg})
    (line,) = (record.getMessage() for record in caplog.records)
    assert "r18.pth" in line
    assert f"{len(net.state_dict())} tensors loaded (native keys)" in line
    assert "1 ignored" in line


@pytest.mark.usefixtures("without_runner")
def test_the_line_is_in_the_log_of_the_run(tmp_path):
    log = MMLogger.get_instance("run", logger_name="run", log_file=str(tmp_path / "run.log"), log_level="INFO")
    torch.save(ResNet(18, base_channels=4).state_dict(), tmp_path / "r18.pth")
    logs.log_info_later("said before")
    build_backbone("resnet18", base_channels=4, checkpoint=tmp_path / "r18.pth")
    text = (tmp_path / "run.log").read_text()
    assert text.count("said before") == 1
    assert text.count("r18.pth: ") == 1
    for handler in log.handlers:
        handler.close()


@pytest.mark.usefixtures("without_runner")
def test_no_line_from_other_processes(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    torch.save(fpn(None).state_dict(), tmp_path / "fpn.pth")
    with caplog.at_level("INFO", logger="resbackbone"):
        fpn({"type": "Pretrained", "checkpoint": str(tmp_path / "fpn.pth")}).init_weights()
    assert not caplog.records


# Third-party modules, built by our registry from a config with an `init_cfg` in it.
THIRD_PARTY = {
    "module": lambda init_cfg: {"type": "mmengine.model.Sequential", "init_cfg": init_cfg},
    "module list": lambda init_cfg: {"type": "mmengine.model.ModuleList", "init_cfg": init_cfg},
    "layer of mmcv": lambda init_cfg: {
        "type": "mmcv.cnn.DepthwiseSeparableConvModule",
        **{"in_channels": 4, "out_channels": 4, "kernel_size": 1},
        "norm_cfg": {"type": "mmengine.model.Sequential", "init_cfg": init_cfg},
    },
    "class of a user": lambda init_cfg: {"type": ThirdPartyPlugin, "in_channels": 4, "init_cfg": init_cfg},
    "what is in such a class": lambda init_cfg: {
        "type": ThirdPartyHolder,
        "inner": {"type": "mmengine.model.Sequential", "init_cfg": init_cfg},
    },
    "plugin": lambda init_cfg: {
        **TINY,
        "plugins": [{"cfg": {"type": ThirdPartyPlugin, "init_cfg": init_cfg}, "position": "after_conv2"}],
    },
}


@pytest.mark.parametrize("place", ["type", "list", "override", "scope"])
@pytest.mark.parametrize("module", THIRD_PARTY)
def test_an_initializer_of_a_third_party_module_is_refused_before_it_is_built(mark, module, place):
    for spelling in NO_INITIALIZERS:
        init_cfg = {
            "type": {"type": spelling, "layer": "Conv2d"},
            "list": [{"type": "Constant", "val": 0}, {"type": spelling}],
            "override": {"type": "Constant", "val": 0, "override": {"name": "conv", "type": spelling}},
            "scope": {"type": "Constant", "val": 0, "_scope_": spelling or EVIL},
        }[place]
        with pytest.raises((KeyError, TypeError), match=r"init_cfg|scope"):
            MODELS.build(THIRD_PARTY[module](init_cfg))
        assert not mark.exists()


def test_an_initializer_that_a_third_party_class_chooses_is_looked_up_when_it_is_built(mark):
    class Chosen(BaseModule):
        def __init__(self):
            super().__init__({"type": f"{EVIL}.Layer"})

    with pytest.raises(KeyError, match="unknown initializer type"):
        MODELS.build({"type": Chosen})


@every_pretrained_config
@pytest.mark.parametrize("module", ["module", "module list", "class of a user", "what is in such a class"])
def test_a_third_party_module_that_we_build_runs_nothing_of_a_file(payload, module, spelling):
    net = MODELS.build(THIRD_PARTY[module](PRETRAINED_CONFIGS[spelling](payload)))
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net):
        with pytest.raises(ValueError):  # noqa: PT011  # in various words
            copied.init_weights()


def test_a_third_party_module_within_another_ones_runs_nothing_of_a_file(payload):
    for outer in (mmengine.model.Sequential(), mmengine.model.ModuleList()):
        outer.append(MODELS.build(THIRD_PARTY["module"]({"type": "Pretrained", "checkpoint": payload})))
        with pytest.raises(ValueError):  # noqa: PT011
            outer.init_weights()


def test_a_third_party_class_that_reads_a_file_itself_reads_it_as_we_do(payload):
    class Reading(BaseModule):
        def init_weights(self):
            for read in (CheckpointLoader.load_checkpoint, partial(load_checkpoint, self)):
                with contextlib.suppress(ValueError):
                    read(payload)
            mmengine.model.initialize(self, {"type": "Constant", "val": 0, "layer": "Conv2d"})

    net = ResNet(18, base_channels=4)
    net.reading = Reading()
    net.init_weights()
    MODELS.build({"type": Reading, "init_cfg": {"type": "Constant", "val": 0}}).init_weights()


def test_weights_of_a_third_party_module_load(tmp_path):
    config = {"type": ThirdPartyPlugin, "in_channels": 4}
    given = MODELS.build(config)
    torch.save(given.state_dict(), tmp_path / "plugin.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "plugin.pth")}
    net = MODELS.build({**config, "init_cfg": init_cfg})
    net.init_weights()
    assert net.init_cfg == init_cfg
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in given.state_dict().items())


def test_initializers_of_a_third_party_module_give_mmengines_numbers():
    init_cfg = [{"type": "Normal", "layer": "Conv2d", "std": 3}, {"type": "Constant", "layer": "ReLU", "val": 2}]
    states = []
    for net in (
        MODELS.build({"type": ThirdPartyPlugin, "in_channels": 4, "init_cfg": init_cfg}),
        ThirdPartyPlugin(4, init_cfg),
    ):
        torch.manual_seed(0)
        net.init_weights()
        states.append(net.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
