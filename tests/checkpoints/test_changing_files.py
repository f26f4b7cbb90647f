"""Files that are truncated, written to or replaced while they are read: an error or the old content; never a signal."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from weight_files import WRITERS

from resbackbone import ResNet
from resbackbone.checkpoints import load_checkpoint
from resbackbone.checkpoints.readers import read_file
from resbackbone.checkpoints.readers.open_file import OpenFile

NET = {"depth": 18, "base_channels": 8}


def state_of(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def grow(path):
    with path.open("ab") as file:
        file.write(bytes(100))


def write_nan(path):
    """Overwrite the second half in place with NaN in every floating-point format."""
    half = path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(half)
        file.write(b"\xff" * half)


def write_others(path):
    """Overwrite in place with finite numbers, which no check of values could find."""
    half = path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(half)
        file.write(b"\x3f" * (half // 2))


CHANGES = [truncate, empty, grow, write_nan, write_others]


@pytest.fixture
def weights():
    torch.manual_seed(1)
    return ResNet(**NET).state_dict()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_changes_while_it_is_read_is_refused(kind, change, weights, tmp_path, monkeypatch):
    """The file changes just before its first, its middle or its last part is read, or before it is closed."""
    path = tmp_path / "weights"
    net = ResNet(**NET)
    before = state_of(net)
    WRITERS[kind](weights, path)
    target = sorted(tmp_path.glob("model-2.safetensors")) or [path]
    content = target[0].read_bytes()
    for place in ("open", "close"):
        target[0].write_bytes(content)
        changed = []

        def changing(self, *arguments, real, changed=changed):
            if os.path.samestat(os.fstat(self.file.fileno()), target[0].stat()) and not changed:
                changed.append(target[0])
                change(target[0])
            return real(self, *arguments)

        name = {"open": "read", "close": "__exit__"}[place]
        real = getattr(OpenFile, name)
        with monkeypatch.context() as patch:
            patch.setattr(OpenFile, name, lambda self, *rest, real=real: changing(self, *rest, real=real))
            with pytest.raises(ValueError, match="was written to while it was read; wait until it is whole, and read"):
                load_checkpoint(net, path)
        assert changed
        assert_equal(state_of(net), before)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", WRITERS)
def test_tensors_stay_when_the_file_changes(kind, change, weights, tmp_path):
    WRITERS[kind](weights, tmp_path / "weights")
    content = read_file(tmp_path / "weights")
    for path in tmp_path.iterdir():
        change(path)
    assert_equal(content, dict(weights))


def test_a_file_that_is_replaced_is_read_as_it_was(weights, tmp_path, monkeypatch):
    """Replace the file as atomic writers do: the old one is read to its end."""
    path = tmp_path / "weights"
    torch.save(weights, path)
    torch.save({}, tmp_path / "other")
    real = OpenFile.read

    def replacing(self, *arguments):
        if (tmp_path / "other").exists():
            (tmp_path / "other").replace(path)
        return real(self, *arguments)

    monkeypatch.setattr(OpenFile, "read", replacing)
    assert_equal(dict(read_file(path)), dict(weights))
    assert read_file(path) == {}


LOADING = """if True:
    import os, sys, threading
    from pathlib import Path
    import torch
    from resbackbone import ResNet
    from resbackbone.checkpoints import load_checkpoint

    path, kind, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    content = path.read_bytes()
    stop = threading.Event()

    def disturb():
        while not stop.is_set():
            if kind == "truncate":
                os.truncate(path, len(content) // 3)
            else:
                with path.open("r+b") as file:
                    file.seek(len(content) // 3)
                    file.write(b"\\xff" * (len(content) // 3))
            stop.wait(0.005)
            with path.open("r+b") as file:
                file.write(content)
            stop.wait(0.03)

    net = ResNet(18, base_channels=32)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    other = threading.Thread(target=disturb)
    other.start()
    loaded = refused = 0
    for _ in range(rounds):
        try:
            load_checkpoint(net, path)
        except ValueError:
            refused += 1
            assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
            continue
        loaded += 1
        assert all(value.isfinite().all() for value in net.state_dict().values())
        net.load_state_dict(before)
    stop.set()
    other.join()
    print(loaded, refused)
"""


@pytest.mark.parametrize("change", ["truncate", "rewrite"])
@pytest.mark.parametrize("kind", ["torch", "torch legacy", "safetensors", "npz", "pickle protocol 4"])
def test_no_signal_ends_the_process(kind, change, tmp_path):
    torch.manual_seed(1)
    WRITERS[kind](ResNet(18, base_channels=32).state_dict(), tmp_path / "weights")
    run = subprocess.run(
        [sys.executable, "-c", LOADING, tmp_path / "weights", change, "8"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr  # a signal would be a negative number
    assert sum(map(int, run.stdout.split())) == 8


def test_a_resumed_checkpoint_that_changes_is_refused(tmp_path, monkeypatch):
    running = pytest.importorskip("resbackbone.training.engine", reason="needs mmengine")
    path = tmp_path / "iter_1.pth"
    hub = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}
    torch.save({"meta": {}, "state_dict": {"x": torch.ones(10_000)}, "message_hub": hub}, path)
    assert torch.equal(running.read_checkpoint(path)["state_dict"]["x"], torch.ones(10_000))
    real = OpenFile.read_tensor

    def cutting(self, *arguments):
        os.truncate(path, 2000)
        return real(self, *arguments)

    monkeypatch.setattr(OpenFile, "read_tensor", cutting)
    with pytest.raises(ValueError, match="was written to while it was read"):
        running.read_checkpoint(path)


def test_shards_are_each_read_whole(weights, tmp_path):
    names = list(weights)
    save_file({name: weights[name] for name in names[::2]}, tmp_path / "a.safetensors")
    torch.save({name: weights[name] for name in names[1::2]}, tmp_path / "b.bin")
    shards = {name: ("a.safetensors", "b.bin")[index % 2] for index, name in enumerate(names)}
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": shards}))
    assert_equal(read_file(tmp_path / "index.json"), dict(weights))
    os.truncate(tmp_path / "b.bin", 1000)
    with pytest.raises(ValueError, match=r"index.json' lists the shard 'b.bin', which is a zip file that is cut off"):
        read_file(tmp_path / "index.json")
