"""RegNets against torchvision's and timm's: counts, and with the same weights features, gradients and statistics."""

import copy
import re

import pytest
import torch

from resbackbone import RegNet
from resbackbone.complexity import build_on_meta, measure

OTHER_IN_TORCHVISION = ("regnetx_400mf", "regnety_800mf", "regnety_8.0gf")
IN_TORCHVISION = {
    name: f"{name}_tv" if name in OTHER_IN_TORCHVISION else name
    for name in (
        f"regnet{kind}_{size}"
        for kind in "xy"
        for size in ("400mf", "800mf", "1.6gf", "3.2gf", "8.0gf", "16gf", "32gf")
    )
}
LARGE = ("6.4gf", "8.0gf", "8.0gf_tv", "12gf", "16gf", "32gf")

# What stands for a part of our keys in theirs, first match first.
TORCHVISION_KEYS = {
    r"^conv1\.": "stem.0.",
    r"^bn1\.": "stem.1.",
    r"^layer(\d)\.(\d+)\.": r"trunk_output.block\1.block\1-\2.",
    r"\.downsample\.": ".proj.",
    r"\.se_layer\.conv(\d)\.conv\.": r".f.se.fc\1.",
    r"\.conv([123])\.": lambda found: f".f.{'abc'[int(found[1]) - 1]}.0.",
    r"\.bn([123])\.": lambda found: f".f.{'abc'[int(found[1]) - 1]}.1.",
}
TIMM_KEYS = {
    r"^conv1\.": "stem.conv.",
    r"^bn1\.": "stem.bn.",
    r"^layer(\d)\.(\d+)\.": lambda found: f"s{found[1]}.b{int(found[2]) + 1}.",
    r"\.se_layer\.conv(\d)\.conv\.": r".se.fc\1.",
    r"\.conv([123])\.": r".conv\1.conv.",
    r"\.bn([123])\.": r".conv\1.bn.",
    r"\.downsample\.0\.": ".downsample.conv.",
    r"\.downsample\.1\.": ".downsample.bn.",
}


def torchvision_name(name):
    kind, size = re.fullmatch(r"regnet([xy])_(.*?)(?:_tv)?", name).groups()
    return f"regnet_{kind}_{size.replace('.0', '').replace('.', '_')}"


def timm_name(name):
    family, number, unit, suffix = re.fullmatch(r"(regnet[xy])_([\d.]+)([mg]f)(_tv)?", name).groups()
    hundreds = float(number) * {"mf": 0.01, "gf": 10}[unit]
    return f"{family}_{hundreds:03.0f}{suffix or ''}"


def rename(key, keys):
    for pattern, replacement in keys.items():
        key = re.sub(pattern, replacement, key)
    return key


class Peer:
    """A net of theirs with our weights: the stem and the stages, without the classifier."""

    def __init__(self, net, stages, ours, keys):
        self.names = {key: rename(key, keys) for key in ours.state_dict()}
        weights = {self.names[key]: value for key, value in copy.deepcopy(ours.state_dict()).items()}
        missing, unexpected = net.load_state_dict(weights, strict=False, assign=True)
        assert unexpected == []
        assert all(key.startswith(("fc.", "head.")) for key in missing)
        self.net, self.stages = net, stages

    def __call__(self, x):
        x = self.net.stem(x)
        outs = []
        for stage in self.stages:
            x = stage(x)
            outs.append(x)
        return outs


@pytest.fixture
def torchvision_pair(torchvision, shake):
    def build(name):
        theirs = torchvision.models.get_model(torchvision_name(name))
        ours = shake(RegNet(name, norm_eval=False))
        return ours, Peer(theirs, list(theirs.trunk_output), ours, TORCHVISION_KEYS)

    return build


@pytest.fixture
def timm_pair(timm, shake):
    def build(name):
        with torch.device("meta"):  # no time for weights that are replaced
            theirs = timm.create_model(timm_name(name))
        ours = shake(RegNet(name, norm_eval=False))
        return ours, Peer(theirs, [theirs.s1, theirs.s2, theirs.s3, theirs.s4], ours, TIMM_KEYS)

    return build


def by_size(names):
    """Parametrise over architectures, the large ones for the long run."""
    slow = [pytest.param(name, marks=pytest.mark.slow) if name.endswith(LARGE) else name for name in names]
    return pytest.mark.parametrize("name", slow)


def relative(out, reference):
    """The largest difference over the largest value; a map of nothing but zeros would agree with any other."""
    assert out.shape == reference.shape
    assert reference.std() > 0.01
    return ((out - reference).abs().max() / reference.abs().max()).item()


def compare_features(pair, images):
    ours, theirs = pair
    ours.eval(), theirs.net.eval()
    with torch.no_grad():
        return [relative(*maps) for maps in zip(ours(images), theirs(images), strict=True)]


def training_step(forward, images):
    outs = forward(images)
    # The last map alone: sums of three gradients come out differently in another order, sums of two do not.
    outs[-1].square().mean().backward()
    return outs


# Counts


@pytest.mark.parametrize(("theirs", "ours"), IN_TORCHVISION.items())
def test_counts_are_torchvisions(torchvision, theirs, ours):
    meta = next(iter(torchvision.models.get_model_weights(torchvision_name(theirs)))).meta
    cost = measure(build_on_meta(ours))
    assert cost.params_with_classifier == meta["num_params"]
    assert round(cost.macs_with_classifier / 1e9, 3) == meta["_ops"]


@pytest.mark.parametrize("name", OTHER_IN_TORCHVISION)
def test_the_plain_name_is_not_torchvisions_where_widths_differ(torchvision, name):
    meta = next(iter(torchvision.models.get_model_weights(torchvision_name(name)))).meta
    assert measure(build_on_meta(name)).params_with_classifier < meta["num_params"]


@pytest.mark.parametrize("name", RegNet.arch_settings)
def test_parameters_are_timms(timm, name):
    with torch.device("meta"):
        theirs = timm.create_model(timm_name(name))
    ours = measure(build_on_meta(name))
    assert ours.params_with_classifier == sum(parameter.numel() for parameter in theirs.parameters())
    assert ours.parts[-1].channels == theirs.num_features


# Features


@by_size(IN_TORCHVISION.values())
def test_features_are_torchvisions_to_the_bit(torchvision_pair, images, name):
    assert compare_features(torchvision_pair(name), images) == [0, 0, 0, 0]


@by_size(RegNet.arch_settings)
def test_features_are_timms(timm_pair, images, name):
    # timm takes the mean of squeeze-and-excitation in another order.
    bound = 1e-5 if name.startswith("regnety") else 0
    assert max(compare_features(timm_pair(name), images)) <= bound


@pytest.mark.parametrize("name", ["regnetx_400mf_tv", "regnety_400mf"])
def test_training_step_is_torchvisions_to_the_bit(torchvision_pair, images, name):
    ours, theirs = torchvision_pair(name)
    ours.train(), theirs.net.train()
    outs, references = training_step(ours, images), training_step(theirs, images)
    assert all(torch.equal(*maps) for maps in zip(outs, references, strict=True))
    parameters, buffers = dict(theirs.net.named_parameters()), dict(theirs.net.named_buffers())
    for key, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, parameters[theirs.names[key]].grad), key
    for key, buffer in ours.named_buffers():
        assert torch.equal(buffer, buffers[theirs.names[key]]), key
