"""mmengine's runner with checkpoints that are atomic, safe to read, and sufficient for an exact resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sized
from functools import cached_property
from pathlib import Path
from typing import Any

import mmengine
import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resbackbone.registry import MODEL_WRAPPERS, RUNNERS
from resbackbone.training.engine.checkpoints import (
    CheckpointDoesNotFit,
    CheckpointNotSaved,
    NonFiniteWeights,
    find_last_checkpoint,
    plain_state,
    read_checkpoint,
    save_checkpoint,
)
from resbackbone.training.engine.distributed import fail_together
from resbackbone.training.engine.fsdp import gather, is_sharded, load_model, shard_optimizer_state
from resbackbone.utils.validation import UnknownKeyError, nearest


@RUNNERS.register_module()
class ResumableRunner(Runner):
    """Trains and tests from a config, as mmengine's ``Runner`` does.

    Differences: checkpoints are written by :func:`save_checkpoint` and read by :func:`read_checkpoint`; loading one is
    strict; ``resume`` means the last one of the work folder, wherever that is now, and if it has none ``load_from``
    gives the weights that training begins with; several processes train on CPUs, too.
    """

    _load_from: str | None
    _resume: bool

    @property
    def resuming(self) -> bool:
        """Whether an earlier run goes on."""
        return self._resume

    @property
    def bare_model(self) -> nn.Module:
        """The model without what makes it one of many processes'."""
        model: nn.Module = self.model.module if is_model_wrapper(self.model) else self.model
        return model

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict[str, Any] | None = None,
        by_epoch: bool = True,
        backend_args: None = None,
    ) -> None:
        """Save a checkpoint, in the main process; every process must call this.

        Args:
            out_dir: A folder of this machine.
            filename: Its name there.
            file_client_args: Not used; mmengine's hooks pass it.
            save_optimizer: Whether the optimizer's state goes with it.
            save_param_scheduler: Whether the schedules' state does.
            meta: Goes with it; of its entries ``epoch`` and ``iter`` are what a resumed run begins with.
            by_epoch: Whether it is the end of an epoch, where ``meta`` does not say.
            backend_args: Not used, either.

        Raises:
            CheckpointNotSaved: If the disk is full or cannot be written to, or something in it cannot be resumed.
            NonFiniteWeights: If a weight is NaN or infinite.
        """
        with fail_together(CheckpointNotSaved, NonFiniteWeights):
            if is_main_process() or is_sharded(self.bare_model):
                checkpoint = self._state(meta, by_epoch, save_optimizer, save_param_scheduler)
            if is_main_process():
                self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
                save_checkpoint(checkpoint, Path(out_dir) / filename)

    def _state(
        self, meta: dict[str, Any] | None, by_epoch: bool, save_optimizer: bool, save_param_scheduler: bool
    ) -> dict[str, Any]:
        """All that a resumed run needs."""
        counts = {"epoch": self.epoch + by_epoch, "iter": self.iter + (not by_epoch)}
        checkpoint: dict[str, Any] = {
            "meta": {**counts, **(meta or {}), **self._about()},
            "state_dict": _whole(self.bare_model.state_dict()),
            "message_hub": plain_state(self.message_hub.state_dict()),
        }
        if save_optimizer:
            checkpoint["optimizer"] = _whole(self.optim_wrapper.state_dict())
        if save_param_scheduler and self.param_schedulers is not None:
            checkpoint["param_schedulers"] = _states(self.param_schedulers)
        return checkpoint

    def _about(self) -> dict[str, Any]:
        about = {
            "cfg": self.message_hub.get_info("cfg"),  # which is formatted but once
            "seed": self.seed,
            "experiment_name": self.experiment_name,
            "time": time.strftime("%Y%m%d_%H%M%S"),
        }
        metainfo = getattr(self.train_dataloader.dataset, "metainfo", None)
        return about if metainfo is None else {**about, "dataset_meta": metainfo}

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable[..., Any] = "cpu",
        strict: bool = True,
        revise_keys: list[tuple[str, str]] | None = None,
    ) -> dict[str, Any]:
        """Load the weights of a checkpoint that this class has saved.

        Args:
            filename: The file.
            map_location: Not used; tensors are read to the CPU and copied from there.
            strict: Whether every tensor of the model must be there, and no other.
            revise_keys: Not used, either.

        Returns:
            What the file holds.

        Raises:
            FileNotFoundError: If there is none; of several processes, if one does not find it.
            CheckpointDoesNotFit: If it is no such checkpoint, or not one of this model.
        """
        with fail_together(OSError, CheckpointDoesNotFit):
            checkpoint = read_checkpoint(filename)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        try:
            load_model(self.bare_model, checkpoint["state_dict"], strict=strict)
        except RuntimeError as error:
            raise CheckpointDoesNotFit(f"{filename!r} does not fit the config's model: {error}") from error
        if self._resume and "optimizer" in checkpoint:
            shard_optimizer_state(checkpoint["optimizer"], self.optim_wrapper)
        self._has_loaded = True
        self.logger.info(f"loaded {filename}")
        return checkpoint

    def load_or_resume(self) -> None:
        """Go on from the last checkpoint of the work folder, if that is asked for and there is one, or load weights."""
        if self._has_loaded:
            return
        self._resume = self._last_checkpoint is not None  # which hooks look at
        if self._last_checkpoint is not None:
            self.resume(self._last_checkpoint)
        elif self._load_from is not None:
            self.load_checkpoint(self._load_from)

    @cached_property
    def _last_checkpoint(self) -> str | None:
        """What is resumed. The main process decides: others may see another disk, and must not begin anew alone."""
        last = find_last_checkpoint(self.work_dir) if self._resume else None
        decision = [None if last is None else str(last)]
        broadcast_object_list(decision)
        return decision[0]

    @staticmethod
    def build_dataloader(dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False) -> Any:
        """Build a data loader, as mmengine does.

        Raises:
            ValueError: If it has no batch.
        """
        loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        if isinstance(loader.dataset, Sized) and isinstance(loader.sampler, Sized) and len(loader) == 0:
            pictures, share = len(loader.dataset), len(loader.sampler)
            of_each = "" if share == pictures else f", {share} for each process,"
            where = getattr(loader.dataset, "root", type(loader.dataset).__name__)
            raise ValueError(
                f"the data loader of {str(where)!r} has {pictures} pictures{of_each} and no batch: batch_size is "
                f"{loader.batch_size}, and drop_last=True leaves out a last batch with fewer; lower batch_size to at "
                f"most {share}, or say drop_last=False"
            )
        return loader

    def prepare(self) -> None:
        """Find the data and initialize the weights: where most mistakes of a config show, before training begins."""
        _ = self.train_loop, self.val_loop
        self._init_model_weights()

    def _init_model_weights(self) -> None:
        if getattr(self.bare_model, "is_init", False):
            return
        if self._last_checkpoint is not None:
            return  # every weight comes from there
        if self._resume:
            self.logger.info(f"no checkpoint in {self.work_dir} yet: training begins from the start")
        super()._init_model_weights()

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Wrap the model for several processes, if there are several; on CPUs, too, for which mmengine names a GPU."""
        if self.distributed and not is_model_wrapper(model):
            if model_wrapper_cfg is None:  # as mmengine has it
                unused = self.cfg.get("find_unused_parameters", False)
                model_wrapper_cfg = {"broadcast_buffers": False, "find_unused_parameters": unused}
            model_wrapper_cfg = _wrapper({"type": "MMDistributedDataParallel", **model_wrapper_cfg})
        wrapped: nn.Module = super().wrap_model(model_wrapper_cfg, model)
        return wrapped

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        # In place of mmengine's list, which takes seconds and imports torchvision, whether that works or not.
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        self.logger.info(
            f"PyTorch {torch.__version__}, mmengine {mmengine.__version__}, {where}, "
            f"processes: {self.world_size}, seed: {self.seed}, config and results: {self.work_dir}"
        )


def _wrapper(cfg: dict[str, Any]) -> dict[str, Any]:
    """Return a wrapper's config as mmengine takes it: with a name that its root registry finds, and no GPU on CPUs."""
    name = cfg["type"]
    kind = MODEL_WRAPPERS.get(name)
    if kind is None:
        known = {*MODEL_WRAPPERS.module_dict, *MODEL_WRAPPERS.parent.module_dict}
        raise UnknownKeyError(f"unknown model_wrapper_cfg.type {name!r}{nearest(name, known)}")
    if name in MODEL_WRAPPERS.module_dict:
        cfg = {**cfg, "type": f"{MODEL_WRAPPERS.scope}.{name}"}
    on_cpus = issubclass(kind, DistributedDataParallel) and not torch.cuda.is_available()
    return {**cfg, "device_ids": None} if on_cpus else cfg


def _whole(state: Any) -> Any:
    return apply_to(state, lambda value: isinstance(value, Tensor), gather)


def _states(schedulers: Any) -> Any:
    if isinstance(schedulers, Mapping):
        return {name: _states(several) for name, several in schedulers.items()}
    states = [scheduler.state_dict() for scheduler in schedulers]
    # Functions, as OneCycleLR has one, come from the config again.
    return [{name: value for name, value in state.items() if not callable(value)} for state in states]
