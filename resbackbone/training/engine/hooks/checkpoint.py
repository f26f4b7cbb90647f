"""Hook that saves checkpoints so that a crash at any moment leaves a usable one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook

from resbackbone.registry import HOOKS
from resbackbone.training.engine.checkpoints import note_last_checkpoint
from resbackbone.training.engine.distributed import raise_on_all_ranks


@HOOKS.register_module()
class ResumableCheckpointHook(CheckpointHook):
    """mmengine's checkpoint hook in a crash-safe order: save the new one, record it as the latest, delete old ones.

    mmengine's hook deletes first, and may leave an empty ``last_checkpoint`` in a crash. Arguments are the same:
    ``interval`` in epochs, or in iterations with ``by_epoch=False``; ``max_keep_ckpts``, ``save_best``, ...

    Raises:
        TypeError: If ``save_best`` is a list; only one metric is supported.
    """

    best_ckpt_path: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.save_best is not None and len(self.save_best) > 1:
            raise TypeError(f"`save_best` must be the name of one metric, got {self.save_best}")

    def before_train(self, runner: Any) -> None:
        """Restore the lists of kept and best checkpoints from the resumed one, also after the folder was moved."""
        super().before_train(runner)
        for name in ("last_ckpt", "best_ckpt"):
            if (path := runner.message_hub.get_info(name)) is not None:
                runner.message_hub.update_info(name, str(Path(self.out_dir) / Path(path).name))
        if self.save_best:
            self.best_ckpt_path = runner.message_hub.get_info("best_ckpt")

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        folder, name = Path(self.out_dir), self.filename_tmpl.format(step)
        expired = []
        if self.max_keep_ckpts > 0:
            kept = [*(earlier for earlier in self.keep_ckpt_ids if earlier != step), step]
            expired = kept[: -self.max_keep_ckpts]
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(kept)  # a deque of that length, which drops the expired ones
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        self.last_ckpt = str(folder / name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            str(folder),
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
        )
        with raise_on_all_ranks(OSError):
            if is_main_process():
                note_last_checkpoint(Path(runner.work_dir), self.last_ckpt)
                for earlier in expired:
                    (folder / self.filename_tmpl.format(earlier)).unlink(missing_ok=True)

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, Any]) -> None:
        if not self.save_best:
            return
        previous = self.best_ckpt_path
        self.best_ckpt_path = None  # otherwise mmengine deletes it before saving the next
        super()._save_best_checkpoint(runner, metrics)
        if self.best_ckpt_path is None:
            self.best_ckpt_path = previous
        elif previous not in (None, self.best_ckpt_path) and is_main_process():
            Path(previous).unlink(missing_ok=True)
