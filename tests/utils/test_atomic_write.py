"""Files that appear complete or not at all: full disks, killed processes, processes that write side by side."""

import errno
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from command_line import SMALL, fails, make_picture, run, start, written
from full_disk import file_size_limit

from resbackbone import build_backbone
from resbackbone.checkpoints.saving import save_weights
from resbackbone.inference import export
from resbackbone.utils import atomic_write as module
from resbackbone.utils.atomic_write import atomic_write, delete_abandoned, locked_folder

SUFFIXES = (".pth", ".pt", ".safetensors", ".npz", ".pkl", ".pdparams")
FULL = os.strerror(errno.EFBIG)  # what the system says where a full disk has ENOSPC


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_convert_on_a_full_disk_is_one_line_and_leaves_the_earlier_file(folder, suffix):
    torch.save(build_backbone(SMALL).state_dict(), "small.pth")
    target = Path(f"out/converted{suffix}")
    target.parent.mkdir()
    target.write_bytes(b"earlier")
    with file_size_limit():
        assert fails("convert", "small.pth", target, "--to", "native") == f"[Errno 27] {FULL}: '{target}'"
    assert written("out") == [target.name]
    assert target.read_bytes() == b"earlier"
    run("convert", "small.pth", target, "--to", "native")
    assert written("out") == [target.name]


@pytest.mark.parametrize("file_format", ["npy", "safetensors"])
def test_extract_on_a_full_disk_names_the_picture(folder, file_format):
    make_picture("a.png", size=(300, 300))
    with file_size_limit(5000):
        said = run("extract", "small.yaml", "a.png", "--out", "out", "--format", file_format, status=1).stderr
    assert f"skipped: a.png: [Errno 27] {FULL}: 'out/a.png/" in said
    assert written("out") == []


@pytest.mark.parametrize("to", ["torch-export", "onnx"])
def test_export_on_a_file_size_limit(tmp_path, to):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    path = tmp_path / ("net.onnx" if to == "onnx" else "net.pt2")
    with file_size_limit(), pytest.raises(OSError, match=rf"^\[Errno 27\] {FULL}: '{path}'$"):
        export(build_backbone(SMALL), path, to, size=(32, 32))
    assert written(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_have_the_permissions_of_any_other(tmp_path, suffix):
    (tmp_path / "other").touch()
    save_weights({"a": torch.ones(2)}, tmp_path / f"a{suffix}")
    assert stat.S_IMODE((tmp_path / f"a{suffix}").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def write_and_die(path):
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def in_another_process(function, *arguments):
    return multiprocessing.get_context("fork").Process(target=function, args=arguments)


@pytest.mark.parametrize("name", ["weights.pth", "other.npz"])
def test_what_a_killed_process_left_is_deleted_by_the_next_write_in_the_folder(tmp_path, name):
    process = in_another_process(write_and_die, tmp_path / "weights.pth")
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(written(tmp_path)) == 1
    with atomic_write(tmp_path / name) as temporary:
        temporary.touch()
    assert written(tmp_path) == [name]


def write_slowly(path, begun, go_on):
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"slow")
        begun.set()
        go_on.wait(30)


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    context = multiprocessing.get_context("fork")
    begun, go_on = context.Event(), context.Event()
    process = in_another_process(write_slowly, tmp_path / "weights.pth", begun, go_on)
    process.start()
    assert begun.wait(30)
    with atomic_write(tmp_path / "weights.pth") as temporary:
        temporary.write_bytes(b"fast")
    assert (tmp_path / "weights.pth").read_bytes() == b"fast"
    go_on.set()
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "weights.pth").read_bytes() == b"slow"
    assert written(tmp_path) == ["weights.pth"]


def test_two_extractions_into_one_folder(folder):
    for index in range(12):
        make_picture(f"in/{index}.png")
    arguments = ("extract", "small.yaml", "in", "--out", "out")
    with start(*arguments) as one, start(*arguments, "--format", "safetensors") as other:
        said = [process.communicate(timeout=300)[1] for process in (one, other)]
        assert (one.returncode, other.returncode) == (0, 0), said
    levels = [f"layer{stage}.npy" for stage in range(1, 5)]
    wanted = sorted(["features.safetensors", *levels, "pyramid.png"])
    assert written("out") == sorted(f"{index}.png/{name}" for index in range(12) for name in wanted)


def test_folders_are_locked_one_at_a_time(tmp_path):
    def wait(log):
        with locked_folder(tmp_path), log.open("a") as file:
            file.write("other ")

    log = tmp_path / "log"
    with locked_folder(tmp_path):
        process = in_another_process(wait, log)
        process.start()
        process.join(0.3)
        log.write_text("one ")
    process.join()
    assert log.read_text() == "one other "


@pytest.mark.parametrize("locks", ["none", "refused"])
def test_without_locks_age_decides(tmp_path, monkeypatch, locks):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    if locks == "none":
        monkeypatch.setattr(module, "_fcntl", None)
    else:
        monkeypatch.setattr(module._fcntl, "flock", refuse)
    young, old = (tmp_path / f".a.0123456{digit}.writing.pth" for digit in "78")
    young.touch()
    old.touch()
    long_ago = time.time() - module.ABANDONED_AFTER - 60
    os.utime(old, (long_ago, long_ago))
    with atomic_write(tmp_path / "a.pth") as temporary:
        temporary.write_bytes(b"new")
    assert written(tmp_path) == [young.name, "a.pth"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="shows which files are open")
def test_where_open_files_cannot_be_deleted_age_decides_too(tmp_path, monkeypatch):
    """As on Windows, which has no ``fcntl`` either."""
    unlink = Path.unlink

    def refuse_open(path, missing_ok=False):
        if str(path) in map(os.path.realpath, Path("/proc/self/fd").iterdir()):
            raise PermissionError(errno.EACCES, "open in a process", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(module, "_fcntl", None)
    monkeypatch.setattr(Path, "unlink", refuse_open)
    young, old, written_now = (tmp_path / f".a.0123456{digit}.writing.pth" for digit in "789")
    long_ago = time.time() - module.ABANDONED_AFTER - 60
    for path in (young, old, written_now):
        path.touch()
    with written_now.open("w"):
        for path in (old, written_now):
            os.utime(path, (long_ago, long_ago))
        delete_abandoned(tmp_path)
    assert written(tmp_path) == [young.name, written_now.name]


def test_users_own_files_are_never_abandoned(tmp_path):
    for name in (".notes.writing.txt", ".a.0123.writing.pth", "a.01234567.writing.pth"):
        (tmp_path / name).touch()
    delete_abandoned(tmp_path)
    assert len(written(tmp_path)) == 3


def test_an_error_of_the_block_passes_and_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a") as temporary:
        temporary.write_bytes(bytes([1 // 0]))
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(tmp_path / "a"):
        Path("elsewhere").read_bytes()
    assert written(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 250 + ".pth", "é" * 120 + ".pth", "a\nb.npz", "noext", ".hidden"])
def test_names_of_all_kinds(tmp_path, name):
    with atomic_write(tmp_path / name) as temporary:
        temporary.write_bytes(b"content")
        assert temporary.suffix == (Path(name).suffix or ".writing")
    assert written(tmp_path) == [name]


def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    for name in ("there", "dangling"):
        (tmp_path / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real/there").write_bytes(b"earlier")
    for name in ("there", "dangling"):
        with atomic_write(tmp_path / name) as temporary:
            temporary.write_bytes(b"new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "real" / name).read_bytes() == b"new"


def test_folders_and_devices(tmp_path):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)), atomic_write(tmp_path):
        pass
    with pytest.raises(FileNotFoundError, match="nowhere/a'"), atomic_write(tmp_path / "nowhere" / "a"):
        pass
    with atomic_write("/dev/null") as path:
        path.write_bytes(b"gone")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
