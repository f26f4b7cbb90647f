"""Synchronized batch norm: statistics over the batches of all processes, on any device."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from resbackbone.layers.conv_norm import FOLDABLE_NORMS
from resbackbone.utils.logs import log_info

Net = TypeVar("Net", bound=nn.Module)


def sync_batch_norms(net: Net) -> Net:
    """Synchronize all batch norms of a model if there are several processes, and use plain batch norm otherwise.

    Call it after ``init_process_group`` and after moving the model to its device, before or after wrapping it in
    ``DistributedDataParallel`` or ``fully_shard``. With several processes, batch norms become
    :class:`torch.nn.SyncBatchNorm` on accelerators and :class:`AllReduceBatchNorm` on other devices; in a single
    process, synchronized ones become :class:`BatchNormNd`. The new layers hold the same parameters, buffers, mode and
    hooks, so optimizers and checkpoints work as before.
    Subclasses of PyTorch's batch norms are not replaced. Layers in eval mode, as in frozen stages, do not communicate.
    One INFO line logs what was replaced.

    Args:
        net: A backbone or a whole model. Modified in place.

    Returns:
        The same net; a new layer if ``net`` itself is a batch norm.

    >>> from resbackbone import build_backbone
    >>> net = sync_batch_norms(build_backbone("resnet18", norm_cfg=dict(type="SyncBN")))
    >>> type(net.bn1)
    <class 'resbackbone.training.sync_batch_norm.BatchNormNd'>
    """
    if num_processes() > 1:
        on_accelerator = any(parameter.device.type in ("cuda", "xpu") for parameter in net.parameters())
        synchronized = nn.SyncBatchNorm if on_accelerator else AllReduceBatchNorm
        net, count = _replace(net, (*_PLAIN, *_SYNCHRONIZED), synchronized)
        message = f"synchronizing {count} batch norms over {num_processes()} processes"
    else:
        net, count = _replace(net, _SYNCHRONIZED, BatchNormNd)
        message = f"replaced {count} synchronized batch norms by plain ones, as there is one process"
    if count:
        log_info(message)
    return net


def _replace(net: Any, classes: tuple[type[nn.Module], ...], new_class: type[nn.Module]) -> tuple[Any, int]:
    """Replace the layers of these classes; return the model and the number of layers."""
    replaced: dict[nn.Module, nn.Module] = {}  # a layer used in several places stays one layer
    for name, norm in list(net.named_modules(remove_duplicate=False)):
        if type(norm) in classes:
            if norm not in replaced:
                replaced[norm] = _convert(norm, new_class)
            if name:
                net.set_submodule(name, replaced[norm])
    return replaced.get(net, net), len(replaced)


def _convert(norm: nn.Module, new_class: type[nn.Module]) -> nn.Module:
    """Return a layer of another class with the state of a batch norm, which both share as by ``copy.copy``.

    Wrappers that keep a reference to the old layer, as ``fully_shard`` does, thus change the new one's parameters too.
    """
    new = new_class.__new__(new_class)
    new.__setstate__({"process_group": None, **norm.__dict__})  # type: ignore[no-untyped-call]
    return new


def num_processes(group: Any = None) -> int:
    """Return the number of processes in a group, or in all; 1 before ``init_process_group``."""
    is_distributed = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size(group) if is_distributed else 1


class BatchNormNd(nn.BatchNorm2d):
    """Plain batch norm of inputs with any number of dimensions, as synchronized batch norm accepts them."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class AllReduceBatchNorm(BatchNormNd):
    """Synchronized batch norm by ``all_reduce``, on any device and backend.

    :class:`torch.nn.SyncBatchNorm` is faster, but supports accelerators only. In eval mode and in a single process this
    is plain batch norm.

    Shapes: ``(N, num_features, ...)`` to the same; N may differ between processes.

    Source: Peng et al., MegDet, arXiv:1711.07240, section 3.3.
    """

    process_group: Any = None  # all processes

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, num_features, ...)``.

        Raises:
            ValueError: If all processes together have a single value per channel.
        """
        if not self.training or num_processes(self.process_group) == 1:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [dim for dim in range(x.dim()) if dim != 1]
        per_channel = (1, -1, *(1 for _ in dims[1:]))
        own_count = x.new_tensor([x.numel() / x.shape[1]])
        sums = _all_reduce(torch.cat([x.sum(dims), own_count]), self.process_group)
        count = sums[-1].detach()
        if count < 2:
            raise ValueError(
                "expected more than 1 value per channel when training, over all processes; got input of shape "
                f"{tuple(input.shape)} in this process; drop_last=True of the data loader drops a last batch of one"
            )
        mean = sums[:-1] / count
        centered = x - mean.view(per_channel)
        var = _all_reduce(centered.square().sum(dims), self.process_group) / count
        self._update_statistics(mean.detach(), var.detach() * count / (count - 1))
        out = centered * (var + self.eps).rsqrt().view(per_channel)
        if self.weight is not None:
            out = out * self.weight.view(per_channel)
        if self.bias is not None:
            out = out + self.bias.view(per_channel)
        return out.to(input.dtype)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.copy_(running.to(new.dtype).lerp(new, factor))  # the buffers may be in half precision


FOLDABLE_NORMS.add(AllReduceBatchNorm.forward)  # plain batch norm in eval mode


class _AllReduce(torch.autograd.Function):
    """Sum over all processes. The sum enters the loss of each, so the gradient is summed over all processes too."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = own.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


def _all_reduce(own: Tensor, group: Any) -> Tensor:
    total: Tensor = _AllReduce.apply(own, group)  # type: ignore[no-untyped-call]
    return total


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormNd)
_SYNCHRONIZED = (nn.SyncBatchNorm, AllReduceBatchNorm)
