"""Training in two processes under DDP and FSDP2: equal to one process, resumed after kills, and errors on all ranks."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from training_faults import add_array_to_message_hub, die_in_iteration, scale_loss
from training_runs import CONFIG, assert_same, free_port, last_checkpoint, prepare, start, state, train

from resbackbone.training.engine import read_checkpoint

VARIABLES = {
    "pytorch": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
}
EMA_HOOK = '    dict(type="EMAHook", momentum=0.1),\n'
FSDP2 = "model_wrapper_cfg = dict(type='FSDP2')\n"
CONFIGS = {
    "ddp": CONFIG,
    # without the EMA hook, which copies the model: FSDP2 does not support that
    "fsdp2": CONFIG.replace(EMA_HOOK, "") + FSDP2,
}


def without_per_rank_differences(config, norm="norm_cfg=dict(type='GN', num_groups=2)"):
    """Remove what differs between ranks: batch statistics, mixup within a batch, and drop path.

    Also use an optimizer that is sensitive to the scale of gradients, such as a sum over ranks instead of the mean.
    """
    for old, new in (
        ("drop_path_rate=0.2", norm),
        ("mixup_cutmix=dict(mixup_alpha=0.5, cutmix_alpha=1.0)", "mixup_cutmix=None"),
        ('type="AdamW", lr=1e-3, weight_decay=0.05', 'type="SGD", lr=0.01, momentum=0.9'),
        (", clip_grad=dict(max_norm=1.0)", ""),
    ):
        assert old in config
        config = config.replace(old, new)
    return config


def set_rank(rank, port, then=None, launcher="pytorch"):
    """Set the environment of one of two ranks, as a launcher does."""
    os.environ |= dict(zip(VARIABLES[launcher], (str(rank), str(rank), "2"), strict=True))
    os.environ["MASTER_PORT"] = str(port)
    if launcher == "pytorch":
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if then is not None:
        then()


def train_on_two_ranks(folder, work_dir, *arguments, then=None, launcher="pytorch", status=0):
    """Run ``resbackbone train`` on two ranks; return the output of both."""
    port = free_port()
    command = ("train", "config.py", "--work-dir", work_dir, "--launcher", launcher, *arguments)
    ranks = [
        start(folder, *command, before=partial(set_rank, rank, port, then, launcher), output=f"output{rank}")
        for rank in range(2)
    ]
    for process in ranks:
        process.join()
    outputs = [(folder / f"output{rank}").read_text() for rank in range(2)]
    assert [process.exitcode for process in ranks] == [status, status], outputs
    return outputs


@pytest.mark.parametrize("wrapper", CONFIGS)
def test_two_processes_train_like_one(wrapper, tmp_path):
    prepare(tmp_path, without_per_rank_differences(CONFIGS[wrapper]))
    train(tmp_path, "one")
    outputs = train_on_two_ranks(tmp_path, "two", "train_dataloader.batch_size=2")
    assert "trained: " in outputs[0]
    assert "trained: " not in outputs[1]
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for key in {"state_dict", "ema_state_dict"} & one.keys():
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5)
    validations = [[record for record in run["curves"] if record["mode"] == "val"] for run in (one, two)]
    assert [record["accuracy/top1"] for record in validations[0]] == [r["accuracy/top1"] for r in validations[1]]


@pytest.mark.parametrize("wrapper_cfg", ["", FSDP2], ids=CONFIGS)
def test_base_config_synchronizes_batch_norms(wrapper_cfg, tmp_path):
    config = without_per_rank_differences(CONFIG, norm="norm_cfg=dict(type='BN')")
    config = config[: config.index("custom_hooks = ")]  # so that the hooks of _base_.py are used
    prepare(tmp_path, config + wrapper_cfg)
    assert "batch norms" not in train(tmp_path, "one")
    train_on_two_ranks(tmp_path, "two", "train_dataloader.batch_size=2")
    one, two = state(tmp_path / "one")["state_dict"], state(tmp_path / "two")["state_dict"]
    assert "backbone.bn1.running_var" in one
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrapper", CONFIGS)
def test_two_killed_processes_resume_exactly(wrapper, tmp_path):
    prepare(tmp_path, CONFIGS[wrapper])
    train_on_two_ranks(tmp_path, "uninterrupted")
    train_on_two_ranks(tmp_path, "run", then=partial(die_in_iteration, 6), status=-signal.SIGKILL)
    assert last_checkpoint(tmp_path / "run")["meta"]["iter"] == 4
    train_on_two_ranks(tmp_path, "run", "--resume")
    assert_same(state(tmp_path / "run"), state(tmp_path / "uninterrupted"))


def use_another_work_folder():
    """Give rank 1 a work folder of its own."""
    if os.environ["RANK"] == "1":
        os.chdir("elsewhere")


def hide_the_checkpoint():
    """Let rank 1 not find the checkpoint, as on a machine without a shared disk."""

    def look(path):
        return read_checkpoint(f"{path}.elsewhere")

    if os.environ["RANK"] == "1":
        mock.patch("resbackbone.training.engine.runner.read_checkpoint", look).start()


def test_rank_0_decides_what_is_resumed(tmp_path):
    prepare(tmp_path)
    prepare(tmp_path / "elsewhere")
    train_on_two_ranks(tmp_path, "uninterrupted")
    train_on_two_ranks(tmp_path, "run", then=partial(die_in_iteration, 6), status=-signal.SIGKILL)
    outputs = train_on_two_ranks(tmp_path, "run", "--resume", then=hide_the_checkpoint, status=2)
    assert outputs[0].splitlines()[-1].startswith("error: rank 1: ")
    assert "iter_4.pth" in outputs[0].splitlines()[-1]
    assert "iter_4.pth" in outputs[1].splitlines()[-1]
    train_on_two_ranks(tmp_path, "run", "--resume", then=use_another_work_folder)
    assert_same(state(tmp_path / "run"), state(tmp_path / "uninterrupted"))


@pytest.mark.parametrize("wrapper", CONFIGS)
def test_non_finite_loss_of_one_rank_stops_both(wrapper, tmp_path):
    prepare(tmp_path, CONFIGS[wrapper])
    outputs = train_on_two_ranks(tmp_path, "run", then=partial(scale_loss, float("nan"), rank=1), status=2)
    assert outputs[0].splitlines()[-1].startswith("error: rank 1: the loss is nan at iteration 8 (epoch 3, batch 2)")
    assert outputs[1].splitlines()[-1].startswith("error: the loss is nan at iteration 8 (epoch 3, batch 2)")
    assert last_checkpoint(tmp_path / "run")["meta"]["iter"] == 6


def test_failed_save_stops_both(tmp_path):
    prepare(tmp_path)
    outputs = train_on_two_ranks(tmp_path, "run", then=add_array_to_message_hub, status=2)
    assert outputs[0].splitlines()[-1].startswith("error: cannot save ")
    assert outputs[1].splitlines()[-1].startswith("error: rank 0: cannot save ")


def test_sharded_run_is_resumed_by_one_process(tmp_path):
    prepare(tmp_path, without_per_rank_differences(CONFIGS["fsdp2"]))
    halves = ("train_dataloader.batch_size=2",)
    train_on_two_ranks(tmp_path, "run", *halves, then=partial(die_in_iteration, 10), status=-signal.SIGKILL)
    train(tmp_path, "run", "--resume")
    train(tmp_path, "one")
    torch.testing.assert_close(
        state(tmp_path / "run")["state_dict"], state(tmp_path / "one")["state_dict"], rtol=0, atol=1e-5
    )


@pytest.mark.slow
def test_torchrun(tmp_path):
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


def print_broadcast_buffers():
    """Let a hook print an option of the wrapper."""
    from resbackbone.training.classification import ClassCheckHook

    def before_train(self, runner):
        print(f"broadcast_buffers={runner.model.broadcast_buffers}")

    ClassCheckHook.before_train = before_train


def test_ddp_options_equal_mmengine(tmp_path):
    prepare(tmp_path)
    short = ("train_cfg.max_epochs=1", "model.backbone.out_indices=(0,)")  # the second stage is unused
    outputs = train_on_two_ranks(tmp_path, "run", *short, "find_unused_parameters=True", then=print_broadcast_buffers)
    assert "broadcast_buffers=False" in outputs[0]


def set_slurm_environment():
    """Provide Slurm's list of hosts, and the command that expands it."""
    Path("scontrol").write_text("#!/bin/sh\n[ \"$*\" = 'show hostnames node[1-2]' ] && echo 127.0.0.1 && echo node2")
    Path("scontrol").chmod(0o755)
    os.environ |= {"SLURM_NODELIST": "node[1-2]", "PATH": f"{Path.cwd()}{os.pathsep}{os.environ['PATH']}"}


def set_mpi_environment():
    os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] = "2"


@pytest.mark.parametrize(("launcher", "then"), [("slurm", set_slurm_environment), ("mpi", set_mpi_environment)])
def test_slurm_and_mpi_launchers(launcher, then, tmp_path):
    prepare(tmp_path)
    short = "train_cfg.max_epochs=1"
    outputs = train_on_two_ranks(tmp_path, launcher, short, launcher=launcher, then=then)
    assert ["trained: " in text for text in outputs] == [True, False]
    train_on_two_ranks(tmp_path, "pytorch", short)
    assert_same(state(tmp_path / launcher), state(tmp_path / "pytorch"))


def test_launcher_errors(tmp_path):
    prepare(tmp_path)
    output = train(tmp_path, "run", "--launcher", "pytorch", status=2)
    assert output.startswith("error: --launcher pytorch needs processes started by torchrun: torchrun --nproc")
    output = train(tmp_path, "run", "--launcher", "slurm", status=2)
    assert output.startswith("error: --launcher slurm needs processes started by srun: srun --ntasks 2 python -m")
    lone = partial(set_rank, 0, 1, launcher="mpi")
    output = train(tmp_path, "run", "--launcher", "mpi", before=lone, status=2)
    assert output.startswith("error: --launcher mpi needs the name of the first host in MASTER_ADDR")
    output = train(tmp_path, "run", before=partial(set_rank, 0, 1), status=2)
    assert output.startswith("error: WORLD_SIZE=2 in the environment, but no launcher is given")
    outputs = train_on_two_ranks(tmp_path, "run", "model_wrapper_cfg.type=FSDP3", status=2)
    assert "unknown model_wrapper_cfg.type 'FSDP3'; did you mean 'FSDP2'?" in outputs[0]
