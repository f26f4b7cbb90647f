"""Data-parallel training: two processes with half of a batch each, under DDP and FSDP2, equal one process."""

import multiprocessing

import pytest
import torch
from cases import CLASSES, make
from distributed_steps import TRAININGS, build, run_training, train, uneven_batches, work
from torch import nn
from torch.nn.parallel import DistributedDataParallel

QUICK = ("ResNet", "ResNetV2", "TridentResNet")  # one per implementation of freezing

every_class = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CLASSES]
)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Results of two processes."""
    folder = tmp_path_factory.mktemp("two")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, 2, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


@pytest.fixture(scope="module")
def one_process():
    """Cached results of one process."""
    return {}


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_like_one_on_the_full_batch(two_processes, one_process, name, wrapper):
    if name not in one_process:
        one_process[name] = run_training(name)
    start = {**dict(build().named_parameters()), **dict(build().named_buffers())}
    assert any(not torch.equal(tensor, start[key]) for key, tensor in one_process[name].items())
    for rank in two_processes:
        assert rank[wrapper, name].keys() == one_process[name].keys()
        for key, tensor in rank[wrapper, name].items():
            tolerance = 1e-5 if tensor.dtype == torch.float32 else 1e-10
            torch.testing.assert_close(tensor, one_process[name][key], rtol=tolerance, atol=tolerance, msg=key)
    first, second = (rank[wrapper, name] for rank in two_processes)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_synchronized_norms_of_uneven_batches(two_processes):
    expected = uneven_batches()
    for index in (0, 1):  # per process: outputs and gradients of inputs
        got = torch.cat([rank["uneven"][index] for rank in two_processes])
        torch.testing.assert_close(got, expected[index], rtol=1e-5, atol=1e-5)
    for index in (2, 3):  # summed over processes: gradients of parameters
        got = sum(rank["uneven"][index] for rank in two_processes)
        torch.testing.assert_close(got, expected[index], rtol=1e-5, atol=1e-5)
    for rank in two_processes:
        torch.testing.assert_close(rank["uneven"][4:], expected[4:], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("group_of_one")
@every_class
def test_no_unused_parameters_with_frozen_stages(case):
    for frozen_stages in range(-1, 3 if case == "TridentResNet" else 4):  # with 4 nothing is left to train
        net = make(case, frozen_stages=frozen_stages)
        train(DistributedDataParallel(net), torch.randn(2, 3, 64, 64))


@pytest.mark.usefixtures("group_of_one")
def test_ddp_reports_unused_parameters():
    net = make("ResNet")
    net.unused = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration"):
        train(DistributedDataParallel(net), torch.randn(2, 3, 64, 64))


@pytest.mark.usefixtures("group_of_one")
@every_class
@pytest.mark.parametrize("out_indices", [(1,), ("stem", 0), ("stem",)], ids=str)
def test_no_unused_parameters_with_few_outputs(case, out_indices):
    net = make(case, out_indices=out_indices)
    train(DistributedDataParallel(net), torch.randn(2, 3, 64, 64))
    net.freeze(-1)
    train(DistributedDataParallel(net), torch.randn(2, 3, 64, 64))


def test_synchronized_norms_in_half_precision(two_processes):
    parts = torch.randn(4, 5, 4, 4, generator=torch.Generator().manual_seed(3)).bfloat16()
    plain = nn.BatchNorm2d(5).bfloat16()
    expected = [plain(parts), plain.running_mean, plain.running_var]
    for rank in two_processes:
        assert {tensor.dtype for tensor in rank["half"]} == {torch.bfloat16}
    got = [torch.cat([rank["half"][0] for rank in two_processes]), *two_processes[0]["half"][1:]]
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def test_one_value_per_channel_is_an_error_in_all_processes(two_processes):
    for rank, shape in enumerate(("(1, 5)", "(0, 5)")):
        assert two_processes[rank]["one value"] == (
            "expected more than 1 value per channel when training, over all processes; "
            f"got input of shape {shape} in this process; drop_last=True of the data loader drops a last batch of one"
        )


def test_norms_keep_their_process_group(two_processes):
    parts = torch.randn(4, 5, 4, 4, generator=torch.Generator().manual_seed(3)).chunk(2)
    for rank, part in zip(two_processes, parts, strict=True):
        torch.testing.assert_close(rank["own group"], nn.BatchNorm2d(5)(part), rtol=1e-5, atol=1e-5)
