"""Values of configs in the types of other libraries: lists that are none, integers that are none."""

from collections import UserList, deque
from collections.abc import Mapping, MutableMapping, MutableSequence

import numpy as np
import pytest
import torch
from cases import CASES, CLASSES, arguments_of, every_case

from resbackbone import build_backbone
from resbackbone.necks import FPN


class ListConfig(MutableSequence):
    """What OmegaConf has for a list."""

    def __init__(self, entries=()):
        self.entries = list(entries)

    def __getitem__(self, index):
        return self.entries[index]

    def __setitem__(self, index, value):
        self.entries[index] = value

    def __delitem__(self, index):
        del self.entries[index]

    def __len__(self):
        return len(self.entries)

    def insert(self, index, value):
        self.entries.insert(index, value)


class DictConfig(MutableMapping):
    """What OmegaConf has for a dict."""

    def __init__(self, items=()):
        self.items_ = dict(items)

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, value):
        self.items_[key] = value

    def __delitem__(self, key):
        del self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


class Index:
    """An integer by ``operator.index`` alone."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


INTS = {"int64": np.int64, "int8": np.int16, "array": np.array, "tensor": torch.tensor, "index": Index}
LISTS = {"list": list, "ListConfig": ListConfig, "deque": deque, "UserList": UserList, "array": np.array}
LISTS["tensor"] = torch.tensor


def spell(value, to_int, to_list, to_dict=dict):
    """Write a config's value with other types."""
    if isinstance(value, Mapping):
        return to_dict({key: spell(item, to_int, to_list, to_dict) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        vectors = to_list in (np.array, torch.tensor)
        return to_list(value if vectors else [spell(item, to_int, to_list, to_dict) for item in value])
    return to_int(value) if type(value) is int else value


def types_in(value):
    """The types of a value and all inside it."""
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return {type(value)}.union(*(types_in(item) for item in inner))


@every_case
@pytest.mark.parametrize(("to_int", "to_list"), [*((item, ListConfig) for item in INTS.values())], ids=list(INTS))
def test_integers_and_lists_of_other_libraries_build_the_same_net(case, to_int, to_list):
    arguments = arguments_of(case, out_indices=(0, 2), frozen_stages=1, in_channels=4)
    net = CLASSES[CASES[case][0]]
    foreign = spell(arguments, to_int, to_list, DictConfig)
    with torch.device("meta"):
        built, same = net(**foreign), net(**arguments)
    assert str(built) == str(same)
    assert built.feature_info == same.feature_info
    for name in arguments:
        if hasattr(same, name):
            assert getattr(built, name) == getattr(same, name)
            assert types_in(getattr(built, name)) <= {dict, list, tuple, str, int, float, bool, type(None)}
    assert {type(info.channels) for info in built.feature_info} == {int}


@pytest.mark.parametrize("to_list", LISTS.values(), ids=list(LISTS))
@pytest.mark.parametrize("to_int", INTS.values(), ids=list(INTS))
def test_a_config_of_them_builds_and_so_does_a_neck(to_list, to_int):
    config = {"type": "ResNet", "depth": 18, "base_channels": 8, "strides": (1, 2, 1, 1), "stage_blocks": (1, 1, 1, 1)}
    config["norm_cfg"] = {"type": "GN", "num_groups": 2}
    net = build_backbone(spell(config, to_int, to_list, DictConfig), out_indices=range(1, 4))
    assert net.out_channels == (16, 32, 64)
    assert net.strides == (1, 2, 1, 1)
    assert net.gn1.num_groups == 2
    neck = FPN(in_channels=spell(net.out_channels, to_int, to_list), out_channels=to_int(8), num_outs=to_int(4))
    assert neck.in_channels == net.out_channels
    assert [len(neck(net(torch.zeros(1, 3, 32, 32)))), type(neck.out_channels)] == [4, int]


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("depth", True),
        ("depth", np.bool_(True)),
        ("depth", np.float64(18)),
        ("depth", torch.tensor(18.0)),
        ("depth", torch.tensor([18])),
        ("depth", "18"),
        ("base_channels", torch.tensor(True)),
        ("base_channels", np.array([8])),
        ("base_channels", 8.0),
        ("frozen_stages", np.float32(1)),
        ("out_indices", "0123"),
        ("out_indices", b"\0\1"),
        ("out_indices", bytearray(b"\0\1")),
        ("out_indices", {0, 1}),
        ("out_indices", {0: 1}),
        ("out_indices", iter([0, 1])),
        ("out_indices", np.array([[0, 1]])),
        ("out_indices", np.array([0.0, 1.0])),
        ("out_indices", [True, False]),
        ("strides", torch.tensor([True] * 4)),
        ("strides", np.ones(4)),
    ],
)
def test_what_is_no_integer_or_no_list_is_refused(argument, wrong):
    with pytest.raises((TypeError, KeyError), match=f"`{argument}"):
        build_backbone({"type": "ResNet", "depth": 18, "base_channels": 8, argument: wrong})
