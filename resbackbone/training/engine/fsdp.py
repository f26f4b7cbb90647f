"""FSDP2 model wrapper for mmengine, on PyTorch's ``fully_shard``."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import broadcast, get_world_size
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from resbackbone.backbones.base import Backbone
from resbackbone.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class FSDP2(nn.Module):
    """Shards parameters, gradients and optimizer state over all processes; each stage is gathered when it runs.

    For ``model_wrapper_cfg = dict(type="FSDP2")``. Checkpoints are the same as without sharding.

    Args:
        module: The model. Its weights are initialized here, before they are sharded.
        **options: Options of ``torch.distributed.fsdp.fully_shard``.

    Source: Zhao et al., PyTorch FSDP, VLDB 2023.
    """

    def __init__(self, module: Any, **options: Any) -> None:
        super().__init__()
        from torch.distributed.fsdp import fully_shard  # since PyTorch 2.6

        if hasattr(module, "init_weights"):
            module.init_weights()
        for tensor in module.state_dict().values():
            broadcast(tensor)
        mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (get_world_size(),))
        for backbone in [part for part in module.modules() if isinstance(part, Backbone)]:
            for name in backbone.res_layers:
                fully_shard(getattr(backbone, name), mesh=mesh, **options)
        self.module: Any = fully_shard(module, mesh=mesh, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: Any) -> Any:
        """Run a training step of the mmengine model."""
        return self.module.train_step(data, optim_wrapper=optim_wrapper)

    def val_step(self, data: Any) -> Any:
        """Predict a batch with the mmengine model."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> Any:
        """Predict a batch with the mmengine model."""
        return self.module.test_step(data)


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model has sharded parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def to_full_tensor(tensor: Tensor) -> Tensor:
    """Return a full tensor on the CPU; for a sharded tensor every process must call this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def load_full_state_dict(model: nn.Module, state: dict[str, Any], *, strict: bool) -> None:
    """Load full tensors into a model, sharded or not.

    Raises:
        RuntimeError: If keys or shapes do not match.
    """
    if is_sharded(model):
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=strict))
    else:
        model.load_state_dict(state, strict=strict)


def shard_optimizer_state(state: dict[str, Any], optim_wrapper: OptimWrapper | OptimWrapperDict) -> None:
    """Shard an optimizer state of full tensors like the parameters it belongs to, in place."""
    if isinstance(optim_wrapper, OptimWrapperDict):
        for name, wrapper in optim_wrapper.items():
            shard_optimizer_state(state[name], wrapper)
        return
    parameters = [parameter for group in optim_wrapper.optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        parameter = parameters[index]
        if isinstance(parameter, DTensor):
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    full = value.to(parameter.device)
                    values[name] = distribute_tensor(full, parameter.device_mesh, parameter.placements)
