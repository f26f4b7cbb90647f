"""Hook that writes the training curves of a run and the runs it resumed, as JSON lines and as a PNG."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from resbackbone.registry import HOOKS
from resbackbone.utils.atomic_write import atomic_write

_NOT_PLOTTED = {"mode", "epoch", "step", "iter", "time", "data_time", "memory"}


@HOOKS.register_module()
class CurvesHook(Hook):
    """Writes ``curves.jsonl`` and ``curves.png`` to the work folder at the end of training.

    They contain the scalars that mmengine's ``LocalVisBackend`` logged in this run and in those it resumed.
    """

    priority = "VERY_LOW"

    def before_train(self, runner: Any) -> None:
        """Record the name of this run's folder in the message hub, which checkpoints save."""
        earlier = runner.message_hub.get_info("runs", [])
        runner.message_hub.update_info("runs", list(dict.fromkeys([*earlier, runner.timestamp])))

    def after_train(self, runner: Any) -> None:
        """Write both files, in the main process; without Matplotlib only ``curves.jsonl``."""
        if not is_main_process():
            return
        folder, runs = Path(runner.work_dir), runner.message_hub.get_info("runs")
        records = read_curves(folder, runs, iterations=len(runner.train_dataloader))
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        with atomic_write(folder / "curves.jsonl") as path:
            path.write_text(lines, encoding="utf-8")
        try:
            plot_curves(records, folder / "curves.png")
        except ImportError as error:
            runner.logger.warning(f"no curves.png: {error}")


def read_curves(folder: Path, runs: Iterable[str], *, iterations: int) -> list[dict[str, Any]]:
    """Read the logged scalars of several runs of one training; for a step logged twice, the later run counts.

    Args:
        folder: The work folder.
        runs: Names of the runs' folders in it, oldest first.
        iterations: Number of iterations per epoch.

    Returns:
        Training records, then validation records. Each has ``mode``, "train" or "val"; ``epoch``, the number of epochs
        completed, possibly fractional; ``step``, in iterations or epochs; and the logged scalars.
    """
    steps: dict[tuple[str, int], dict[str, Any]] = {}
    for run in runs:
        path = folder / run / "vis_data" / "scalars.json"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                logged = json.loads(line)
            except json.JSONDecodeError:  # the run was killed while writing
                continue
            step = logged["step"]
            mode, epoch = ("train", step / iterations) if "iter" in logged else ("val", float(step))
            steps[mode, step] = {"mode": mode, **logged, "epoch": epoch}
    return [steps[key] for key in sorted(steps)]


def plot_curves(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Plot losses and metrics over epochs to a PNG file.

    Args:
        records: Records from :func:`read_curves`.
        path: The file.

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'resbackbone[train]' installs it") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels: dict[Literal["loss", "accuracy"], Any] = {}
    for panel, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        panel.set(xlabel="epoch", title=name)
        panel.grid(alpha=0.3)
        panels[name] = panel  # type: ignore[index]
    for label, (epochs, values) in _curves(records).items():
        panel = panels["loss" if "loss" in label or "entropy" in label else "accuracy"]
        panel.plot(epochs, values, label=label, marker="." if len(epochs) < 30 else None)
    for panel in panels.values():
        if panel.lines:
            panel.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _curves(records: Iterable[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Return epochs and values of each loss and metric."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name not in _NOT_PLOTTED and ("loss" in name or record["mode"] == "val"):
                epochs, values = curves.setdefault(f"{record['mode']} {name}", ([], []))
                epochs.append(record["epoch"])
                values.append(value)
    return curves
