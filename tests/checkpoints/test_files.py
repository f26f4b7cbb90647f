"""Reading checkpoint files of every published format."""

import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn
from weight_files import WRITERS, python2_pickle, weights

from resbackbone.checkpoints.readers import describe_placeholders, read_file
from resbackbone.checkpoints.tensors import check_weights


def assert_same(content, expected):
    """Compare trees: the same types, and tensors to the bit."""
    if isinstance(expected, torch.Tensor):
        assert type(content) is torch.Tensor
        assert content.dtype == expected.dtype
        assert torch.equal(content, expected)
    elif isinstance(expected, dict):
        assert type(content) is type(expected)
        assert list(content) == list(expected)
        for key, value in expected.items():
            assert_same(content[key], value)
    elif isinstance(expected, (list, tuple)):
        assert type(content) is type(expected)
        assert len(content) == len(expected)
        for one, other in zip(content, expected, strict=True):
            assert_same(one, other)
    else:
        assert (type(content), content) == (type(expected), expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz", ""])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_is_read_with_any_suffix(kind, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    WRITERS[kind](weights(), path)
    content = read_file(path)
    assert sorted(content) == sorted(weights())
    assert_same({key: content[key] for key in weights()}, weights())
    assert all(value.data_ptr() % value.itemsize == 0 for value in content.values())


def detector():
    """Return the checkpoint of a training: nested, with numbered states, state dict attributes, and shared tensors."""
    state_dict = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict()
    return {
        "state_dict": state_dict,
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.ones(2)}},
            "param_groups": [{"lr": 0.1, "params": [0, 1]}],
        },
        "meta": {
            "epoch": 3,
            "big": 2**62,
            "classes": ("cat", "dog"),
            "negative": -(2**40),
            "unknown": None,
            "done": True,
        },
        "tied": state_dict["0.weight"],
        "dtype": torch.bfloat16,
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_reads_as_with_weights_only(zipped, tmp_path):
    path = tmp_path / "epoch_3.pth"
    torch.save(detector(), path, _use_new_zipfile_serialization=zipped)
    content = read_file(path)
    assert_same(content, torch.load(path, weights_only=True))
    assert content["tied"].data_ptr() == content["state_dict"]["0.weight"].data_ptr()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "tensor",
    [
        nn.Parameter(torch.arange(6.0)),
        torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2),
        torch.arange(24.0)[5:20:3],
        torch.tensor(3.5),
        *(torch.arange(4).to(getattr(torch, name)) for name in ("bfloat16", "uint8", "int8", "int16", "int32")),
        *(torch.arange(4).to(getattr(torch, name)) for name in ("uint16", "uint32", "uint64")),
        *(torch.arange(4.0).to(getattr(torch, name)) for name in ("float8_e4m3fn", "float8_e5m2")),
    ],
    ids=lambda tensor: f"{type(tensor).__name__} {tensor.dtype} {tuple(tensor.stride())}",
)
def test_every_tensor_of_torch_reads_as_it_was(tensor, zipped, tmp_path):
    path = tmp_path / "one.pth"
    torch.save({"x": tensor}, path, _use_new_zipfile_serialization=zipped)
    content = read_file(path)["x"]
    assert type(content) is torch.Tensor
    assert content.stride() == tensor.stride()
    assert content.dtype == tensor.dtype
    assert not content.requires_grad
    assert torch.equal(content.double(), tensor.double())


def test_legacy_views_of_one_storage_read(tmp_path):
    """PyTorch before 0.4 wrote storages that are views of others; such a reference is patched into a legacy file."""
    path = tmp_path / "old.pth"
    torch.save({"x": torch.arange(4.0)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    # The reference ends with the count and None; now with a view of two of the four numbers, from the second on.
    assert raw.count(b"K\x04N") == 1
    raw = raw.replace(b"K\x04N", b"K\x04X\x01\x00\x00\x00vK\x01K\x02\x87").replace(b"K\x04\x85", b"K\x02\x85")
    path.write_bytes(raw)
    assert read_file(path)["x"].tolist() == [1.0, 2.0]


def test_the_other_byte_order_reads(tmp_path):
    torch.save({"x": torch.arange(4.0)}, tmp_path / "little.pth")
    other = {"little": b"big", "big": b"little"}[sys.byteorder]
    with zipfile.ZipFile(tmp_path / "little.pth") as source, zipfile.ZipFile(tmp_path / "big.pth", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("byteorder"):
                data = other
            elif "/data/" in name:
                data = np.frombuffer(data, np.float32).byteswap().tobytes()
            target.writestr(name, data)
    assert read_file(tmp_path / "big.pth")["x"].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3).T, np.arange(3, dtype=">f4"), np.array(2, "<i2")])
def test_arrays_in_any_order_of_axes_and_bytes_read(array, tmp_path):
    np.savez(tmp_path / "a.npz", x=array)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"x": array}))
    for name in ("a.npz", "a.pkl"):
        tensor = read_file(tmp_path / name)["x"]
        assert tensor.tolist() == array.tolist()
        assert tensor.numpy().dtype == array.dtype.newbyteorder("=")


def test_detectron_and_caffe2_pickles_read(tmp_path):
    """Detectron stores its arrays under `blobs`, beside a long configuration; arrays may be long, too."""
    blobs = {"conv1_w": np.arange(70_000, dtype=np.float32), "lr": np.float32(0.5)}
    (tmp_path / "R-50.pkl").write_bytes(python2_pickle({"blobs": blobs, "cfg": "MODEL: " + "x" * 5000}))
    content = read_file(tmp_path / "R-50.pkl")
    assert torch.equal(content["blobs"]["conv1_w"], torch.arange(70_000, dtype=torch.float32))
    assert content["blobs"]["lr"] == 0.5
    assert content["cfg"] == "MODEL: " + "x" * 5000


class PaddleTensor:
    """Pickled as PaddlePaddle's tensors since 2.1 (``paddle/framework/io.py``)."""

    def __init__(self, name, data):
        self.name, self.data = name, data

    def __reduce__(self):
        return tuple, ((self.name, self.data),)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_paddle_parameters_read(protocol, tmp_path):
    content = {
        "conv1.weight": np.ones((2, 3), np.float32),
        "bn1._mean": PaddleTensor("batch_norm_0.w_1", np.zeros(2, np.float32)),
        "StructuredToParameterName@@": {"conv1.weight": "conv2d_0.w_0"},
    }
    (tmp_path / "resnet.pdparams").write_bytes(pickle.dumps(content, protocol))
    assert_same(
        read_file(tmp_path / "resnet.pdparams"),
        {**content, "conv1.weight": torch.ones(2, 3), "bn1._mean": torch.zeros(2)},
    )


# Checkpoints of mmengine


def mm_checkpoint():
    """Return what mmengine's Runner saves: its message hub, numpy values in the metadata, the schedulers' counters."""
    hub = pytest.importorskip("mmengine.logging").MessageHub("test_files")
    hub.update_scalar("train/loss", 0.5)
    hub.update_scalar("train/loss", 0.25)
    hub.update_info("best", np.float32(0.5))
    hub.update_info("counts", np.arange(3))
    return {
        "meta": {"epoch": 3, "stage": np.int64(3), "palette": np.eye(2), "cfg": "model = dict()", "classes": ("cat",)},
        "state_dict": nn.BatchNorm2d(4).state_dict(),
        "message_hub": hub.state_dict(),
        "param_schedulers": [{"milestones": Counter([8, 11]), "gamma": 0.1, "verbose": False}],
    }


def rewrite_pickle(source, target, change):
    """Copy a file of ``torch.save`` with another pickle in it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("/data.pkl") else old.read(name))


@pytest.mark.parametrize("core", [b"numpy.core.", b"numpy._core."])
def test_mmengine_checkpoints_read_with_their_logs_and_numpy_values(core, tmp_path):
    checkpoint = mm_checkpoint()
    torch.save(checkpoint, tmp_path / "epoch_3.pth")

    def rename(data):
        assert b"HistoryBuffer" in data
        assert b"getattr" in data
        return data.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", core)

    rewrite_pickle(tmp_path / "epoch_3.pth", tmp_path / "renamed.pth", rename)
    content = read_file(tmp_path / "renamed.pth")
    assert_same(content["state_dict"], checkpoint["state_dict"])
    assert content["state_dict"]._metadata == checkpoint["state_dict"]._metadata
    assert_same(content["meta"], {**checkpoint["meta"], "stage": 3, "palette": torch.eye(2, dtype=torch.float64)})
    assert_same(content["param_schedulers"], [{"milestones": Counter([8, 11]), "gamma": 0.1, "verbose": False}])
    hub = content["message_hub"]
    assert_same(dict(hub["runtime_info"]), {"best": 0.5, "counts": torch.arange(3)})
    assert repr(hub["log_scalars"]["train/loss"]) == "<mmengine.logging.history_buffer.HistoryBuffer, not loaded>"


def test_logs_without_entries_read(tmp_path):
    logging = pytest.importorskip("mmengine.logging")
    torch.save({"log": logging.HistoryBuffer(), "x": torch.ones(1)}, tmp_path / "a.pth")
    assert describe_placeholders(read_file(tmp_path / "a.pth")) == (
        "mmengine.logging.history_buffer.HistoryBuffer at 'log'",
    )


PLAIN = {
    "od": OrderedDict(a=1, b=OrderedDict()),
    "count": Counter(a=2),
    "set": {1, "a", (2, None), frozenset({3.5})},
    "frozen": frozenset({2, None, True}),
    "bytes": b"\xff",
    "complex": complex(-0.5, float("inf")),
    "size": torch.Size([2, 3]),
    "device": torch.device("cuda", 1),
    "cpu": torch.device("cpu"),
    "dtype": torch.bfloat16,
    "keys": {None: 1, True: 2, ("a", 1, (2.5,)): 3, 2**40: 4, 2.5: 5, b"k": 6, torch.float16: 7, frozenset(): 8},
    "empty": {"tuple": (), "list": [], "dict": {}, "set": set(), "frozenset": frozenset(), "text": "", "bytes": b""},
    "numbers": [0, -1, 2**31, -(2**62), 2**70, 1e300, -0.0, float("-inf")],
    "text": "ä€\U0001f600\n\0",
    "long": ["x" * 100_000, b"y" * 100_000],
}


@pytest.mark.parametrize("save", ["pickle", "torch", "torch legacy"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_keep_their_types(save, protocol, tmp_path):
    if save == "pickle":
        (tmp_path / "a").write_bytes(pickle.dumps(PLAIN, protocol))
    elif protocol < 2:
        pytest.skip("torch.save needs protocol 2")
    else:
        torch.save(
            PLAIN, tmp_path / "a", pickle_protocol=protocol, _use_new_zipfile_serialization=save != "torch legacy"
        )
    assert_same(read_file(tmp_path / "a"), PLAIN)


def test_default_dicts_and_the_like_read_as_plain_ones(tmp_path):
    content = {
        "bytes": bytearray(b"abc"),
        "none": bytearray(),
        "defaults": defaultdict(list, {"a": [1], 2: []}),
        "deque": deque([1, "b"], maxlen=3),
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
        expected = {"bytes": b"abc", "none": b"", "defaults": {"a": [1], 2: []}, "deque": [1, "b"]}
        assert_same(read_file(tmp_path / "a.pkl"), expected)


# Memory


def write_holes(folder):
    """Write sparse files of 200 MB."""
    with torch.serialization.skip_data():
        torch.save({"x": torch.empty(50_000_000)}, folder / "big.pth")
        torch.save({"x": torch.ones(1), "optimizer": {"y": torch.empty(50_000_000)}}, folder / "run.pth")
    header = json.dumps({"x": {"dtype": "F32", "shape": [50_000_000], "data_offsets": [0, 200_000_000]}}).encode()
    with (folder / "big.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 200_000_000)
    with (folder / "big.pkl").open("wb") as file:
        pickle.dump({"x": np.zeros(50_000_000, np.float32)}, file, 4)


@pytest.mark.parametrize(
    ("name", "most"), [("big.pth", 220), ("big.safetensors", 220), ("big.pkl", 220), ("run.pth", 20)]
)
def test_tensors_are_in_memory_once(name, most, tmp_path):
    """Files are not mapped into memory, and skipped tensors are not read."""
    pytest.importorskip("resource")
    write_holes(tmp_path)
    code = """if True:
        import resource, sys
        from resbackbone.checkpoints.readers import read_file
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        content = read_file(sys.argv[1], skipped=lambda key: key == "optimizer")
        assert list(content) == ["x"]
        assert content["x"][-1] >= 0
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    run = subprocess.run([sys.executable, "-c", code, tmp_path / name], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < most * 1000  # kilobytes; the numbers take 200 thousand


@pytest.mark.parametrize("kind", WRITERS)
def test_tensors_may_be_written_and_the_file_stays(kind, tmp_path):
    path = tmp_path / "weights"
    WRITERS[kind](weights(), path)
    before = path.read_bytes()
    read_file(path)["conv1.weight"].zero_()
    assert path.read_bytes() == before
    assert torch.equal(read_file(path)["conv1.weight"], weights()["conv1.weight"])


@pytest.mark.parametrize("kind", WRITERS)
def test_tensors_are_on_the_cpu_with_any_default_device(kind, tmp_path):
    WRITERS[kind](weights(), tmp_path / "weights")
    with torch.device("meta"):
        content = read_file(tmp_path / "weights")
    assert {value.device.type for value in content.values()} == {"cpu"}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at '.*nowhere\.pth'; give the path of a file"):
        read_file(tmp_path / "nowhere.pth")


# Values


def test_finite_numbers_of_any_type_pass():
    check_weights(
        {
            "large": torch.full((4,), 3e38),  # their sum is infinite
            "half": torch.full((100,), 6e4, dtype=torch.float16),
            "eight bits": torch.ones(3).to(torch.float8_e4m3fn),
            "counter": torch.tensor(2**62),
            "mask": torch.tensor([True]),
            "none": torch.empty(0),
        }
    )


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.tensor([1.0, float("nan")]), "NaN"),
        (torch.tensor([float("inf"), float("-inf")]), "infinite"),
        (torch.tensor([float("inf")]).bfloat16(), "infinite"),
        (torch.tensor([float("nan")]).to(torch.float8_e4m3fn), "NaN"),
        (torch.ones(2, dtype=torch.complex64), "complex"),
        (torch.ones(2).to_sparse(), "not dense"),
        (torch.ones(2, device="meta"), "not dense"),
    ],
)
def test_other_values_are_refused_by_name(tensor, problem):
    with pytest.raises(ValueError, match=rf"must be finite real numbers, but not so bn1\.weight \({problem}\)$"):
        check_weights({"conv1.weight": torch.ones(2), "bn1.weight": tensor})


def test_only_the_first_five_are_named():
    with pytest.raises(ValueError, match=r"k0 \(NaN\).*k4 \(NaN\) and 3 more$"):
        check_weights({f"k{index}": torch.tensor(float("nan")) for index in range(8)})
