"""Build a runner from a config file and the options of the command line."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import is_distributed
from torch import distributed

from resbackbone.registry.lookup import allow_imported
from resbackbone.training.engine.runner import ResumableRunner
from resbackbone.utils.validation import UnknownKeyError, check_choice, message_of, nearest

Launcher = Literal["none", "pytorch", "slurm", "mpi"]
# What a config may have beside what stands in it, so that an override with a typo is told from one that adds.
_OPTIONAL = {
    "activation_checkpointing",
    "auto_scale_lr",
    "compile",
    "custom_hooks",
    "custom_imports",
    "data_preprocessor",
    "efficient_conv_bn_eval",
    "env_cfg",
    "experiment_name",
    "find_unused_parameters",
    "launcher",
    "load_from",
    "log_level",
    "log_processor",
    "model_wrapper_cfg",
    "param_scheduler",
    "randomness",
    "resume",
    "sync_bn",
    "visualizer",
    "work_dir",
}
_DICT = re.compile(r"\bdict\(|\{\s*(['\"]?)\w+\1\s*:")  # which mmengine's parser would take for text
_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# How processes are started, and by which variables each learns what torchrun says by those.
_LAUNCHERS = {
    "pytorch": ("torchrun --nproc-per-node 2", _RANK),
    "slurm": ("srun --ntasks 2 python", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")),
    "mpi": ("mpirun -n 2 python", tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK"))),
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a config in OpenMMLab's format; like every Python file, only one that you trust.

    Args:
        path: The file.
        overrides: As ``key=value``, with dots between the keys of dicts within dicts and indices of lists, such as
            ``train_cfg.max_epochs=5`` or ``train_dataloader.dataset.classes=[cat,dog]``.

    Raises:
        FileNotFoundError: If there is no such file.
        KeyError: If an override begins with a name that no config has.
        ValueError: If the file is no .py file or does not run, or an override is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file at {str(path)!r}")
    if Path(path).suffix != ".py":
        raise ValueError(
            f"the config of a training is a program, a .py file in OpenMMLab's format; got {str(path)!r}, which "
            "mmengine would let import and call whatever it names; write it as a .py file"
        )
    try:
        config = Config.fromfile(path)
    except Exception as error:  # whatever running somebody's Python raises
        raise ValueError(f"{str(path)!r} does not run: {type(error).__name__}: {message_of(error)}") from error
    allow_imported(config.get("custom_imports"))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"an override is KEY=VALUE, such as train_cfg.max_epochs=5; got {override!r}")
        known = {*config, *_OPTIONAL}
        if (name := key.partition(".")[0]) not in known:
            raise UnknownKeyError(f"the config has no {name!r}{nearest(name, known)}")
        _override(config, key, value)
    return config


def _override(config: Config, key: str, value: str) -> None:
    """Set what an override says.

    Raises:
        ValueError: If its value cannot be read, or there is nothing at its place to be set.
    """
    try:
        parsed = DictAction._parse_iterable(value)
        if _DICT.search(value):
            raise ValueError("it has a dict")
        config.merge_from_dict({key: parsed})
    except Exception as error:  # mmengine's parser raises errors of many kinds, and recurses without end
        raise ValueError(
            f"the override {f'{key}={value}'[:100]!r} cannot be set: {type(error).__name__}: "
            f"{message_of(error)[:100]}; values are numbers, words, and lists and tuples of these, and what is more "
            "belongs into the config file"
        ) from error


def build_runner(
    config: str | Path | Config,
    *,
    work_dir: str | Path | None = None,
    resume: bool = False,
    launcher: Launcher = "none",
    overrides: Sequence[str] = (),
    seed: int | None = None,
    deterministic: bool = False,
    training: bool = True,
) -> ResumableRunner:
    """Build the runner of a config; ``.train()`` and ``.test()`` are what it does.

    Args:
        config: The file, or what :func:`load_recipe` made of it.
        work_dir: Where checkpoints, logs and curves go; None for what the config says, else ``work_dirs/`` and its
            name.
        resume: Whether to go on from the last checkpoint there, if there is one.
        launcher: Who started the processes: nobody, torchrun, Slurm or MPI.
        overrides: As for :func:`load_recipe`.
        seed: Of all random numbers; None for what the config says.
        deterministic: Whether PyTorch may use only operators that give the same result in every run.
        training: False for a runner that only tests: without a checkpoint to begin with, and no sharded model.

    Raises:
        FileNotFoundError, KeyError, TypeError, ValueError: If the config or the launcher is not as it should be.
    """
    loaded = config if isinstance(config, Config) else load_recipe(config, overrides)
    if work_dir is not None or "work_dir" not in loaded:
        loaded.work_dir = str(work_dir or Path("work_dirs") / Path(loaded.filename or "run").stem)
    loaded.resume = resume or loaded.get("resume", False)
    loaded.launcher = launcher
    randomness = dict(loaded.get("randomness") or {})
    if seed is not None:
        randomness["seed"] = seed
    if deterministic:
        randomness["deterministic"] = True
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which PyTorch demands of cuBLAS then
    loaded.randomness = {"seed": 0, **randomness}
    if not training:
        loaded.update(load_from=None, resume=False, model_wrapper_cfg=None)
    _join(launcher)
    runner: ResumableRunner = ResumableRunner.from_cfg(loaded)
    return runner


def _join(launcher: str) -> None:
    """Check that the processes were started as the launcher says; without GPUs, meet them."""
    check_choice("launcher", launcher, ("none", *_LAUNCHERS))
    if launcher == "none":
        if (started := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise ValueError(f"this is one of {started} processes, as the environment says; add --launcher pytorch")
        return
    command, names = _LAUNCHERS[launcher]
    if not all(name in os.environ for name in names):
        raise ValueError(
            f"--launcher {launcher} is for processes that {command.split()[0]} started: "
            f"{command} -m resbackbone train CONFIG --launcher {launcher}"
        )
    os.environ |= {ours: os.environ[name] for ours, name in zip(_RANK, names, strict=True)}
    if launcher != "pytorch":
        os.environ.setdefault("MASTER_PORT", "29500")  # PyTorch's own
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_host(launcher)
    # mmengine's own way begins with choosing a GPU.
    if not torch.cuda.is_available() and not is_distributed():
        distributed.init_process_group("gloo")


def _first_host(launcher: str) -> str:
    """Find where the processes can meet.

    Raises:
        ValueError: If nobody says it.
    """
    if launcher == "slurm" and (hosts := os.environ.get("SLURM_NODELIST")):
        if not {"[", ","} & set(hosts):
            return hosts
        listed = subprocess.run(["scontrol", "show", "hostnames", hosts], check=True, capture_output=True, text=True)
        return listed.stdout.split()[0]
    if launcher == "mpi" and os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == os.environ["WORLD_SIZE"]:
        return "127.0.0.1"  # all are on one machine
    raise ValueError(f"--launcher {launcher} needs the name of the first host in MASTER_ADDR")


def leave_processes() -> None:
    """Leave the other processes, if there are any."""
    if is_distributed():
        distributed.destroy_process_group()
