"""Batch norms that see the batches of all processes, where there are several."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, distributed, nn

from resbackbone.utils.logs import log_info

Net = TypeVar("Net", bound=nn.Module)


def sync_batch_norms(net: Net) -> Net:
    """Synchronise a net's batch norms where there are several processes, and make them plain where not.

    Call it once the process group is there and the net on its device. The layers stay where and what they are, with
    their parameters, statistics and keys; only their class changes: on accelerators to :class:`torch.nn.SyncBatchNorm`,
    elsewhere to :class:`SyncedBatchNorm`, and in one process to :class:`BatchNorm`. Classes derived from torch's batch
    norms are left alone. What is in eval mode, as norms of frozen stages are, synchronizes nothing. What was changed is
    logged, in one line of level INFO.

    Args:
        net: A backbone or a whole model; it is changed.

    Returns:
        The same net.

    >>> from resbackbone import build_backbone
    >>> net = sync_batch_norms(build_backbone("resnet18", norm_cfg=dict(type="SyncBN")))
    >>> type(net.bn1)
    <class 'resbackbone.training.sync_batch_norm.BatchNorm'>
    """
    norms = [layer for layer in net.modules() if type(layer) in (*_PLAIN, *_SYNCHRONIZED)]
    if num_processes() > 1:
        on_accelerator = any(parameter.device.type in ("cuda", "xpu") for parameter in net.parameters())
        _make(norms, nn.SyncBatchNorm if on_accelerator else SyncedBatchNorm)
        if norms:
            log_info(f"{len(norms)} batch norms see the batches of {num_processes()} processes")
    elif synchronized := [norm for norm in norms if type(norm) in _SYNCHRONIZED]:
        _make(synchronized, BatchNorm)
        log_info(f"in one process {len(synchronized)} synchronised batch norms are plain")
    return net


def _make(norms: list[nn.Module], norm_class: type[nn.Module]) -> None:
    for norm in norms:
        norm.__class__ = norm_class  # and not a new layer, so that hooks, optimizers and wrappers go on with this one
        vars(norm).setdefault("process_group", None)  # all of them; torch's class looks for it


def num_processes(group: Any = None) -> int:
    """Return how many processes train together, in a group or at all; 1 before ``init_process_group``."""
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size(group) if together else 1


class BatchNorm(nn.BatchNorm2d):
    """Plain batch norm of inputs of any shape, as synchronized batch norm takes them."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class SyncedBatchNorm(BatchNorm):
    """Batch norm by the statistics of the batches of all processes, on any device and backend.

    :class:`torch.nn.SyncBatchNorm` is faster, but knows accelerators only. In eval mode and in one process it is plain.

    Shapes: ``(N, num_features, ...)`` to the same; every process may have another N.

    Source: Peng et al., MegDet, arXiv:1711.07240, section 3.3.
    """

    plain_in_eval: ClassVar[bool] = True
    process_group: Any = None  # of all processes, unless it came with another

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(N, num_features, ...)``.

        Raises:
            ValueError: If all processes together have but one value per channel.
        """
        if not self.training or num_processes(self.process_group) == 1:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [dim for dim in range(x.dim()) if dim != 1]
        per_channel = (1, -1, *(1 for _ in dims[1:]))
        own_count = x.new_tensor([x.numel() / x.shape[1]])
        sums: Tensor = _Sum.apply(torch.cat([x.sum(dims), own_count]), self.process_group)  # type: ignore[no-untyped-call]
        count = sums[-1].detach()
        if count < 2:
            raise ValueError(
                "expected more than 1 value per channel when training, of all processes together; got input of shape "
                f"{tuple(input.shape)} in this one; drop_last=True of the data loader leaves out a last batch of one"
            )
        mean = sums[:-1] / count
        centred = x - mean.view(per_channel)
        var = _Sum.apply(centred.square().sum(dims), self.process_group) / count  # type: ignore[no-untyped-call]
        self._move_statistics(mean.detach(), var.detach() * count / (count - 1))
        out = centred * (var + self.eps).rsqrt().view(per_channel)
        if self.weight is not None:
            out = out * self.weight.view(per_channel)
        if self.bias is not None:
            out = out + self.bias.view(per_channel)
        synchronized: Tensor = out.to(input.dtype)
        return synchronized

    @torch.no_grad()
    def _move_statistics(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.copy_(running.to(new.dtype).lerp(new, factor))  # as the net may be of half precision


class _Sum(torch.autograd.Function):
    """The sum of all processes' tensors. It is in the loss of each, so the gradient is the sum of all of theirs."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _add_up(own, group)

    @staticmethod
    def backward(ctx: Any, own: Tensor) -> tuple[Tensor, None]:
        return _add_up(own, ctx.group), None


def _add_up(own: Tensor, group: Any) -> Tensor:
    total = own.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm)
_SYNCHRONIZED = (nn.SyncBatchNorm, SyncedBatchNorm)
