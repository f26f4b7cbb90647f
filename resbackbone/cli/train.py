"""``resbackbone train``: training from a config."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from resbackbone.cli.console import Imports, check_folder, echo, import_user_modules, user_errors


class Launcher(str, Enum):
    """Launcher of the processes."""

    NONE = "none"
    PYTORCH = "pytorch"
    SLURM = "slurm"
    MPI = "mpi"


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A .py file in OpenMMLab's format.")]
MoreOverrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="More --cfg-options.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--cfg-options", metavar="KEY=VALUE...", help="Config overrides, such as train_cfg.max_epochs=5."),
]
Started = Annotated[Launcher, typer.Option(help="Launcher of the processes; pytorch means torchrun.")]
WorkFolder = Annotated[
    Path | None,
    typer.Option(help="Folder for checkpoints, logs and curves.", show_default="work_dirs/ and CONFIG's name"),
]


def train(
    config: ConfigFile,
    more_options: MoreOverrides = None,
    *,
    work_dir: WorkFolder = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint in the work folder, if any.")
    ] = False,
    launcher: Started = Launcher.NONE,
    cfg_options: Overrides = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.", show_default="the config's, else 0")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Use only operators with reproducible results.")
    ] = False,
    imports: Imports = None,
) -> None:
    """Train from a config; it is a Python file that is run, so use only configs that you trust.

    Several processes: torchrun --nproc-per-node 2 -m resbackbone train CONFIG --launcher pytorch
    """
    from mmengine.dist import is_main_process

    from resbackbone.training.classification import ClassMismatchError, UnreadablePictureError
    from resbackbone.training.engine import (
        BatchTooSmallError,
        CheckpointMismatchError,
        build_runner,
        leave_process_group,
    )

    with user_errors():
        import_user_modules(imports)
        if work_dir is not None:
            check_folder("--work-dir", work_dir)
        runner = build_runner(
            config,
            work_dir=work_dir,
            resume=resume,
            launcher=launcher.value,
            overrides=[*(cfg_options or ()), *(more_options or ())],
            seed=seed,
            deterministic=deterministic,
        )
        runner.prepare()
    with user_errors(
        OSError,
        ArithmeticError,
        BatchTooSmallError,
        CheckpointMismatchError,
        ClassMismatchError,
        UnreadablePictureError,
    ):
        runner.train()
    if is_main_process():
        echo(f"trained: {runner.message_hub.get_info('last_ckpt')}", style="green")
        if (best := runner.message_hub.get_info("best_score")) is not None:
            echo(f"best: {best:.2f} of {runner.message_hub.get_info('best_ckpt')}")
        echo(f"curves: {Path(runner.work_dir) / 'curves.png'}")
    leave_process_group()
