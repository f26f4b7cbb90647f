"""The steps of tests/training/test_distributed.py: two processes with half a batch each, or one with the whole."""

import warnings

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from resbackbone import ResNetV1d
from resbackbone.training import freeze, param_groups, sync_batch_norms
from resbackbone.training.sync_batch_norm import SyncedBatchNorm

IMAGES = (4, 3, 64, 64)


def build(**options):
    """A small net of bottlenecks whose norms are lively."""
    torch.manual_seed(1)
    net = ResNetV1d(26, base_channels=8, zero_init_residual=False, **options)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.uniform_(0.5, 1.5)
            norm.weight.data.uniform_(0.5, 1.5)
    return net.train()


def whole_batch():
    return torch.randn(IMAGES, generator=torch.Generator().manual_seed(2))


def own_half(x):
    return x.chunk(distributed.get_world_size())[distributed.get_rank()]


def train(model, images, schedule=(None, None)):
    """Take a step for each entry of ``schedule``, the stages to freeze before it; return the parameters and buffers."""
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


def in_parallel(net, way):
    if way == "DDP":
        return DistributedDataParallel(net)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for name in net.res_layers:
        fully_shard(getattr(net, name), mesh=mesh)
    return fully_shard(net, mesh=mesh)


# In double precision where not said otherwise: in single precision one ReLU may flip, and two trainings part.
TRAININGS = {
    "norm_eval": {},
    "frozen": {"frozen_stages": 1},
    "let go": {"frozen_stages": 2, "schedule": (None, 0, -1, 1)},
    "folded": {"fold_frozen_norms": True},
    "synchronised": {"norm_eval": False},
    "synchronised, frozen ones folded": {"norm_eval": False, "frozen_stages": 2, "fold_frozen_norms": True},
    "synchronised, one step in single precision": {"norm_eval": False, "schedule": (None,), "dtype": torch.float32},
    "synchronised, recomputing norms": {"norm_eval": False, "with_cp": "norms"},
    "synchronised, recomputing blocks": {"norm_eval": False, "with_cp": True},
}


def run_training(name, way=None):
    """One of ``TRAININGS`` in one process on the whole batch, or in several on parts of it."""
    options = dict(TRAININGS[name])
    schedule = options.pop("schedule", (None, None))
    dtype = options.pop("dtype", torch.float64)
    net, images = build(**options).to(dtype), whole_batch()
    if way is None:
        return train(net, images, schedule)
    if not options.get("norm_eval", True):
        sync_batch_norms(net)
    return train(in_parallel(net, way), own_half(images), schedule)


def normalise(norm, xs):
    """Normalise a batch and go backward; return output, gradients and statistics."""
    x = xs.clone().requires_grad_()
    out = norm(x)
    (out * torch.arange(out[0].numel()).reshape(out[0].shape).sin()).sum().backward()
    return [out.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def uneven_batches(sizes=(3, 1)):
    """One normalisation of batches of different sizes, by the norm of several processes."""
    parts = torch.randn(sum(sizes), 5, 4, 4, generator=torch.Generator().manual_seed(3)).split(sizes)
    if not distributed.is_initialized():
        return normalise(nn.BatchNorm2d(5, momentum=None), torch.cat(parts))
    norm = sync_batch_norms(nn.Sequential(nn.BatchNorm2d(5, momentum=None)))[0]
    assert type(norm) is SyncedBatchNorm
    return normalise(norm, parts[distributed.get_rank()])


def half_precision():
    """A norm of half precision, of two of four images; output and statistics."""
    images = own_half(torch.randn(4, 5, 4, 4, generator=torch.Generator().manual_seed(3)).bfloat16())
    norm = sync_batch_norms(nn.Sequential(nn.BatchNorm2d(5).bfloat16()))[0]
    return [norm(images).detach(), norm.running_mean, norm.running_var]


def one_value():
    """What a norm says to a batch of one value per channel, which one of the processes has."""
    norm = sync_batch_norms(nn.Sequential(nn.BatchNorm1d(5)))[0]
    try:
        norm(torch.ones(1 - distributed.get_rank(), 5))
    except ValueError as error:
        return str(error)


def alone():
    """A norm that was made for a group of this process alone."""
    groups = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
    norm = nn.SyncBatchNorm(5, process_group=groups[distributed.get_rank()])
    images = torch.randn(4, 5, 4, 4, generator=torch.Generator().manual_seed(3))
    return sync_batch_norms(nn.Sequential(norm))(own_half(images)).detach()


def work(rank, world_size, folder):
    """Do everything in one of ``world_size`` processes, and leave the results in ``folder``."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    results = {"uneven": uneven_batches(), "half": half_precision(), "one value": one_value(), "alone": alone()}
    for way in ("DDP", "FSDP2"):
        for name in TRAININGS:
            results[way, name] = run_training(name, way)
    torch.save(results, folder / f"{rank}.pth")
    distributed.destroy_process_group()
