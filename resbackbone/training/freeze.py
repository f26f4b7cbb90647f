"""Freeze and unfreeze backbone stages during training, also inside ``DistributedDataParallel`` and FSDP2."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resbackbone.backbones import Backbone


def freeze(model: nn.Module, frozen_stages: int) -> None:
    """Change ``frozen_stages`` of all backbones in a model, between two training steps.

    The gradients of frozen parameters are set to None, so that optimizers skip them. The optimizer must hold every
    parameter that is trained later: build it over ``param_groups(model, ..., with_frozen=True)``.

    Args:
        model: A backbone, or a model that contains one or several. It may be wrapped in ``DistributedDataParallel``,
            which keeps its communication hook, or be sharded by ``fully_shard``. The older
            ``FullyShardedDataParallel`` is not supported, as it flattens parameters.
        frozen_stages: As for :meth:`resbackbone.backbones.Backbone.freeze`.

    Raises:
        TypeError, ValueError: If it is not an integer from -1 to the number of stages, or there is no backbone.
    """
    for backbone in find_backbones(model):
        backbone.freeze(frozen_stages)
        for parameter in backbone.parameters():
            if not parameter.requires_grad:
                parameter.grad = None
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            _rebuild_reducer(module)


def find_backbones(model: nn.Module) -> list[Backbone]:
    """Return the backbones in a model; raise ValueError if there is none."""
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    if not backbones:
        raise ValueError(f"there is no backbone of resbackbone in this {type(model).__name__} to freeze")
    return backbones


def _rebuild_reducer(wrapper: DistributedDataParallel) -> None:
    """Make ``DistributedDataParallel`` collect the parameters with ``requires_grad`` again.

    It collects them in its constructor and when it is unpickled, and has no other way to do so.
    """
    hooks = wrapper._comm_hooks
    wrapper.__setstate__({**wrapper.__getstate__(), "_comm_hooks": []})  # type: ignore[no-untyped-call]
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)
