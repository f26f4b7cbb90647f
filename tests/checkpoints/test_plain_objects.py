"""Checkpoints with plain objects beside the weights: the weights load, and the report names what does not."""

import argparse
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import logging
import operator
import pathlib
import pickle
import random
import re
import types
import uuid
import zipfile
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from resbackbone import ResNet
from resbackbone.checkpoints import load_checkpoint
from resbackbone.checkpoints.readers import Placeholder, describe_placeholders, read_file

Point = namedtuple("Point", "x y")


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Options:
    rate: float = 0.1
    steps: tuple = (1, 2)


@dataclasses.dataclass(frozen=True)
class Frozen:
    name: str = "a"


class Slots:
    __slots__ = ("value",)

    def __init__(self):
        self.value = 1


class AttributeDict(dict):
    """As Lightning's and addict's: a mapping with attributes."""


class Names(list):
    """A list with attributes."""


class Words(set):
    """A set with attributes."""


class Text(str):
    """A text with a class of its own."""


class Container:
    """As OmegaConf's: a tree whose children know their parent, and whose mapping has nodes as values."""

    def __init__(self, parent=None):
        self.__dict__["_parent"] = parent
        self.__dict__["_metadata"] = {"ref_type": object, "object_type": dict, "key": Point(1, 2)}
        self.__dict__["_content"] = {"child": Container(self)} if parent is None else {"lr": 0.1}

    def __getstate__(self):
        return self.__dict__

    def __setstate__(self, state):
        raise AssertionError("a class of the file's ran")


class Config:
    """As mmengine's and fvcore's, which choose what is pickled."""

    def __reduce_ex__(self, protocol):
        return Config, (), {"filename": "a.py", "text": "lr = 0.1"}, iter([]), iter([("lr", 0.1)])

    def __setitem__(self, key, value):
        raise AssertionError("a class of the file's ran")


def cyclic():
    value = argparse.Namespace(name="me")
    value.me = value
    value.list = [value, {"me": value}]
    return value


def shape_of(net):
    return net


OBJECTS = {
    "Namespace": lambda: argparse.Namespace(lr=0.1, path=pathlib.Path("/data"), inner=argparse.Namespace(x=1)),
    "SimpleNamespace": lambda: types.SimpleNamespace(lr=0.1, sizes=[1, 2]),
    "Path": lambda: pathlib.Path("/data/run"),
    "PurePosixPath": lambda: pathlib.PurePosixPath("/data"),
    "PureWindowsPath": lambda: pathlib.PureWindowsPath("C:\\data"),
    "datetime": lambda: datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    "date": lambda: datetime.date(2026, 1, 1),
    "timedelta": lambda: datetime.timedelta(hours=1),
    "timezone": lambda: datetime.timezone(datetime.timedelta(hours=1), "x"),
    "range": lambda: range(3, 10**12),
    "slice": lambda: slice(1, 10**12, None),
    "Ellipsis": lambda: ...,
    "NotImplemented": lambda: NotImplemented,
    "Decimal": lambda: decimal.Decimal("0.1"),
    "Fraction": lambda: fractions.Fraction(1, 3),
    "UUID": lambda: uuid.UUID(int=1),
    "Enum": lambda: Color.RED,
    "IntEnum": lambda: Level.LOW,
    "Flag": lambda: Rights.READ | Rights.WRITE,
    "dataclass": Options,
    "frozen dataclass": lambda: Frozen(),
    "namedtuple": lambda: Point(1, Point(2, 3)),
    "slots": Slots,
    "class": lambda: nn.ReLU,
    "function": lambda: nn.functional.relu,
    "own function": lambda: shape_of,
    "builtin": lambda: len,
    "method": lambda: datetime.datetime.now,
    "type": lambda: dict,
    "partial": lambda: functools.partial(nn.functional.relu, inplace=True),
    "itemgetter": lambda: operator.itemgetter("a"),
    "pattern": lambda: re.compile("a+"),
    "mapping": lambda: AttributeDict(lr=0.1, inner=AttributeDict(x=1)),
    "ordered mapping": lambda: ChainMap({"a": 1}),
    "UserDict": lambda: UserDict(a=1),
    "list": lambda: Names(["a"]),
    "set": lambda: Words(["a"]),
    "text": lambda: Text("a"),
    "container": Container,
    "config": Config,
    "cycle": cyclic,
    "error": lambda: ValueError("x"),
    "logger": lambda: logging.getLogger("x"),
    "random state": lambda: random.Random(0),
    "numpy's random state": lambda: np.random.RandomState(0),
    "numpy's generator": lambda: np.random.default_rng(0),
    "numpy's date": lambda: np.datetime64("2026-01-01"),
    "numpy's text": lambda: np.str_("a"),
    "array of text": lambda: np.array(["a", "bc"]),
    "array of objects": lambda: np.array([{"a": 1}, None], dtype=object),
    "array of dates": lambda: np.array(["2026-01-01"], dtype="M8[D]"),
    "array of records": lambda: np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]),
    "dtype": lambda: np.dtype("f4"),
    "layout": lambda: torch.strided,
    "memory format": lambda: torch.channels_last,
    "module without tensors": nn.ReLU,
    "loss": nn.CrossEntropyLoss,
    "empty tensor of another device": lambda: torch.empty(3, device="meta"),
}


class Own(nn.Module):
    """A module of the file's author."""


def save_torch(content, path, protocol):
    torch.save(content, path, pickle_protocol=protocol)


def save_legacy(content, path, protocol):
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


def save_pickle(content, path, protocol):
    def arrays(value):
        return {key: tensor.numpy() for key, tensor in value.items()}

    path.write_bytes(pickle.dumps({**content, "model": arrays(content["model"])}, protocol))


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(1)
    return ResNet(18, base_channels=4).state_dict()


def strangers(value):
    """Everything in what was read that is no value of Python's or PyTorch's."""
    if isinstance(value, dict):
        return [found for item in (*value.keys(), *value.values()) for found in strangers(item)]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [found for item in value for found in strangers(item)]
    known = (str, bytes, int, float, complex, type(None), torch.Tensor, torch.dtype, torch.device)
    return [] if isinstance(value, known) else [type(value)]


@pytest.mark.parametrize("save", [save_torch, save_legacy, save_pickle])
@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.filterwarnings("ignore")  # some of them are deprecated
def test_an_object_beside_the_weights_is_not_loaded(kind, save, weights, tmp_path):
    value = OBJECTS[kind]()
    if kind == "empty tensor of another device" and save is not save_torch:
        pytest.skip("PyTorch saves it in one way alone")
    places = {"here": value, "list": [value], "tuple": (1, value), "mapping": {"x": {"y": value}}}
    content = {"epoch": 3, **places, "model": weights, "last": value}
    for protocol in range(0 if save is save_pickle else 2, pickle.HIGHEST_PROTOCOL + 1):
        try:
            save(content, tmp_path / "a.pth", protocol)
        except (TypeError, pickle.PicklingError, AttributeError):
            assert protocol < 2 or kind == "memory format"  # Python cannot
            continue
        read = read_file(tmp_path / "a.pth")
        assert all(issubclass(kind, Placeholder) for kind in strangers(read))
        net = ResNet(18, base_channels=4)
        report = load_checkpoint(net, tmp_path / "a.pth")
        assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
        assert report.not_loaded == describe_placeholders(read)
        assert report.not_loaded
        assert report.not_loaded[0].endswith(" at 'here' and 4 more")
        assert "objects of 1 other class not loaded" in report.summary()
        assert "here" in str(report)


@pytest.mark.parametrize("net_class", [nn.Linear, nn.ReLU, nn.Sequential, nn.ModuleDict, nn.Module, ResNet, Own])
@pytest.mark.parametrize("save", [save_torch, save_legacy])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_classes_of_modules_beside_the_weights_are_not_loaded(net_class, save, weights, tmp_path):
    """PyTorch's earlier format refers to them by persistent ids, with their source."""
    content = {"x": net_class, "list": [net_class], net_class: 1, "state_dict": weights}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        save(content, tmp_path / "a.pth", protocol)
        report = load_checkpoint(ResNet(18, base_channels=4), tmp_path / "a.pth")
        assert not report.missing
        assert report.not_loaded == (f"{net_class.__module__}.{net_class.__qualname__} at 'x' and 2 more",)


def test_the_report_names_each_class_and_where_it_is(weights, tmp_path):
    content = {
        "args": argparse.Namespace(lr=0.1),
        "meta": {"out": pathlib.PurePosixPath("/a"), "act": nn.ReLU, "time": [datetime.timedelta(1)] * 3},
        ("a", Color.RED): Color.RED,
        "model": weights,
    }
    torch.save(content, tmp_path / "a.pth")
    report = load_checkpoint(ResNet(18, base_channels=4), tmp_path / "a.pth")
    assert report.not_loaded[:4] == (
        "argparse.Namespace at 'args'",
        "pathlib.PurePosixPath at 'meta.out'",
        "torch.nn.modules.activation.ReLU at 'meta.act'",
        "datetime.timedelta at 'meta.time' and 2 more",
    )
    assert re.match(r"[\w.]+\.Color at ", report.not_loaded[4])
    assert "objects of 5 other classes not loaded" in report.summary()


def test_names_from_the_file_are_short_and_printable(weights, tmp_path):
    torch.save({"model": weights, "x" * 999: Color.RED, "\n\x1b[31m[red]": pathlib.PurePath}, tmp_path / "a.pth")
    raw = (tmp_path / "a.pth").read_bytes()
    assert b"PurePosixPath" not in raw
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"cpathlib\nPurePath\n", b"ca\rb\n" + b"y" * 999 + b"\n"))
    report = load_checkpoint(ResNet(18, base_channels=4), tmp_path / "b.pth")
    assert all(note.isprintable() and len(note) < 300 for note in report.not_loaded)
    assert "\x1b" not in str(report)


@pytest.mark.parametrize("part", ["optimizer", "message_hub", "lr_scheduler"])
def test_what_a_trainer_saves_is_not_read(part, weights, tmp_path):
    torch.save({"model": weights, part: {"x": nn.Linear(2, 2), "y": argparse.Namespace()}}, tmp_path / "a.pth")
    assert load_checkpoint(ResNet(18, base_channels=4), tmp_path / "a.pth").not_loaded == ()


MODELS = {
    "itself": lambda net: net,
    "below a name": lambda net: {"model": net, "epoch": 3},
    "in a list": lambda net: {"models": [net]},
    "in a namespace": lambda net: {"args": argparse.Namespace(model=net)},
    "in a partial": lambda net: {"call": functools.partial(shape_of, net)},
    "tensors in a namespace": lambda net: {"args": argparse.Namespace(weight=dict(net.state_dict()))},
    "tensors in a class of mappings": lambda net: {"model": AttributeDict(net.state_dict())},
    "tensors in a class of lists": lambda net: {"model": Names(net.state_dict().values())},
    "a tensor in an array": lambda net: {"model": np.array([torch.ones(2), None], dtype=object)},
    "an optimizer": lambda net: {"model": {}, "opt": torch.optim.SGD(net.parameters(), 0.1)},
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_outside_a_known_structure_are_refused(case, zipped, tmp_path):
    net = ResNet(18, base_channels=4)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    torch.save(MODELS[case](nn.Linear(2, 2)), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"nothing was run\. If you trust its author, .* save the weights alone: torch"
    ):
        load_checkpoint(net, tmp_path / "a.pth")
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.filterwarnings("ignore")  # saving a model warns of what it is
def test_a_model_beside_its_own_state_dict_does_not_hinder(tmp_path):
    net = ResNet(18, base_channels=4)
    torch.save({"model": nn.Sequential(net.conv1), "state_dict": net.state_dict()}, tmp_path / "a.pth")
    report = load_checkpoint(ResNet(18, base_channels=4), tmp_path / "a.pth")
    assert report.not_loaded == ("torch.nn.modules.container.Sequential at 'model'",)


class Tagged(torch.Tensor):
    """A tensor with a class of its own, as torchvision has them."""


def test_tensors_with_attributes_or_a_class_are_tensors(tmp_path):
    parameter = nn.Parameter(torch.arange(3.0))
    vars(parameter)["optim"] = {"lr": 0.1, "where": pathlib.PurePosixPath("a")}
    tagged = torch.arange(4.0).as_subclass(Tagged)
    torch.save({"a": parameter, "b": tagged, "c": torch.ones(2, dtype=torch.complex64)}, tmp_path / "a.pth")
    content = read_file(tmp_path / "a.pth")
    assert {key: type(value) for key, value in content.items()} == dict.fromkeys("abc", torch.Tensor)
    assert content["a"].tolist() == [0, 1, 2]
    assert content["b"].tolist() == [0, 1, 2, 3]
    assert content["c"].tolist() == [1, 1]


@pytest.mark.parametrize("key", [None, True, 2.5, 2**40, -1, ("a", 1), ((), ("b", None)), frozenset({1}), b"k"])
def test_mappings_keyed_by_any_plain_value(key, weights, tmp_path):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        torch.save(
            {"table": {key: 1, "b": {key: (key,)}}, key: 2, "model": weights},
            tmp_path / "a.pth",
            pickle_protocol=protocol,
        )
        content = read_file(tmp_path / "a.pth")
        assert content["table"] == {key: 1, "b": {key: (key,)}}
        assert content[key] == 2
        assert load_checkpoint(ResNet(18, base_channels=4), tmp_path / "a.pth").not_loaded == ()


def test_weights_in_any_known_mapping(weights, tmp_path):
    for make in (dict, OrderedDict, lambda items: defaultdict(list, items)):
        torch.save({"model": make(weights), "queue": deque([1]), "seen": {1, 2}}, tmp_path / "a.pth")
        report = load_checkpoint(ResNet(18, base_channels=4), tmp_path / "a.pth")
        assert report.not_loaded == ()
        assert not report.missing


def test_mmengine_configs_do_not_hinder(weights, tmp_path):
    config = pytest.importorskip("mmengine.config")
    cfg = config.Config({"model": {"type": "ResNet", "depth": 18}, "lr": 0.1})
    torch.save({"state_dict": weights, "cfg": cfg, "inner": cfg.model}, tmp_path / "a.pth")
    assert "mmengine.config.config" in load_checkpoint(ResNet(18, base_channels=4), tmp_path / "a.pth").not_loaded[0]


def test_the_commands_name_what_they_leave_out(weights, tmp_path, monkeypatch):
    from resbackbone.cli import app

    monkeypatch.chdir(tmp_path)
    torch.save({"args": argparse.Namespace(), "model": weights}, "a.pth")
    result = CliRunner().invoke(app, ["convert", "a.pth", "b.pth", "--to", "timm"])
    assert result.exit_code == 0
    assert "not loaded: argparse.Namespace at 'args'" in result.output
    (tmp_path / "small.yaml").write_text("backbone: {type: ResNet, depth: 18, base_channels: 4}")
    result = CliRunner().invoke(app, ["load-report", "small.yaml", "a.pth"])
    assert "argparse.Namespace" in result.output


def test_a_chain_of_a_million_unknown_calls_costs_little(tmp_path):
    chain = b"ca\nB\n" + b")R" * 400_000
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04}X\1\0\0\0x" + chain + b"s.")
    assert describe_placeholders(read_file(tmp_path / "a.pkl")) == ("a.B at 'x'",)
    wide = b"ca\nB\n(" + b"ca\nB\n" * 100_000 + b"t" + b"\x81"
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04}X\1\0\0\0x" + wide + b"s.")
    assert describe_placeholders(read_file(tmp_path / "a.pkl")) == ("a.B at 'x'",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_long_integers_and_the_types_of_scales_load(tmp_path, protocol):
    scale = getattr(torch, "float8_e8m0fnu", torch.float8_e5m2)  # since PyTorch 2.7
    content = {"x": 2**3000, "y": -(2**3000), "scale": torch.ones(2).to(scale)}
    torch.save(content, tmp_path / "a.pth", pickle_protocol=protocol)
    read = read_file(tmp_path / "a.pth")
    assert (read["x"], read["y"]) == (2**3000, -(2**3000))
    assert read["scale"].dtype is scale
    torch.save({"x": 2**100_000, "w": torch.ones(2)}, tmp_path / "a.pth", pickle_protocol=protocol)
    assert describe_placeholders(read_file(tmp_path / "a.pth")) == ("builtins.int at 'x'",)


@pytest.mark.parametrize("kind", ["list", "dict", "list in a dict"])
def test_what_holds_itself_is_noted(tmp_path, kind):
    items, mapping = [], {}
    items.append(items)
    mapping["me"] = mapping
    value = {"list": items, "dict": mapping, "list in a dict": {"a": items}}[kind]
    net = ResNet(18)
    torch.save({"state_dict": net.state_dict(), "x": value}, tmp_path / "a.pth")
    (note,) = load_checkpoint(net, tmp_path / "a.pth").not_loaded
    assert "inside of itself at 'x" in note


def test_a_file_that_is_only_itself_is_read(tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04}q\0X\x01\0\0\0xh\0s.")
    assert describe_placeholders(read_file(tmp_path / "a.pkl")) == ("builtins.dict, inside of itself at 'x'",)


def test_tuples_of_a_hundred_numbers_are_keys_and_members(tmp_path):
    key = tuple(range(100))
    torch.save({"x": {key: 1}, "y": {key}, "w": torch.ones(2)}, tmp_path / "a.pth")
    read = read_file(tmp_path / "a.pth")
    assert (read["x"], read["y"]) == ({key: 1}, {key})


def test_a_tensor_without_a_name_is_noted(tmp_path):
    torch.save({"x": {None: torch.ones(1)}, "w": torch.ones(2)}, tmp_path / "a.pth")
    assert describe_placeholders(read_file(tmp_path / "a.pth")) == ("torch.Tensor at 'x.None'",)
