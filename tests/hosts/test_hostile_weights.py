"""Weights and initializers that a host's config names for our modules: nothing in a file runs, in either stack."""

import contextlib
import warnings
from importlib.util import find_spec

import pytest
import torch
from hostile_configs import EVIL, evil_module
from init_cfg_modules import MODULES, PRETRAINED_CONFIGS, Payload
from mmengine.config import Config
from mmengine.registry import DefaultScope
from sweep_hosts import config_tree

from resbackbone import MODELS, build_backbone

HOSTS = [host for host in ("mmdet", "mmseg") if find_spec(host)]
pytestmark = pytest.mark.skipif(not HOSTS, reason="no host is installed; tools/test_hosts.sh installs them")
BACKBONE = {"depth": 18, "base_channels": 4}


@pytest.fixture
def payload(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1), "meta": Payload(tmp_path / "mark")}, tmp_path / "payload.pth")
    yield str(tmp_path / "payload.pth")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("spelling", PRETRAINED_CONFIGS)
@pytest.mark.parametrize("module", MODULES)
def test_our_modules_run_nothing_whatever_the_loader_of_the_stack_does(payload, module, spelling):
    with pytest.raises(ValueError):  # noqa: PT011  # in various words
        MODULES[module](PRETRAINED_CONFIGS[spelling](payload)).init_weights()


@pytest.mark.parametrize("spelling", PRETRAINED_CONFIGS)
@pytest.mark.parametrize("host", HOSTS)
def test_in_the_registry_of_a_host(payload, host, spelling):
    __import__(f"resbackbone.integrations.{host}")
    registry = __import__(f"{host}.registry", fromlist=["MODELS"]).MODELS
    fpn = {"in_channels": [4, 8], "out_channels": 4, "num_outs": 2}
    with DefaultScope.overwrite_default_scope(host):
        for config in ({"type": "ResNet", **BACKBONE}, {"type": "resbackbone.FPN", **fpn}):
            module = registry.build({**config, "init_cfg": PRETRAINED_CONFIGS[spelling](payload)})
            assert type(module).__module__.startswith("resbackbone.")
            with pytest.raises(ValueError):  # noqa: PT011
                module.init_weights()


@pytest.mark.skipif("mmdet" not in HOSTS, reason="mmdet is not installed")
@pytest.mark.parametrize("spelling", ["mmengine.Pretrained", "class", "list"])
def test_in_a_whole_detector(payload, spelling):
    from mmdet.registry import MODELS

    import resbackbone.integrations.mmdet  # noqa: F401

    model = Config.fromfile(config_tree("mmdet") / "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py").model
    model.backbone.init_cfg = PRETRAINED_CONFIGS[spelling](payload)
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector = MODELS.build(model)
        with pytest.raises(ValueError):  # noqa: PT011
            detector.init_weights()


@pytest.mark.parametrize("host", HOSTS)
def test_initializers_in_the_registry_of_a_host(tmp_path, host):
    __import__(f"resbackbone.integrations.{host}")
    registry = __import__(f"{host}.registry", fromlist=["MODELS"]).MODELS
    with evil_module(tmp_path) as mark, DefaultScope.overwrite_default_scope(host):
        for spelling in (f"{EVIL}.Layer", f"{EVIL}.call", "os.system", f"{host}.{EVIL}.Layer", "torch.load"):
            with pytest.raises((KeyError, TypeError)):  # before anything is built
                registry.build({"type": "ResNet", **BACKBONE, "init_cfg": {"type": spelling, "layer": "Conv2d"}})
        assert not mark.exists()


THIRD_PARTY = {  # each reads files in a way of its own
    "mmdet": ["CSPDarknet", "DetectoRS_ResNet", "PyramidVisionTransformer"],
    "mmseg": ["MixVisionTransformer"],
    "mmpretrain": ["ResNet"],
}
CLASSES = [(host, name) for host, names in THIRD_PARTY.items() if find_spec(host) for name in names]


@pytest.fixture
def third_party(host, name):
    """The config of a host's own backbone."""
    extra = {"depth": 50} if name.endswith("ResNet") else {}
    return {"type": f"{host}.{name}", **extra}


@pytest.mark.parametrize(("host", "name"), CLASSES)
def test_an_initializer_of_a_hosts_backbone_is_refused_before_it_is_built(tmp_path, third_party):
    with evil_module(tmp_path) as mark:
        for spelling in (f"{EVIL}.Layer", "os.system", "torch.load"):
            for init_cfg in ({"type": spelling}, [{"type": "Constant", "val": 0}, {"type": spelling}]):
                for build in (build_backbone, MODELS.build):
                    with pytest.raises((KeyError, TypeError), match="init_cfg"):
                        build({**third_party, "init_cfg": init_cfg})
        assert not mark.exists()


@pytest.mark.parametrize("build", [build_backbone, MODELS.build])
@pytest.mark.parametrize(("host", "name"), CLASSES)
def test_a_hosts_backbone_runs_nothing_of_a_file(payload, third_party, build):
    for given in ({"init_cfg": {"type": "Pretrained", "checkpoint": payload}}, {"pretrained": payload}):
        # Some pass over what does not fit, and warn of the old spelling.
        with contextlib.suppress(ValueError, TypeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build({**third_party, **given}).init_weights()


@pytest.mark.parametrize("host", HOSTS)
def test_the_log_of_a_run_says_whose_types_they_are(host, run_python, tmp_path):
    found = run_python(f"""
import warnings; warnings.simplefilter("ignore")
import resbackbone.integrations.{host}
from mmengine.logging import MMLogger
from {host}.registry import MODELS
MMLogger.get_instance("run", logger_name="run", log_file={str(tmp_path / "run.log")!r}, log_level="INFO")
for _ in range(2):
    MODELS.build(dict(type="ResNet", depth=18))
found = open({str(tmp_path / "run.log")!r}).read().count("of {host} are those of resbackbone")
""")
    assert found == 1
