"""``resbackbone test``: the accuracy of a checkpoint on a config's test set."""

from __future__ import annotations

from typing import Annotated

import typer

from resbackbone.cli.console import Imports, check_folder, echo, import_user_modules, user_errors
from resbackbone.cli.train import ConfigFile, Launcher, MoreOverrides, Overrides, Started, WorkFolder


def measure(
    config: ConfigFile,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A file, a name of `resbackbone list --weights`, or a URL.")
    ],
    more_options: MoreOverrides = None,
    *,
    work_dir: WorkFolder = None,
    launcher: Started = Launcher.NONE,
    cfg_options: Overrides = None,
    imports: Imports = None,
) -> None:
    """Measure the accuracy of a checkpoint of `resbackbone train`, or of a third-party one with a classifier."""
    from mmengine.dist import is_main_process

    from resbackbone.training.classification import ClassCheckHook, ImageClassifier
    from resbackbone.training.engine import build_runner, leave_process_group

    with user_errors():
        import_user_modules(imports)
        if work_dir is not None:
            check_folder("--work-dir", work_dir)
        runner = build_runner(
            config,
            work_dir=work_dir,
            launcher=launcher.value,
            overrides=[*(cfg_options or ()), *(more_options or ())],
            training=False,
        )
        load = getattr(runner.unwrapped_model, "load_weights", runner.load_checkpoint)
        load(checkpoint)
        if isinstance(runner.unwrapped_model, ImageClassifier) and not any(
            isinstance(h, ClassCheckHook) for h in runner.hooks
        ):
            runner.register_hook(ClassCheckHook())  # whatever the config says: accuracy means nothing without
        metrics = runner.test()
    if is_main_process():
        echo(", ".join(f"{name} {value:.2f}" for name, value in metrics.items()), style="green")
    leave_process_group()
