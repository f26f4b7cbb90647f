"""mmengine's runner with atomic checkpoints that are safe to read and resume exactly."""

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
    CheckpointMismatchError,
    CheckpointSaveError,
    NonFiniteWeightsError,
    find_last_checkpoint,
    read_checkpoint,
    save_checkpoint,
    to_plain_values,
)
from resbackbone.training.engine.distributed import raise_on_all_ranks
from resbackbone.training.engine.fsdp import is_sharded, load_full_state_dict, shard_optimizer_state, to_full_tensor
from resbackbone.utils.validation import UnknownKeyError, nearest


@RUNNERS.register_module()
class ResumableRunner(Runner):
    """Trains and tests from a config, like mmengine's ``Runner``.

    Differences: checkpoints are written by :func:`save_checkpoint` and read by :func:`read_checkpoint`. Loading is
    strict. ``resume`` continues from the latest checkpoint in the work folder, also after the folder was moved; if
    there is none, training starts from ``load_from``. Several processes can train on CPUs.
    """

    _load_from: str | None
    _resume: bool

    @property
    def resuming(self) -> bool:
        """Whether an earlier run is resumed."""
        return self._resume

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model without its distributed wrapper."""
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
            out_dir: A local folder.
            filename: File name in it.
            file_client_args: Unused; passed by mmengine's hooks.
            save_optimizer: Whether to save the optimizer's state.
            save_param_scheduler: Whether to save the state of the parameter schedulers.
            meta: More metadata; its ``epoch`` and ``iter`` are where a resumed run starts.
            by_epoch: Whether this is the end of an epoch, if ``meta`` has no ``epoch`` and ``iter``.
            backend_args: Unused.

        Raises:
            CheckpointSaveError: If the disk is full or not writable, or a value cannot be resumed.
            NonFiniteWeightsError: If a weight is NaN or infinite.
        """
        with raise_on_all_ranks(CheckpointSaveError, NonFiniteWeightsError):
            if is_main_process() or is_sharded(self.unwrapped_model):
                checkpoint = self._state(meta, by_epoch, save_optimizer, save_param_scheduler)
            if is_main_process():
                self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
                save_checkpoint(checkpoint, Path(out_dir) / filename)

    def _state(
        self, meta: dict[str, Any] | None, by_epoch: bool, save_optimizer: bool, save_param_scheduler: bool
    ) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        counts = {"epoch": self.epoch + by_epoch, "iter": self.iter + (not by_epoch)}
        checkpoint: dict[str, Any] = {
            "meta": {**counts, **(meta or {}), **self._metadata()},
            "state_dict": _to_full_tensors(self.unwrapped_model.state_dict()),
            "message_hub": to_plain_values(self.message_hub.state_dict()),
        }
        if save_optimizer:
            checkpoint["optimizer"] = _to_full_tensors(self.optim_wrapper.state_dict())
        if save_param_scheduler and self.param_schedulers is not None:
            checkpoint["param_schedulers"] = _scheduler_states(self.param_schedulers)
        return checkpoint

    def _metadata(self) -> dict[str, Any]:
        metadata = {
            "cfg": self.message_hub.get_info("cfg"),  # formatted only once per run
            "seed": self.seed,
            "experiment_name": self.experiment_name,
            "time": time.strftime("%Y%m%d_%H%M%S"),
        }
        metainfo = getattr(self.train_dataloader.dataset, "metainfo", None)
        return metadata if metainfo is None else {**metadata, "dataset_meta": metainfo}

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable[..., Any] = "cpu",
        strict: bool = True,
        revise_keys: list[tuple[str, str]] | None = None,
    ) -> dict[str, Any]:
        """Load the weights of a checkpoint that this class saved.

        Args:
            filename: The file.
            map_location: Unused; tensors are loaded on the CPU and copied to the model.
            strict: Whether the keys must match those of the model exactly.
            revise_keys: Unused.

        Returns:
            The content of the file.

        Raises:
            FileNotFoundError: If a rank cannot find the file.
            CheckpointMismatchError: If it is not such a checkpoint, or does not match the model.
        """
        with raise_on_all_ranks(OSError, CheckpointMismatchError):
            checkpoint = read_checkpoint(filename)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        try:
            load_full_state_dict(self.unwrapped_model, checkpoint["state_dict"], strict=strict)
        except RuntimeError as error:
            raise CheckpointMismatchError(f"{filename!r} does not fit the config's model: {error}") from error
        if self._resume and "optimizer" in checkpoint:
            shard_optimizer_state(checkpoint["optimizer"], self.optim_wrapper)
        self._has_loaded = True
        self.logger.info(f"loaded {filename}")
        return checkpoint

    def load_or_resume(self) -> None:
        """Resume from the latest checkpoint in the work folder, if requested and found, or load ``load_from``."""
        if self._has_loaded:
            return
        self._resume = self._last_checkpoint is not None  # read by hooks
        if self._last_checkpoint is not None:
            self.resume(self._last_checkpoint)
        elif self._load_from is not None:
            self.load_checkpoint(self._load_from)

    @cached_property
    def _last_checkpoint(self) -> str | None:
        """The checkpoint to resume from, as found by rank 0: other ranks may see another disk."""
        last = find_last_checkpoint(self.work_dir) if self._resume else None
        decision = [None if last is None else str(last)]
        broadcast_object_list(decision)
        return decision[0]

    @staticmethod
    def build_dataloader(dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False) -> Any:
        """Build a data loader like mmengine.

        Raises:
            ValueError: If it has no batches.
        """
        loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        if isinstance(loader.dataset, Sized) and isinstance(loader.sampler, Sized) and len(loader) == 0:
            pictures, share = len(loader.dataset), len(loader.sampler)
            per_process = "" if share == pictures else f", {share} per process,"
            dataset = getattr(loader.dataset, "root", type(loader.dataset).__name__)
            raise ValueError(
                f"the data loader of {str(dataset)!r} has {pictures} pictures{per_process} and no batch: batch_size is "
                f"{loader.batch_size}, and drop_last=True drops a last batch with fewer; lower batch_size to at most "
                f"{share}, or set drop_last=False"
            )
        return loader

    def prepare(self) -> None:
        """Build the data loaders and initialize the weights, so that most config errors are raised before training."""
        _ = self.train_loop, self.val_loop
        self._init_model_weights()

    def _init_model_weights(self) -> None:
        if getattr(self.unwrapped_model, "is_init", False):
            return
        if self._last_checkpoint is not None:
            return  # it has all weights
        if self._resume:
            self.logger.info(f"no checkpoint in {self.work_dir} to resume from: starting a new run")
        super()._init_model_weights()

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Wrap the model if there are several processes; also on CPUs, for which mmengine would set a GPU."""
        if self.distributed and not is_model_wrapper(model):
            if model_wrapper_cfg is None:  # mmengine's default
                unused = self.cfg.get("find_unused_parameters", False)
                model_wrapper_cfg = {"broadcast_buffers": False, "find_unused_parameters": unused}
            model_wrapper_cfg = _resolve_wrapper({"type": "MMDistributedDataParallel", **model_wrapper_cfg})
        wrapped: nn.Module = super().wrap_model(model_wrapper_cfg, model)
        return wrapped

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        # mmengine's list takes seconds, and imports torchvision even if that is broken.
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        self.logger.info(
            f"PyTorch {torch.__version__}, mmengine {mmengine.__version__}, {where}, "
            f"processes: {self.world_size}, seed: {self.seed}, config and results: {self.work_dir}"
        )


def _resolve_wrapper(cfg: dict[str, Any]) -> dict[str, Any]:
    """Return a wrapper config for mmengine: with a type that its root registry finds, and without a GPU on CPUs."""
    name = cfg["type"]
    kind = MODEL_WRAPPERS.get(name)
    if kind is None:
        known = {*MODEL_WRAPPERS.module_dict, *MODEL_WRAPPERS.parent.module_dict}
        raise UnknownKeyError(f"unknown model_wrapper_cfg.type {name!r}{nearest(name, known)}")
    if name in MODEL_WRAPPERS.module_dict:
        cfg = {**cfg, "type": f"{MODEL_WRAPPERS.scope}.{name}"}
    on_cpus = issubclass(kind, DistributedDataParallel) and not torch.cuda.is_available()
    return {**cfg, "device_ids": None} if on_cpus else cfg


def _to_full_tensors(state: Any) -> Any:
    return apply_to(state, lambda value: isinstance(value, Tensor), to_full_tensor)


def _scheduler_states(schedulers: Any) -> Any:
    if isinstance(schedulers, Mapping):
        return {name: _scheduler_states(group) for name, group in schedulers.items()}
    states = [scheduler.state_dict() for scheduler in schedulers]
    # Functions, as in OneCycleLR, are rebuilt from the config.
    return [{name: value for name, value in state.items() if not callable(value)} for state in states]
