"""Training curves over all resumed runs: lines of JSON, and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from resbackbone.registry import HOOKS
from resbackbone.utils.atomic_write import atomic_write

_NO_CURVES = {"mode", "epoch", "step", "iter", "time", "data_time", "memory"}


@HOOKS.register_module()
class CurvesHook(Hook):
    """Writes ``curves.jsonl`` and ``curves.png`` into the work folder when training has ended.

    It collects what mmengine's ``LocalVisBackend`` wrote in this run and in those that it resumed.
    """

    priority = "VERY_LOW"

    def before_train(self, runner: Any) -> None:
        """Note this run's folder, where checkpoints keep it for the runs that go on."""
        earlier = runner.message_hub.get_info("runs", [])
        runner.message_hub.update_info("runs", list(dict.fromkeys([*earlier, runner.timestamp])))

    def after_train(self, runner: Any) -> None:
        """Write both files, in the main process; without Matplotlib only the lines."""
        if not is_main_process():
            return
        folder, runs = Path(runner.work_dir), runner.message_hub.get_info("runs")
        records = read_curves(folder, runs, iterations=len(runner.train_dataloader))
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        with atomic_write(folder / "curves.jsonl") as path:
            path.write_text(lines, encoding="utf-8")
        try:
            draw_curves(records, folder / "curves.png")
        except ImportError as error:
            runner.logger.warning(f"no curves.png: {error}")


def read_curves(folder: Path, runs: Iterable[str], *, iterations: int) -> list[dict[str, Any]]:
    """Read what several runs of one training logged; where two logged the same step the later one counts.

    Args:
        folder: The work folder.
        runs: The names of the runs' folders in it, in the order of time.
        iterations: How many make an epoch.

    Returns:
        Training first, then validation. Each entry has ``mode``, "train" or "val"; ``epoch``, how many epochs lay
        behind, also in fractions; ``step``, counted in iterations or epochs; and what was logged.
    """
    steps: dict[tuple[str, int], dict[str, Any]] = {}
    for run in runs:
        path = folder / run / "vis_data" / "scalars.json"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                logged = json.loads(line)
            except json.JSONDecodeError:  # the run was killed while it wrote
                continue
            step = logged["step"]
            mode, epoch = ("train", step / iterations) if "iter" in logged else ("val", float(step))
            steps[mode, step] = {"mode": mode, **logged, "epoch": epoch}
    return [steps[key] for key in sorted(steps)]


def draw_curves(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Draw loss and accuracy over epochs as a PNG.

    Args:
        records: As :func:`read_curves` returns them.
        path: The file.

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'resbackbone[train]' has it") from error
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
    """Epochs and values of each loss and each metric."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name not in _NO_CURVES and ("loss" in name or record["mode"] == "val"):
                epochs, values = curves.setdefault(f"{record['mode']} {name}", ([], []))
                epochs.append(record["epoch"])
                values.append(value)
    return curves
