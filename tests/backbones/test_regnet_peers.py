"""RegNets against torchvision's: counts, and with the same weights features, gradients and statistics.

test_timm.py compares them with timm's.
"""

import copy
import re

import pytest
import torch

from resbackbone import RegNet
from resbackbone.analysis.cost import build_on_meta, measure

OTHER_IN_TORCHVISION = ("regnetx_400mf", "regnety_800mf", "regnety_8.0gf")
IN_TORCHVISION = {
    name: f"{name}_tv" if name in OTHER_IN_TORCHVISION else name
    for name in (
        *(
            f"regnet{kind}_{size}"
            for kind in "xy"
            for size in ("400mf", "800mf", "1.6gf", "3.2gf", "8.0gf", "16gf", "32gf")
        ),
        "regnety_128gf",
    )
}
LARGE = ("8.0gf", "8.0gf_tv", "16gf", "32gf", "128gf")

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


def torchvision_key(key):
    for pattern, replacement in TORCHVISION_KEYS.items():
        key = re.sub(pattern, replacement, key)
    return key


def torchvision_name(name):
    kind, size = re.fullmatch(r"regnet([xy])_(.*?)(?:_tv)?", name).groups()
    return f"regnet_{kind}_{size.replace('.0', '').replace('.', '_')}"


class Peer:
    """A net of theirs with our weights: the stem and the stages, without the classifier."""

    def __init__(self, net, ours):
        self.names = {key: torchvision_key(key) for key in ours.state_dict()}
        weights = {self.names[key]: value for key, value in copy.deepcopy(ours.state_dict()).items()}
        missing, unexpected = net.load_state_dict(weights, strict=False, assign=True)
        assert unexpected == []
        assert all(key.startswith("fc.") for key in missing)
        self.net = net

    def __call__(self, x):
        x = self.net.stem(x)
        outs = []
        for stage in self.net.trunk_output:
            x = stage(x)
            outs.append(x)
        return outs


@pytest.fixture
def torchvision_pair(torchvision, randomize_norms):
    def build(name):
        theirs = torchvision.models.get_model(torchvision_name(name))  # not on meta: it computes its widths in tensors
        ours = randomize_norms(RegNet(name, norm_eval=False))
        return ours, Peer(theirs, ours)

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


def published(torchvision, name):
    """What torchvision says of a net's weights; of those that were trained on the smallest images."""
    weights = torchvision.models.get_model_weights(torchvision_name(name))
    return min((each.meta for each in weights), key=lambda meta: meta["_ops"])


@pytest.mark.parametrize(("theirs", "ours"), IN_TORCHVISION.items())
def test_counts_are_torchvisions(torchvision, theirs, ours):
    meta = published(torchvision, theirs)
    cost = measure(build_on_meta(ours))
    assert cost.params_with_classifier == meta["num_params"]
    assert round(cost.macs_with_classifier / 1e9, 3) == meta["_ops"]


@pytest.mark.parametrize("name", OTHER_IN_TORCHVISION)
def test_the_plain_name_is_not_torchvisions_where_widths_differ(torchvision, name):
    assert measure(build_on_meta(name)).params_with_classifier < published(torchvision, name)["num_params"]


# Features


@by_size(IN_TORCHVISION.values())
def test_features_are_torchvisions_to_the_bit(torchvision_pair, images, name):
    assert compare_features(torchvision_pair(name), images) == [0, 0, 0, 0]


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
