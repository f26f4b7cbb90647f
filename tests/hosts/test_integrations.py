"""How the library gets into a host's registry: by which imports, in which order, with whose defaults."""

import copy
import importlib
import inspect
import pickle
import sys
from importlib.util import find_spec

import pytest
from sweep_hosts import HOSTS

import resbackbone

FAMILY = ("ResNet", "ResNetV1b", "ResNetV1c", "ResNetV1d", "ResNeXt", "WideResNet")
ORDERS = {
    "ours first": "import resbackbone, {host}.registry, resbackbone.integrations.{host}",
    "host first": "import {host}.models, resbackbone.integrations.{host} as ours, importlib; importlib.reload(ours)",
    "integration first": (
        "import resbackbone.integrations.{host}, {host}.models; "
        "from {host}.utils import register_all_modules; register_all_modules()"
    ),
    "custom_imports": (
        "from mmengine.config import Config; "
        "Config.fromstring('custom_imports = {{\"imports\": [\"resbackbone.integrations.{host}\"]}}', '.py')"
    ),
}


@pytest.fixture(params=HOSTS)
def host(request):
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed; tools/test_hosts.sh installs it")
    return request.param


@pytest.mark.parametrize("order", ORDERS)
def test_plain_names_are_ours_whatever_is_imported_first(run_python, host, order):
    ours, other = run_python(
        f"{ORDERS[order].format(host=host)}\n"
        "from mmengine.registry import DefaultScope, MODELS as ROOT\n"
        f"from {host}.registry import MODELS\n"
        f"ours = [MODELS.get(name) for name in {FAMILY}]\n"
        f"with DefaultScope.overwrite_default_scope({host!r}):\n"
        "    ours += [type(registry.build(dict(type='ResNet', depth=18))) for registry in (MODELS, ROOT)]\n"
        f"ours += [type(ROOT.build(dict(type='{host}.ResNet', depth=18)))]\n"
        "found = [c.__module__ for c in ours], MODELS.get('HRNet').__module__\n"
    )
    assert len(ours) == len(FAMILY) + 3
    assert all(module.startswith("resbackbone.") for module in ours)
    assert other == f"{host}.models.backbones.hrnet"  # what is not of the family stays the host's


@pytest.mark.parametrize("custom_imports", [{}, {"imports": ["resbackbone"]}], ids=["no import", "custom_imports"])
def test_prefixed_type_needs_no_integration(run_python, host, custom_imports):
    found = run_python(
        "import sys\n"
        "from mmengine.config import Config\n"
        f"Config.fromstring({f'custom_imports = {custom_imports}'!r}, '.py')\n"
        f"from {host}.registry import MODELS\n"
        "nets = [MODELS.build(dict(type=prefix + 'ResNet', depth=18)) for prefix in ('resbackbone.', '')]\n"
        "found = [type(net).__module__ for net in nets], 'resbackbone.integrations' in sys.modules\n"
    )
    assert found == [["resbackbone.backbones.resnet", f"{host}.models.backbones.resnet"], False]


@pytest.mark.parametrize("absent", HOSTS)
def test_a_missing_host_is_named_with_its_install_command(monkeypatch, absent):
    monkeypatch.setitem(sys.modules, f"{absent}.models", None)
    monkeypatch.delitem(sys.modules, f"resbackbone.integrations.{absent}", raising=False)
    package = {"mmdet": "onedl-mmdetection", "mmseg": "onedl-mmsegmentation"}[absent]
    with pytest.raises(ImportError, match=rf"needs {absent}, but: .*{absent}.*pip install .*{package}"):
        importlib.import_module(f"resbackbone.integrations.{absent}")


@pytest.mark.parametrize("name", FAMILY)
def test_defaults_are_the_hosts(host, name):
    importlib.import_module(f"resbackbone.integrations.{host}")
    registry = importlib.import_module(f"{host}.registry").MODELS
    net = registry.build({"type": name, "depth": 50, "base_channels": 32})
    assert (net.norm_eval, net.stem_channels) == {"mmdet": (True, 32), "mmseg": (False, 64)}[host]
    chosen = registry.build({"type": name, "depth": 50, "norm_eval": host == "mmseg", "stem_channels": 48})
    assert (chosen.norm_eval, chosen.stem_channels) == (host == "mmseg", 48)
    assert isinstance(net, getattr(resbackbone, name))
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(copied) is type(net)
        assert copied.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("name", FAMILY)
def test_classes_with_mmsegs_defaults_say_so(name):
    if find_spec("mmseg") is None:
        pytest.skip("mmseg is not installed; tools/test_hosts.sh installs it")
    backbone = getattr(importlib.import_module("resbackbone.integrations.mmseg"), name)
    assert backbone.__name__ == backbone.__qualname__ == name
    assert "norm_eval=False" in backbone.__doc__
    defaults = {key: parameter.default for key, parameter in inspect.signature(backbone).parameters.items()}
    assert (defaults["stem_channels"], defaults["norm_eval"]) == (64, False)
    with pytest.raises(TypeError, match="did you mean 'norm_eval'"):
        resbackbone.build_backbone({"type": backbone, "depth": 50, "norm_evall": True})
