"""Training in several processes, whole or sharded: the same as in one; broken off and resumed."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from training_faults import die_in_iteration, lose_the_loss, note_an_array
from training_runs import CONFIG, assert_same, free_port, last_checkpoint, prepare, start, state, train

from resbackbone.training.engine import read_checkpoint

VARIABLES = {
    "pytorch": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
}
AVERAGED = '    dict(type="EMAHook", momentum=0.1),\n'
KINDS = {
    "whole": CONFIG,
    "sharded": CONFIG.replace(AVERAGED, "") + "model_wrapper_cfg = dict(type='FSDP2')\n",  # EMAHook copies the model
}


def without_what_is_each_process_own(config, norm="norm_cfg=dict(type='GN', num_groups=2)"):
    """Take away statistics of a part of the batch, mixtures within it, and dropped paths.

    And what makes the scale of a gradient nearly irrelevant, such as the sum of two processes' in place of their mean.
    """
    for old, new in (
        ("drop_path_rate=0.2", norm),
        ("mixing=dict(mixup=0.5, cutmix=1.0)", "mixing=None"),
        ('type="AdamW", lr=1e-3, weight_decay=0.05', 'type="SGD", lr=0.01, momentum=0.9'),
        (", clip_grad=dict(max_norm=1.0)", ""),
    ):
        assert old in config
        config = config.replace(old, new)
    return config


def be_rank(rank, port, then=None, launcher="pytorch"):
    """Become one of two processes, as a launcher would have it."""
    os.environ |= dict(zip(VARIABLES[launcher], (str(rank), str(rank), "2"), strict=True))
    os.environ["MASTER_PORT"] = str(port)
    if launcher == "pytorch":
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if then is not None:
        then()


def train_by_two(folder, work_dir, *arguments, then=None, launcher="pytorch", status=0):
    """Run ``resbackbone train`` in two processes; return what both said."""
    port = free_port()
    command = ("train", "config.py", "--work-dir", work_dir, "--launcher", launcher, *arguments)
    ranks = [
        start(folder, *command, before=partial(be_rank, rank, port, then, launcher), output=f"output{rank}")
        for rank in range(2)
    ]
    for process in ranks:
        process.join()
    said = [(folder / f"output{rank}").read_text() for rank in range(2)]
    assert [process.exitcode for process in ranks] == [status, status], said
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(kind, tmp_path):
    prepare(tmp_path, without_what_is_each_process_own(KINDS[kind]))
    train(tmp_path, "one")
    said = train_by_two(tmp_path, "two", "train_dataloader.batch_size=2")
    assert "trained: " in said[0]
    assert "trained: " not in said[1]
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for key in {"state_dict", "ema_state_dict"} & one.keys():
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5)
    validations = [[record for record in run["curves"] if record["mode"] == "val"] for run in (one, two)]
    assert [record["accuracy/top1"] for record in validations[0]] == [r["accuracy/top1"] for r in validations[1]]


def test_the_recipes_norms_see_the_batches_of_all_processes(tmp_path):
    config = without_what_is_each_process_own(CONFIG, norm="norm_cfg=dict(type='BN')")
    prepare(tmp_path, config[: config.index("custom_hooks = ")])  # so that they are those of _base_.py
    assert "batch norms" not in train(tmp_path, "one")
    train_by_two(tmp_path, "two", "train_dataloader.batch_size=2")
    one, two = state(tmp_path / "one")["state_dict"], state(tmp_path / "two")["state_dict"]
    assert "backbone.bn1.running_var" in one
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_killed_processes_go_on_as_if_nothing_had_happened(kind, tmp_path):
    prepare(tmp_path, KINDS[kind])
    train_by_two(tmp_path, "unbroken")
    train_by_two(tmp_path, "run", then=partial(die_in_iteration, 6), status=-signal.SIGKILL)
    assert last_checkpoint(tmp_path / "run")["meta"]["iter"] == 4
    train_by_two(tmp_path, "run", "--resume")
    assert_same(state(tmp_path / "run"), state(tmp_path / "unbroken"))


def be_elsewhere():
    """Let the second process have a work folder of its own."""
    if os.environ["RANK"] == "1":
        os.chdir("elsewhere")


def miss_the_checkpoint():
    """Let the second process not find it, as on a machine without a common disk."""

    def look(path):
        return read_checkpoint(f"{path}.elsewhere")

    if os.environ["RANK"] == "1":
        mock.patch("resbackbone.training.engine.runner.read_checkpoint", look).start()


def test_the_first_process_says_what_is_resumed_and_none_begins_anew_alone(tmp_path):
    prepare(tmp_path)
    prepare(tmp_path / "elsewhere")
    train_by_two(tmp_path, "unbroken")
    train_by_two(tmp_path, "run", then=partial(die_in_iteration, 6), status=-signal.SIGKILL)
    said = train_by_two(tmp_path, "run", "--resume", then=miss_the_checkpoint, status=2)
    assert said[0].splitlines()[-1].startswith("error: process 1: ")
    assert "iter_4.pth" in said[0].splitlines()[-1]
    assert "iter_4.pth" in said[1].splitlines()[-1]
    train_by_two(tmp_path, "run", "--resume", then=be_elsewhere)
    assert_same(state(tmp_path / "run"), state(tmp_path / "unbroken"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_one_process_loses_ends_both(kind, tmp_path):
    prepare(tmp_path, KINDS[kind])
    said = train_by_two(tmp_path, "run", then=partial(lose_the_loss, float("nan"), rank=1), status=2)
    assert said[0].splitlines()[-1].startswith("error: process 1: the loss is nan at iteration 8 (epoch 3, batch 2)")
    assert said[1].splitlines()[-1].startswith("error: the loss is nan at iteration 8 (epoch 3, batch 2)")
    assert last_checkpoint(tmp_path / "run")["meta"]["iter"] == 6


def test_a_checkpoint_that_cannot_be_saved_ends_both(tmp_path):
    prepare(tmp_path)
    said = train_by_two(tmp_path, "run", then=note_an_array, status=2)
    assert said[0].splitlines()[-1].startswith("error: cannot save ")
    assert said[1].splitlines()[-1].startswith("error: process 0: cannot save ")


def test_a_sharded_run_is_resumed_by_one_process(tmp_path):
    prepare(tmp_path, without_what_is_each_process_own(KINDS["sharded"]))
    halves = ("train_dataloader.batch_size=2",)
    train_by_two(tmp_path, "run", *halves, then=partial(die_in_iteration, 10), status=-signal.SIGKILL)
    train(tmp_path, "run", "--resume")
    train(tmp_path, "one")
    torch.testing.assert_close(
        state(tmp_path / "run")["state_dict"], state(tmp_path / "one")["state_dict"], rtol=0, atol=1e-5
    )


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path):
    prepare(tmp_path)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    command = ["-m", "resbackbone", "train", "config.py", "--work-dir", "run", "--launcher", "pytorch"]
    run = subprocess.run([*torchrun, *command], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("trained: ") == 1
    assert last_checkpoint(tmp_path / "run")["meta"]["iter"] == 9


def say_how_it_is_wrapped():
    """Let a hook print what mmengine's users find in the wrapper."""
    from resbackbone.training.classification import ClassesHook

    def before_train(self, runner):
        print(f"broadcast_buffers={runner.model.broadcast_buffers}")

    ClassesHook.before_train = before_train


def test_wrapped_as_mmengine_does(tmp_path):
    prepare(tmp_path)
    short = ("train_cfg.max_epochs=1", "model.backbone.out_indices=(0,)")  # the second stage trains for nothing
    said = train_by_two(tmp_path, "run", *short, "find_unused_parameters=True", then=say_how_it_is_wrapped)
    assert "broadcast_buffers=False" in said[0]


def be_in_slurm():
    """Have the list of hosts from Slurm, and its command that writes them out."""
    Path("scontrol").write_text("#!/bin/sh\n[ \"$*\" = 'show hostnames node[1-2]' ] && echo 127.0.0.1 && echo node2")
    Path("scontrol").chmod(0o755)
    os.environ |= {"SLURM_NODELIST": "node[1-2]", "PATH": f"{Path.cwd()}{os.pathsep}{os.environ['PATH']}"}


def be_under_mpirun():
    os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] = "2"


@pytest.mark.parametrize(("launcher", "then"), [("slurm", be_in_slurm), ("mpi", be_under_mpirun)])
def test_other_launchers_start_it_as_torchrun_does(launcher, then, tmp_path):
    prepare(tmp_path)
    short = "train_cfg.max_epochs=1"
    said = train_by_two(tmp_path, launcher, short, launcher=launcher, then=then)
    assert ["trained: " in text for text in said] == [True, False]
    train_by_two(tmp_path, "pytorch", short)
    assert_same(state(tmp_path / launcher), state(tmp_path / "pytorch"))


def test_launchers_that_do_not_fit(tmp_path):
    prepare(tmp_path)
    said = train(tmp_path, "run", "--launcher", "pytorch", status=2)
    assert said.startswith("error: --launcher pytorch is for processes that torchrun started: torchrun --nproc")
    said = train(tmp_path, "run", "--launcher", "slurm", status=2)
    assert said.startswith("error: --launcher slurm is for processes that srun started: srun --ntasks 2 python -m")
    lone = partial(be_rank, 0, 1, launcher="mpi")
    said = train(tmp_path, "run", "--launcher", "mpi", before=lone, status=2)
    assert said.startswith("error: --launcher mpi needs the name of the first host in MASTER_ADDR")
    said = train(tmp_path, "run", before=partial(be_rank, 0, 1), status=2)
    assert said.startswith("error: this is one of 2 processes, as the environment says; add --launcher pytorch")
    said = train_by_two(tmp_path, "run", "model_wrapper_cfg.type=FSDP3", status=2)
    assert "unknown model_wrapper_cfg.type 'FSDP3'; did you mean 'FSDP2'?" in said[0]
