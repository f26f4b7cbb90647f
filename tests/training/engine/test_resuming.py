"""Checkpoints and resuming under faults: kills, full disks, non-finite losses, unreadable pictures, damaged files."""

import errno
import io
import os
import random
import resource
import signal
import time
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from training_faults import (
    add_array_to_message_hub,
    die,
    die_after_replacing_file,
    die_before_replacing_file,
    die_in_iteration,
    die_in_validation,
    scale_loss,
)
from training_runs import CONFIG, assert_same, last_checkpoint, prepare, run, start, state, train

from resbackbone.training.engine import checkpoints, read_checkpoint
from resbackbone.training.engine.checkpoints import find_last_checkpoint

BY_EPOCH = ("default_hooks.checkpoint.by_epoch=True", "default_hooks.checkpoint.interval=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """The final state of an uninterrupted run."""
    train(folder, "uninterrupted")
    return state(folder / "uninterrupted")


def die_while_writing(number):
    """Kill this process with half of a file written."""
    fsync, calls = os.fsync, 0

    def half(descriptor):
        nonlocal calls
        calls += 1
        if calls == number:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            fsync(descriptor)
            die()
        fsync(descriptor)

    os.fsync = half


MOMENTS = {
    "before the first checkpoint": partial(die_in_iteration, 2),
    "in the middle of an epoch": partial(die_in_iteration, 10),
    "in the first step of an epoch": partial(die_in_iteration, 7),
    "in a validation": partial(die_in_validation, 3),
    "while a checkpoint is written": partial(die_while_writing, 13),
    "before it has its name": partial(die_before_replacing_file, 5),
    "before it is noted as the last": partial(die_after_replacing_file, 5),
    "after it is noted": partial(die_after_replacing_file, 6),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_resumes_exactly(moment, folder, uninterrupted, tmp_path):
    train(folder, tmp_path / "run", before=MOMENTS[moment], status=-signal.SIGKILL)
    train(folder, tmp_path / "run", "--resume")
    assert_same(state(tmp_path / "run"), uninterrupted)
    assert not list((tmp_path / "run").glob(".*"))


def test_resume_from_epoch_checkpoints(folder, uninterrupted, tmp_path):
    train(folder, tmp_path / "run", *BY_EPOCH, before=partial(die_in_iteration, 10), status=-signal.SIGKILL)
    assert last_checkpoint(tmp_path / "run")["meta"]["iter"] == 6
    train(folder, tmp_path / "run", "--resume", *BY_EPOCH)
    found = state(tmp_path / "run")
    assert found["counts"] == [3, 18]  # by iterations, the same point is [2, 18]
    assert_same({**found, "counts": uninterrupted["counts"]}, uninterrupted)


def test_num_workers_does_not_change_training(folder, uninterrupted, tmp_path):
    workers = ("train_dataloader.num_workers=2", "train_dataloader.persistent_workers=True")
    train(folder, tmp_path / "run", *workers, before=partial(die_in_iteration, 10), status=-signal.SIGKILL)
    train(folder, tmp_path / "run", "--resume", "train_dataloader.num_workers=1")
    assert_same(state(tmp_path / "run"), uninterrupted)


def test_resumed_run_keeps_its_seed(folder, uninterrupted, tmp_path):
    train(folder, tmp_path / "other", "--seed", 5)
    assert state(tmp_path / "other")["curves"] != uninterrupted["curves"]
    train(folder, tmp_path / "run", "--seed", 5, before=partial(die_in_iteration, 10), status=-signal.SIGKILL)
    train(folder, tmp_path / "run", "--resume")
    assert_same(state(tmp_path / "run"), state(tmp_path / "other"))


def test_sampler_seed(folder, uninterrupted, tmp_path):
    own = "train_dataloader.sampler.seed=5"
    train(folder, tmp_path / "other", own)
    assert state(tmp_path / "other")["curves"] != uninterrupted["curves"]
    train(folder, tmp_path / "run", own, before=partial(die_in_iteration, 10), status=-signal.SIGKILL)
    train(folder, tmp_path / "run", own, "--resume")
    assert_same(state(tmp_path / "run"), state(tmp_path / "other"))


def test_resume_after_moving_the_work_folder(folder, uninterrupted, tmp_path):
    keep = "default_hooks.checkpoint.max_keep_ckpts=2"
    train(folder, tmp_path / "run", keep, before=partial(die_in_iteration, 12), status=-signal.SIGKILL)
    assert sorted(path.name for path in (tmp_path / "run").glob("iter_*")) == ["iter_10.pth", "iter_8.pth"]
    (tmp_path / "run").rename(tmp_path / "moved")
    train(folder, tmp_path / "moved", "--resume", keep)
    assert_same(state(tmp_path / "moved"), uninterrupted)
    assert sorted(path.name for path in (tmp_path / "moved").glob("iter_*")) == ["iter_16.pth", "iter_18.pth"]
    assert len(list((tmp_path / "moved").glob("best_*"))) == 1


def test_resuming_a_moved_run_leaves_its_old_path_alone(folder, uninterrupted, tmp_path):
    options = ("default_hooks.checkpoint.max_keep_ckpts=1",)
    train(folder, tmp_path / "run", *options, before=partial(die_in_iteration, 12), status=-signal.SIGKILL)
    (tmp_path / "run").rename(tmp_path / "moved")
    train(folder, tmp_path / "run", "--seed", 5, *options, before=partial(die_in_iteration, 12), status=-signal.SIGKILL)
    others = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pth")}
    assert {path.name for path in (tmp_path / "moved").glob("*.pth")} == set(others)
    output = train(folder, tmp_path / "moved", "--resume", *options)
    assert f"of {tmp_path / 'moved' / 'best_accuracy_top1_'}" in output.splitlines()[-2]
    assert_same(state(tmp_path / "moved"), uninterrupted)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pth")} == others


def test_resume_with_load_from(folder, tmp_path):
    train(folder, tmp_path / "first", "train_cfg.max_epochs=1", "--seed", 5)
    weights = f"load_from={tmp_path / 'first' / 'iter_6.pth'}"
    train(folder, tmp_path / "uninterrupted", weights)
    assert state(tmp_path / "uninterrupted")["counts"][1] == 18
    options = (weights, "--resume")  # as in jobs that may be preempted and restarted
    train(folder, tmp_path / "run", *options, before=partial(die_in_iteration, 10), status=-signal.SIGKILL)
    train(folder, tmp_path / "run", *options)
    assert_same(state(tmp_path / "run"), state(tmp_path / "uninterrupted"))


@pytest.mark.slow
def test_twenty_kills_at_random_moments(folder, tmp_path):
    options = ("default_hooks.checkpoint.interval=1", "train_cfg.max_epochs=6")
    start_time = time.monotonic()
    train(folder, tmp_path / "uninterrupted", *options)
    duration = time.monotonic() - start_time
    expected = state(tmp_path / "uninterrupted")

    seed, kills, attempt = random.randrange(2**32), 0, 0
    rng, output = random.Random(seed), folder / "output"
    while kills < 20:
        work_dir = tmp_path / f"run{attempt}"
        output.unlink(missing_ok=True)
        process = start(folder, "train", "config.py", "--work-dir", work_dir, "--resume", *options)
        if kills % 4:  # three of four kills after the first step, the others possibly while starting
            while process.is_alive() and not (output.is_file() and "Epoch(train)" in output.read_text()):
                time.sleep(0.01)
        process.join(rng.uniform(0, duration / 3))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        else:  # it finished; start a new run
            assert process.exitcode == 0, f"seed {seed}: {output.read_text()}"
            assert_same(state(work_dir), expected, f"seed {seed}, ")
            attempt += 1
    train(folder, work_dir, "--resume", *options)
    assert_same(state(work_dir), expected, f"seed {seed}, ")


def fill_disk(bytes_left):
    """Limit the file size in the fourth save, as if the disk became full in the middle of a file."""
    save, calls = checkpoints.save_checkpoint, 0

    def limited(content, path):
        nonlocal calls
        calls += 1
        if calls == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, resource.RLIM_INFINITY))
        try:
            save(content, path)
        finally:
            if calls == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    mock.patch("resbackbone.training.engine.runner.save_checkpoint", limited).start()


def test_full_disk_keeps_the_previous_checkpoint(folder, uninterrupted, tmp_path):
    output = train(folder, tmp_path / "run", before=partial(fill_disk, 50_000), status=2).splitlines()[-1]
    assert output.startswith(f"error: cannot save {tmp_path / 'run'}/")
    assert f"{os.strerror(errno.EFBIG)}; earlier checkpoints are intact" in output
    assert "free disk space and continue with --resume" in output
    assert last_checkpoint(tmp_path / "run")["meta"]["iter"] == 6
    assert not list((tmp_path / "run").glob(".*"))
    train(folder, tmp_path / "run", "--resume")
    assert_same(state(tmp_path / "run"), uninterrupted)


def test_folder_that_does_not_exist(tmp_path):
    (tmp_path / "there").mkdir()
    checkpoints.save_checkpoint({"a": torch.ones(3)}, tmp_path / "there" / "file.pth")
    with pytest.raises(checkpoints.CheckpointSaveError, match=r"cannot save .*nowhere.*: No such file or directory"):
        checkpoints.save_checkpoint({}, tmp_path / "nowhere" / "file.pth")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["file.pth"]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_non_finite_loss_stops_training(value, folder, tmp_path):
    before = partial(scale_loss, float(value))
    output = train(folder, tmp_path / "run", before=before, status=2).splitlines()[-1]
    assert output.startswith(f"error: the loss is {value} at iteration 8 (epoch 2, batch 2), so training was stopped; ")
    assert f"the last checkpoint is {tmp_path / 'run' / 'iter_6.pth'}. Try a lower learning rate" in output
    weights = last_checkpoint(tmp_path / "run")["state_dict"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def break_weight(gradient):
    """Make a gradient non-finite in the eighth step, which has a finite loss and is followed by a checkpoint."""
    from mmengine.optim import OptimWrapper

    step, calls = OptimWrapper.step, 0

    def broken(self, **options):
        nonlocal calls
        calls += 1
        if calls == 8:
            self.optimizer.param_groups[0]["params"][-1].grad[0] = gradient
        step(self, **options)

    OptimWrapper.step = broken


@pytest.mark.parametrize("gradient", ["nan", "1e38"])
def test_non_finite_weights_are_not_saved(gradient, folder, uninterrupted, tmp_path):
    options = ("optim_wrapper.clip_grad=None", "optim_wrapper.optimizer.type=SGD", "optim_wrapper.optimizer.lr=100.0")
    before = partial(break_weight, float(gradient))
    output = train(folder, tmp_path / "run", *options, before=before, status=2).splitlines()[-1]
    assert output.startswith(
        f"error: state_dict.fc.bias is not finite, so {tmp_path / 'run' / 'iter_8.pth'} was not saved"
    )
    assert "earlier checkpoints are unchanged. Try a lower learning rate" in output
    weights = last_checkpoint(tmp_path / "run")["state_dict"]
    assert last_checkpoint(tmp_path / "run")["meta"]["iter"] == 6
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_resume_one_cycle_schedule(tmp_path):
    prepare(
        tmp_path, CONFIG + 'param_scheduler = [dict(type="OneCycleLR", eta_max=1e-2, total_steps=18, by_epoch=False)]'
    )
    train(tmp_path, "uninterrupted")
    train(tmp_path, "run", before=partial(die_in_iteration, 10), status=-signal.SIGKILL)
    train(tmp_path, "run", "--resume")
    assert_same(state(tmp_path / "run"), state(tmp_path / "uninterrupted"))


def test_value_that_cannot_be_resumed_is_not_saved(folder, tmp_path):
    output = train(folder, tmp_path / "run", before=add_array_to_message_hub, status=2).splitlines()[-1]
    assert output.startswith(f"error: cannot save {tmp_path / 'run' / 'iter_2.pth'}: ")
    assert (
        "message_hub.runtime_info.means.of classes is of type numpy.ndarray, but only tensors and plain Python"
        in output
    )
    assert not list((tmp_path / "run").glob("*.pth"))


def test_too_high_learning_rate_stops_training(folder, tmp_path):
    output = train(folder, tmp_path / "run", "optim_wrapper.optimizer.lr=1e30", status=2).splitlines()[-1]
    assert output.startswith("error: the loss is ")
    assert "no checkpoint was saved before. Try a lower learning rate" in output


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_picture_stops_training(workers, tmp_path):
    prepare(tmp_path)
    (tmp_path / "pictures" / "dark" / "3.png").write_bytes(b"not a picture")
    output = train(tmp_path, "run", f"train_dataloader.num_workers={workers}", status=2).splitlines()[-1]
    assert output.startswith("error: ")
    assert "cannot read picture 'pictures/dark/3.png': it is no JPEG" in output
    assert len(output) < 250
    replace = ("train_dataloader.dataset.unreadable=replace", "val_dataloader.dataset.unreadable=replace")
    output = train(tmp_path, "run", f"train_dataloader.num_workers={workers}", *replace)
    assert "cannot read picture 'pictures/dark/3.png': it is no JPEG" in output
    assert "using the next one instead" in output
    checkpoint, worker = tmp_path / "run" / "iter_18.pth", f"test_dataloader.num_workers={workers}"
    output = run(tmp_path, "test", "config.py", checkpoint, worker, status=2).splitlines()[-1]
    assert output.startswith("error: ")
    assert "cannot read picture 'pictures/dark/3.png': it is no JPEG" in output
    assert len(output) < 250


def test_checkpoint_with_code_is_rejected(folder, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / "run").mkdir()
    torch.save({"meta": Malicious(), "state_dict": {}, "message_hub": {}}, tmp_path / "run" / "iter_2.pth")
    (tmp_path / "run" / "last_checkpoint").write_text(str(tmp_path / "run" / "iter_2.pth"))
    with pytest.raises(ValueError, match=r"iter_2.pth' contains more than tensors and plain values"):
        read_checkpoint(tmp_path / "run" / "iter_2.pth")
    assert "contains more than tensors and plain values" in train(folder, tmp_path / "run", "--resume", status=2)
    assert not (tmp_path / "harm").exists()


def resumable(meta):
    """Return a run checkpoint with a given pickle as its ``meta``."""
    hub = b"}(X\x0b\0\0\0log_scalars}X\x0c\0\0\0runtime_info}X\x0c\0\0\0resumed_keys}u"
    content = b"}(X\4\0\0\0meta" + meta + b"X\x0a\0\0\0state_dict}X\x0b\0\0\0message_hub" + hub + b"u"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\4" + content + b".")
    return file.getvalue()


BOMBS = {
    "bytearray": b"c__builtin__\nbytearray\nJ\0\xa3\xe1\x11\x85R",  # of 300 MB
    "bytearray, dropped": b"c__builtin__\nbytearray\nJ\0\xa3\xe1\x11\x85R0}",
    "bytes by length": b"\x8e\0\xa3\xe1\x11\0\0\0\0",
    "bytearray by length": b"\x96\0\xa3\xe1\x11\0\0\0\0",
    "memo": b"}r\0\xa3\xe1\x11",
    "copies": b"](X\0\1\0\0" + b"x" * 256 + b"q\0" + b"ccollections\nOrderedDict\n](h\0h\0\x86" * 9 + b"e",
    "tensor": b"ctorch\nFloatTensor\nJ\0\xa3\xe1\x11\x85R",
    "laughs": b"]q\0" + b"".join(b"(" + b"h%c" % k * 10 + b"tq%c" % (k + 1) for k in range(30)),
    "deep": b"]" * 40_000 + b"a" * 39_999,
    "unknown": b"cos\nmkdir\nX\4\0\0\0harm\x85R",
    "extension": b"\x82\x01",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickle_bombs_are_rejected(bomb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "iter_2.pth"
    path.write_bytes(resumable(BOMBS[bomb]))
    tracemalloc.start()
    try:
        if bomb in ("bytearray, dropped", "memo"):
            assert read_checkpoint(path)["meta"] == {}
        else:
            with pytest.raises(ValueError, match=r"iter_2.pth' "):
                read_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert not Path("harm").exists()


def test_pickle_bomb_error_is_one_line(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "iter_2.pth").write_bytes(resumable(BOMBS["bytearray"]))
    (tmp_path / "run" / "last_checkpoint").write_text(str(tmp_path / "run" / "iter_2.pth"))
    output = train(folder, tmp_path / "run", "--resume", status=2).splitlines()[-1]
    assert "iter_2.pth' contains more than tensors and plain values, which is not loaded: builtins.bytearray" in output


@pytest.mark.parametrize("note", [b"", b"\0", b"\xff\xfe", b"a\0b.pth", b"/", b"x" * 100_000, b"."])
def test_damaged_last_checkpoint_file(note, tmp_path):
    (tmp_path / "last_checkpoint").write_bytes(note)
    with pytest.raises((ValueError, OSError), match=r"last_checkpoint' is damaged: write the path|no checkpoint at"):
        read_checkpoint(find_last_checkpoint(tmp_path))


@pytest.mark.parametrize("hub", [1, {}, {"log_scalars": 1}, {"log_scalars": {"a": {}}}])
def test_damaged_message_hub(hub, tmp_path):
    torch.save({"meta": {}, "state_dict": {}, "message_hub": hub}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"is not a checkpoint of a training run|has a damaged message_hub"):
        read_checkpoint(tmp_path / "a.pth")


def test_saved_values_are_read_exactly(tmp_path):
    """Values, types and strides equal those of ``torch.load``."""
    content = {
        "meta": {
            "tuple": (1, (2.5, None)), "set": {1, "a"}, "complex": 1 + 2j, "bytes": b"\0",
            "ordered": OrderedDict(a=1), "count": Counter({8: 1, 11: 2}), "size": torch.Size([1, 2]), "big": 2**200,
            "dtype": torch.float16, "device": torch.device("cuda", 3), "keys": {0: 1, None: 2, True: 3, 2.5: 4},
            "nan": float("nan"), "zero": -0.0, "text": "\0\n", "true": True,
        },
        "state_dict": nn.BatchNorm2d(2).state_dict(),
        "message_hub": {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3).t(), "mask": torch.tensor([True])}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}],
        },
        "more": [torch.randn(3, dtype=dtype) for dtype in (torch.bfloat16, torch.float64, torch.complex64)],
    }  # fmt: skip
    checkpoints.save_checkpoint(content, tmp_path / "a.pth")
    expected = torch.load(tmp_path / "a.pth", weights_only=True)
    found = read_checkpoint(tmp_path / "a.pth")
    assert repr(found) == repr(expected)
    assert found["state_dict"]._metadata == expected["state_dict"]._metadata
    same = [(found["optimizer"]["state"][0][key], value) for key, value in expected["optimizer"]["state"][0].items()]
    for one, other in [*same, *zip(found["more"], expected["more"], strict=True)]:
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize(
    "make", [lambda: torch.eye(2).to_sparse(), lambda: torch.empty(1, device="meta"), lambda: torch.tensor(1j).conj()]
)
def test_tensors_that_cannot_be_read_are_not_saved(make, tmp_path):
    with pytest.raises(
        OSError, match=r"cannot save .*: optimizer.x is not a plain dense tensor, so it cannot be resumed"
    ):
        checkpoints.save_checkpoint({"optimizer": {"x": make()}}, tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_run_checkpoints(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"is not a checkpoint of a training run, which has meta, state_dict and message_hub"
    ):
        read_checkpoint(tmp_path / "weights.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "weights.pth").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"torn.pth' is a zip file that is cut off or damaged"):
        read_checkpoint(tmp_path / "torn.pth")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "nothing.pth")


def test_resuming_with_another_epoch_length_is_an_error(folder, tmp_path):
    train(folder, tmp_path / "run", before=partial(die_in_iteration, 10), status=-signal.SIGKILL)
    output = train(folder, tmp_path / "run", "--resume", "train_dataloader.batch_size=8", status=2)
    assert "the checkpoint is of epoch 1 and iteration 8, but an epoch now has 3 iterations" in output
