"""Tests in the real mmdet and mmseg; without the hosts they are skipped (tools/test_hosts.sh runs them)."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from sweep_hosts import HOSTS, import_host

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HOST_WARNINGS = (
    "ignore:``build_loss`` would be deprecated soon:UserWarning",  # mmseg's decode heads build their losses with it
    "ignore:The arguments `dropout` in MultiheadAttention:DeprecationWarning",  # mmdet's DETRs set it
    "ignore:torch.meshgrid:UserWarning",  # mmdet's generator of points calls it without `indexing`; said once a process
    "ignore:Default ``avg_non_ignore`` is False:UserWarning",  # the maintained mmseg says so of every cross entropy
)


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            for warning in HOST_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session", autouse=True)
def _import_hosts():
    """Import the hosts before any test does, as many warn about third parties while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for host in HOSTS:
            if find_spec(host):
                import_host(host)


@pytest.fixture(autouse=True)
def _one_thread():
    """As many tests as cores run at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def default_scope(request):
    """The default scope that a Runner of the test module's host sets."""
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope(request.module.HOST):
        yield request.module.HOST


@pytest.fixture
def train_step():
    """A function that runs one step of SGD as a Runner does, and returns the losses."""
    from mmengine.optim import OptimWrapper

    def step(model, data):
        model.train()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.01, momentum=0.9)
        torch.manual_seed(0)  # detectors sample boxes, segmentors drop features
        return model.train_step(copy.deepcopy(data), OptimWrapper(optimizer))

    return step


@pytest.fixture
def run_python():
    """A function that runs code in an interpreter in which no host has been imported yet, and returns its `found`."""
    before = "from peers import import_torchvision; import_torchvision()\n" if find_spec("torchvision") else ""
    command = [sys.executable, "-c"]
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": os.environ | {"PYTHONPATH": "tools"}}

    def run(code: str) -> object:
        code = f"{before}{code}\nimport json; print(json.dumps(found))"
        done = subprocess.run([*command, code], **options, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])  # hosts print as well

    return run


@pytest.fixture(autouse=True)
def _mend_mmdets_resnext():
    """Undo upstream defect 7: a RegNet of mmdet that fails while building leaves mmdet's ResNeXt without expansion."""
    yield
    if (native := sys.modules.get("mmdet.models.backbones.resnext")) is not None:
        native.Bottleneck.expansion = 4
