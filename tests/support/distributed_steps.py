"""Training steps of tests/training/test_distributed.py, in two processes with half a batch each or in one."""

import warnings

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from resbackbone import ResNetV1d
from resbackbone.training import freeze, param_groups, sync_batch_norms
from resbackbone.training.sync_batch_norm import AllReduceBatchNorm

IMAGES = (4, 3, 64, 64)


def build(**options):
    """Build a small network of bottlenecks with random norms."""
    torch.manual_seed(1)
    net = ResNetV1d(26, base_channels=8, zero_init_residual=False, **options)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.uniform_(0.5, 1.5)
            norm.weight.data.uniform_(0.5, 1.5)
    return net.train()


def full_batch():
    return torch.randn(IMAGES, generator=torch.Generator().manual_seed(2))


def own_half(x):
    return x.chunk(distributed.get_world_size())[distributed.get_rank()]


def train(model, images, schedule=(None, None)):
    """Train one step per entry of ``schedule``, the stages to freeze before it; return parameters and buffers."""
    images = images.to(next(model.parameters()).dtype)
    optimizer = torch.optim.SGD(param_groups(model, 0.01, 0.8, 1e-3, with_frozen=True), momentum=0.9)
    for frozen_stages in schedule:
        if frozen_stages is not None:
            freeze(model, frozen_stages)
        sum(out.square().mean() for out in model(images)).backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        name.removeprefix("module."): (t.full_tensor() if isinstance(t, DTensor) else t).detach()
        for name, t in tensors.items()
    }


def wrap(net, wrapper):
    if wrapper == "DDP":
        return DistributedDataParallel(net)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for name in net.res_layers:
        fully_shard(getattr(net, name), mesh=mesh)
    return fully_shard(net, mesh=mesh)


# Default precision is double: in single precision one flipped ReLU can make two trainings diverge.
TRAININGS = {
    "norm_eval": {},
    "frozen": {"frozen_stages": 1},
    "unfrozen": {"frozen_stages": 2, "schedule": (None, 0, -1, 1)},
    "folded": {"fold_frozen_norms": True},
    "synchronized": {"norm_eval": False},
    "synchronized, frozen ones folded": {"norm_eval": False, "frozen_stages": 2, "fold_frozen_norms": True},
    "synchronized, one step in single precision": {"norm_eval": False, "schedule": (None,), "dtype": torch.float32},
    "synchronized, recomputing norms": {"norm_eval": False, "with_cp": "norms"},
    "synchronized, recomputing blocks": {"norm_eval": False, "with_cp": True},
}


def run_training(name, wrapper=None):
    """Run one of ``TRAININGS`` in one process on the full batch, or in several on parts of it."""
    options = dict(TRAININGS[name])
    schedule = options.pop("schedule", (None, None))
    dtype = options.pop("dtype", torch.float64)
    net, images = build(**options).to(dtype), full_batch()
    if wrapper is None:
        return train(net, images, schedule)
    if not options.get("norm_eval", True):
        sync_batch_norms(net)
    return train(wrap(net, wrapper), own_half(images), schedule)


def normalize(norm, xs):
    """Normalize a batch and run the backward pass; return output, gradients and statistics."""
    x = xs.clone().requires_grad_()
    out = norm(x)
    (out * torch.arange(out[0].numel()).reshape(out[0].shape).sin()).sum().backward()
    return [out.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def uneven_batches(sizes=(3, 1)):
    """Normalize batches of different sizes per process by synchronized batch norm."""
    parts = torch.randn(sum(sizes), 5, 4, 4, generator=torch.Generator().manual_seed(3)).split(sizes)
    if not distributed.is_initialized():
        return normalize(nn.BatchNorm2d(5, momentum=None), torch.cat(parts))
    norm = sync_batch_norms(nn.Sequential(nn.BatchNorm2d(5, momentum=None)))[0]
    assert type(norm) is AllReduceBatchNorm
    return normalize(norm, parts[distributed.get_rank()])


def half_precision():
    """Normalize half of a batch by a batch norm in half precision; return output and statistics."""
    images = own_half(torch.randn(4, 5, 4, 4, generator=torch.Generator().manual_seed(3)).bfloat16())
    norm = sync_batch_norms(nn.Sequential(nn.BatchNorm2d(5).bfloat16()))[0]
    return [norm(images).detach(), norm.running_mean, norm.running_var]


def one_value():
    """Return the error for a single value per channel over all processes."""
    norm = sync_batch_norms(nn.Sequential(nn.BatchNorm1d(5)))[0]
    try:
        norm(torch.ones(1 - distributed.get_rank(), 5))
    except ValueError as error:
        return str(error)


def own_group():
    """Normalize by a norm with a process group of this process only."""
    groups = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
    norm = nn.SyncBatchNorm(5, process_group=groups[distributed.get_rank()])
    images = torch.randn(4, 5, 4, 4, generator=torch.Generator().manual_seed(3))
    return sync_batch_norms(nn.Sequential(norm))(own_half(images)).detach()


def work(rank, world_size, folder):
    """Run all of the above in one of ``world_size`` processes, and save the results in ``folder``."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    results = {"uneven": uneven_batches(), "half": half_precision(), "one value": one_value(), "own group": own_group()}
    for wrapper in ("DDP", "FSDP2"):
        for name in TRAININGS:
            results[wrapper, name] = run_training(name, wrapper)
    torch.save(results, folder / f"{rank}.pth")
    distributed.destroy_process_group()
