"""In the real hosts, too, a config names nothing but registered classes and those of the right kind."""

from importlib.util import find_spec

import pytest
from hostile_configs import ENTRY_POINTS, EVIL, SPELLINGS, evil_module
from mmengine.registry import DefaultScope

from resbackbone import build_backbone

HOSTS = [host for host in ("mmdet", "mmseg", "mmpretrain") if find_spec(host)]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_a_name_that_is_not_registered_is_neither_imported_nor_called(tmp_path, host, entry_point):
    spellings = (*SPELLINGS, f"{host}.{EVIL}.Layer", f"{host}.registry.os.system", f"{host}.registry.MODELS.build")
    with evil_module(tmp_path) as mark, DefaultScope.overwrite_default_scope(host):
        for spelling in spellings:
            with pytest.raises((KeyError, TypeError)):
                ENTRY_POINTS[entry_point](spelling)
            assert not mark.exists(), spelling


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("path", ["{}.ResNet", "{}.models.backbones.resnet.ResNet"])
def test_a_hosts_backbone_is_found_by_scope_and_path_and_no_other_class_is(host, path):
    arguments = {"depth": 18, "in_channels": 3}
    net = build_backbone({"type": path.format(host), **arguments})
    assert type(net).__module__ == f"{host}.models.backbones.resnet"
    for wrong in (f"{host}.models.builder.build_backbone", f"{host}.registry.MODELS", f"{host}.CrossEntropyLoss"):
        with pytest.raises((KeyError, TypeError)):
            build_backbone({"type": wrong, **arguments})
