"""Build a runner from a training config and command line options, for any launcher."""

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
# Keys that an override may add to a config; any other new key is taken for a typo.
_OPTIONAL_KEYS = {
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
_DICT = re.compile(r"\bdict\(|\{\s*(['\"]?)\w+\1\s*:")  # mmengine's parser would read it as a string
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# For each launcher, its command and the environment variables equivalent to those of torchrun.
_LAUNCHERS = {
    "pytorch": ("torchrun --nproc-per-node 2", _TORCHRUN_VARIABLES),
    "slurm": ("srun --ntasks 2 python", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")),
    "mpi": ("mpirun -n 2 python", tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK"))),
}


def load_training_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a training config in OpenMMLab's format. It is Python code and is executed: load only trusted files.

    Args:
        path: The file.
        overrides: Changes as ``key=value``, with dots between the keys of nested dicts and the indices of lists, such
            as ``train_cfg.max_epochs=5`` or ``train_dataloader.dataset.classes=[cat,dog]``.

    Raises:
        FileNotFoundError: If the file does not exist.
        KeyError: If an override starts with an unknown key.
        ValueError: If the file is not a .py file or fails to run, or an override is invalid.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file at {str(path)!r}")
    if Path(path).suffix != ".py":
        raise ValueError(
            f"a training config must be a .py file in OpenMMLab's format, got {str(path)!r}; from other formats "
            "mmengine would import and call whatever they name"
        )
    try:
        config = Config.fromfile(path)
    except Exception as error:  # the config is arbitrary Python
        raise ValueError(f"{str(path)!r} fails to run: {type(error).__name__}: {message_of(error)}") from error
    allow_imported(config.get("custom_imports"))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"an override must be KEY=VALUE, such as train_cfg.max_epochs=5; got {override!r}")
        known = {*config, *_OPTIONAL_KEYS}
        if (name := key.partition(".")[0]) not in known:
            raise UnknownKeyError(f"the config has no {name!r}{nearest(name, known)}")
        _override(config, key, value)
    return config


def _override(config: Config, key: str, value: str) -> None:
    """Apply an override.

    Raises:
        ValueError: If the value cannot be parsed, or the config has no such key.
    """
    try:
        parsed = DictAction._parse_iterable(value)
        if _DICT.search(value):
            raise ValueError("the value contains a dict")
        config.merge_from_dict({key: parsed})
    except Exception as error:  # mmengine's parser raises many types, RecursionError too
        raise ValueError(
            f"the override {f'{key}={value}'[:100]!r} cannot be set: {type(error).__name__}: "
            f"{message_of(error)[:100]}; values are numbers, strings, and lists and tuples of them; set others in "
            "the config file"
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
    """Build the runner of a training config; then call its ``train()`` or ``test()``.

    Args:
        config: The file, or a config from :func:`load_training_config`.
        work_dir: Folder for checkpoints, logs and curves; None for that of the config, else ``work_dirs/`` and the
            config's name.
        resume: Whether to resume from the latest checkpoint in the work folder, if there is one.
        launcher: What started the processes: "pytorch" (torchrun), "slurm" or "mpi"; "none" for a single process.
        overrides: As for :func:`load_training_config`.
        seed: Random seed; None for that of the config, else 0.
        deterministic: Whether to use deterministic operators only.
        training: False for a runner that only tests, without ``load_from``, ``resume`` and a sharded model.

    Raises:
        FileNotFoundError, KeyError, TypeError, ValueError: If the config or the launcher is invalid.
    """
    loaded = config if isinstance(config, Config) else load_training_config(config, overrides)
    if work_dir is not None or "work_dir" not in loaded:
        loaded.work_dir = str(work_dir or Path("work_dirs") / Path(loaded.filename or "run").stem)
    loaded.resume = resume or loaded.get("resume", False)
    loaded.launcher = launcher
    randomness = dict(loaded.get("randomness") or {})
    if seed is not None:
        randomness["seed"] = seed
    if deterministic:
        randomness["deterministic"] = True
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch requires it for cuBLAS
    loaded.randomness = {"seed": 0, **randomness}
    if not training:
        loaded.update(load_from=None, resume=False, model_wrapper_cfg=None)
    _init_processes(launcher)
    runner: ResumableRunner = ResumableRunner.from_cfg(loaded)
    return runner


def _init_processes(launcher: str) -> None:
    """Check that the launcher started this process; without GPUs, initialize the process group."""
    check_choice("launcher", launcher, ("none", *_LAUNCHERS))
    if launcher == "none":
        if (started := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise ValueError(
                f"WORLD_SIZE={started} in the environment, but no launcher is given; add --launcher pytorch"
            )
        return
    command, names = _LAUNCHERS[launcher]
    if not all(name in os.environ for name in names):
        raise ValueError(
            f"--launcher {launcher} needs processes started by {command.split()[0]}: "
            f"{command} -m resbackbone train CONFIG --launcher {launcher}"
        )
    os.environ |= {variable: os.environ[name] for variable, name in zip(_TORCHRUN_VARIABLES, names, strict=True)}
    if launcher != "pytorch":
        os.environ.setdefault("MASTER_PORT", "29500")  # PyTorch's default
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_host(launcher)
    # mmengine's `init_dist` would select a GPU.
    if not torch.cuda.is_available() and not is_distributed():
        distributed.init_process_group("gloo")


def _first_host(launcher: str) -> str:
    """Return the host of rank 0.

    Raises:
        ValueError: If the launcher does not provide it.
    """
    if launcher == "slurm" and (hosts := os.environ.get("SLURM_NODELIST")):
        if not {"[", ","} & set(hosts):
            return hosts
        listed = subprocess.run(["scontrol", "show", "hostnames", hosts], check=True, capture_output=True, text=True)
        return listed.stdout.split()[0]
    if launcher == "mpi" and os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == os.environ["WORLD_SIZE"]:
        return "127.0.0.1"  # all are on one machine
    raise ValueError(f"--launcher {launcher} needs the name of the first host in MASTER_ADDR")


def leave_process_group() -> None:
    """Destroy the process group, if there is one."""
    if is_distributed():
        distributed.destroy_process_group()
