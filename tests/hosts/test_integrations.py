"""How the library gets into a host's registry: by which imports, in which order, with whose defaults."""

import copy
import importlib
import pickle
import sys
from importlib.util import find_spec

import pytest
from sweep_hosts import FAMILY, HOSTS

import resbackbone

# The plain names that are ours: what the host has of the family, and in mmdet and mmseg three more.
NAMES = {
    host: tuple(sorted({*names, *(("ResNetV1b", "ResNetV1c", "WideResNet") if host != "mmpretrain" else ())}))
    for host, names in FAMILY.items()
}
BACKBONES = [(host, name) for host, names in NAMES.items() for name in names if name != "ResLayer"]
ORDERS = {
    "ours first": "import resbackbone.backbones, {host}.registry, resbackbone.integrations.{host}",
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


def require(host):
    if find_spec(host) is None:
        pytest.skip(f"{host} is not installed; tools/test_hosts.sh installs it")


@pytest.fixture(params=HOSTS)
def host(request):
    require(request.param)
    return request.param


@pytest.mark.parametrize("order", ORDERS)
def test_plain_names_are_ours_whatever_is_imported_first(run_python, host, order):
    ours, other = run_python(
        f"{ORDERS[order].format(host=host)}\n"
        "from mmengine.registry import DefaultScope, MODELS as ROOT\n"
        f"from {host}.registry import MODELS\n"
        f"ours = [MODELS.get(name) for name in {NAMES[host]}]\n"
        f"with DefaultScope.overwrite_default_scope({host!r}):\n"
        "    ours += [type(registry.build(dict(type='ResNet', depth=18))) for registry in (MODELS, ROOT)]\n"
        f"ours += [type(ROOT.build(dict(type='{host}.ResNet', depth=18)))]\n"
        "found = [c.__module__ for c in ours], MODELS.get('HRNet').__module__\n"
    )
    assert len(ours) == len(NAMES[host]) + 3
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
    package = {"mmdet": "onedl-mmdetection", "mmseg": "onedl-mmsegmentation", "mmpretrain": "mmpretrain"}[absent]
    with pytest.raises(ImportError, match=rf"needs {absent}, but: .*{absent}.*pip install .*{package}"):
        importlib.import_module(f"resbackbone.integrations.{absent}")


@pytest.mark.parametrize(("host", "name"), BACKBONES)
def test_defaults_are_the_hosts(host, name):
    require(host)
    importlib.import_module(f"resbackbone.integrations.{host}")
    registry = importlib.import_module(f"{host}.registry").MODELS
    sizes = {"arch": "regnetx_400mf"} if name == "RegNet" else {"depth": 50, "base_channels": 32}
    if name == "TridentResNet":
        sizes |= {"num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (2,)}
        sizes |= {"num_branch": 3, "test_branch_idx": 1, "trident_dilations": (1, 2, 3)}
    net = registry.build({"type": name, **sizes})
    assert net.norm_eval is (host == "mmdet")
    assert net.stem_channels == (32 if host == "mmdet" or name == "RegNet" else 64)
    assert len(net.out_indices) == (1 if host == "mmpretrain" or name == "TridentResNet" else 4)
    chosen = registry.build({"type": name, **sizes, "norm_eval": host != "mmdet", "stem_channels": 48})
    assert (chosen.norm_eval, chosen.stem_channels) == (host != "mmdet", 48)
    assert isinstance(net, getattr(resbackbone, name))
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(copied) is type(net)
        assert copied.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize(("host", "name"), [case for case in BACKBONES if case[0] != "mmdet"])
def test_classes_with_a_hosts_defaults_say_so(host, name):
    require(host)
    backbone = getattr(importlib.import_module(f"resbackbone.integrations.{host}"), name)
    assert backbone.__name__ == backbone.__qualname__ == name
    assert f"with {host}'s" in backbone.__doc__
    sizes = {"arch": "regnetx_400mf"} if name == "RegNet" else {"depth": 50}
    with pytest.raises(TypeError, match="did you mean 'norm_eval'"):
        resbackbone.build_backbone({"type": backbone, **sizes, "norm_evall": True})


def test_the_shared_head_goes_by_mmdets_name():
    require("mmdet")
    importlib.import_module("resbackbone.integrations.mmdet")
    head = importlib.import_module("mmdet.registry").MODELS.build({"type": "ResLayer", "depth": 50})
    assert type(head) is resbackbone.backbones.SharedHead
