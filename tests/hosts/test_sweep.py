"""Every ResNet-family backbone dict in the hosts' config trees gives the host's numbers to the bit."""

import re
from importlib.util import find_spec

import pytest
import torch
from sweep_hosts import HOSTS, Case, build_pair, compare_backbones, compare_case, compare_tensors, find_cases

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    parameters = []
    for host in HOSTS:
        if find_spec(host) is None:
            skip = pytest.mark.skip(reason=f"{host} is not installed; tools/test_hosts.sh installs it")
            parameters.append(pytest.param(host, None, id=host, marks=skip))
        else:
            parameters += [pytest.param(host, case, id=f"{host}:{case.name}") for case in find_cases(host)[0]]
    metafunc.parametrize(("host", "case"), parameters)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.deformable_groups. is deprecated")  # five of mmdet's configs still write it
def test_identical(host, case):
    result = compare_case(case, host)
    assert not result.differences, "\n".join((str(case.config), *result.differences))


@pytest.fixture
def host():
    installed = [host for host in HOSTS if find_spec(host)]
    if not installed:
        pytest.skip("no host is installed; tools/test_hosts.sh installs them")
    return installed[0]


@pytest.fixture
def pair(host):
    return build_pair(host, {"type": "ResNet", "depth": 18, "frozen_stages": 1, "norm_eval": False})


def other_eps(net):
    net.layer4[1].bn2.eps = 1e-4


def norm_in_eval(net):
    net.norm_eval = True


def nothing_frozen(net):
    net.frozen_stages = -1
    net.layer1.requires_grad_(True)


def other_rounding(net):
    net.layer3.register_forward_hook(lambda module, args, out: out * (1 + 2**-23))


def another_parameter(net):
    net.extra = torch.nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (other_eps, "eval output 3: off by"),
        (norm_in_eval, "training output 1: off by"),
        (norm_in_eval, "buffer layer2.0.bn1.running_mean: off by"),
        (nothing_frozen, r"trainable parameters: missing in ours \[\], extra \['layer1.0.conv1.weight'"),
        (nothing_frozen, r"gradient of: missing in ours \[\], extra \['layer1.0.conv1.weight'"),
        (nothing_frozen, "training output 0: requires_grad False, ours True"),
        (other_rounding, "gradient of layer3.1.conv2.weight: off by"),
        (another_parameter, r"state dict: missing in ours \[\], extra \['extra'\]"),
    ],
)
def test_comparison_sees(pair, change, found):
    native, ours = pair
    change(ours)
    differences = compare_backbones(native, ours, IMAGES)
    assert [line for line in differences if re.match(found, line)], differences


def test_an_exception_in_ours_is_a_difference(host, monkeypatch):
    monkeypatch.setattr("resbackbone.ResNet.forward", lambda self, x: 1 / 0)
    result = compare_case(Case("broken", {"type": "ResNet", "depth": 18}), host)
    assert result.differences == ("ZeroDivisionError: division by zero",)


def test_nan_equals_nan_only():
    nan, one = torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0])
    assert compare_tensors("x", {0: nan}, {0: nan.clone()}) == []
    assert compare_tensors("x", {0: nan}, {0: one}) == ["x 0: NaN in different places"]
