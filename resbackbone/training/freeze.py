"""Freeze and unfreeze the stages of backbones during training, also inside of ``DistributedDataParallel`` and FSDP2."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resbackbone.backbones import Backbone


def freeze(model: nn.Module, frozen_stages: int) -> None:
    """Change ``frozen_stages`` of a model's backbones, between two steps.

    What it freezes loses its gradient, so that no optimizer moves it. The optimizer must have the parameters that are
    to train, as one over ``param_groups(model, ..., with_frozen=True)`` has.

    Args:
        model: A backbone, or a model with one or several in it; it may be ``DistributedDataParallel``, which keeps its
            communication hook, or ``fully_shard``-ed, but not the older ``FullyShardedDataParallel``, which flattens
            parameters.
        frozen_stages: As for :meth:`resbackbone.backbones.Backbone.freeze`.

    Raises:
        TypeError, ValueError: If it is no integer from -1 to the number of stages, or there is no backbone.
    """
    for backbone in backbones_of(model):
        backbone.freeze(frozen_stages)
        for parameter in backbone.parameters():
            if not parameter.requires_grad:
                parameter.grad = None
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            _collect_parameters(module)


def backbones_of(model: nn.Module) -> list[Backbone]:
    """Return the backbones in a model; raise ValueError if there is none."""
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    if not backbones:
        raise ValueError(f"there is no backbone of resbackbone in this {type(model).__name__} to freeze")
    return backbones


def _collect_parameters(wrapper: DistributedDataParallel) -> None:
    """Let a wrapper find out again whose gradients it averages, which it does only when it is made, or unpickled."""
    state = {**wrapper.__getstate__(), "_comm_hooks": []}  # type: ignore[no-untyped-call]
    hooks = wrapper._comm_hooks
    del wrapper.reducer  # the old one would go on answering for its parameters
    wrapper.__setstate__(state)  # type: ignore[no-untyped-call]
    for hook, its_state in hooks:
        wrapper.register_comm_hook(its_state, hook)
