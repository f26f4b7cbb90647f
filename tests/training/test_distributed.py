"""Two processes, each with half of the batch, do what one does with all of it."""

import multiprocessing
import warnings

import pytest
import torch
from cases import CLASSES, make
from distributed_steps import TRAININGS, build, run_training, train, uneven_batches, work
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from resbackbone.training import freeze, param_groups, sync_batch_norms
from resbackbone.training.sync_batch_norm import BatchNorm, SyncedBatchNorm

QUICK = ("ResNet", "ResNetV2", "TridentResNet")  # one for each way in which stems and stages are frozen
every_class_in_time = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CLASSES]
)


@pytest.fixture
def own_log(monkeypatch, caplog):
    """What is logged, where no run of mmengine's has a log."""
    monkeypatch.setattr("resbackbone.utils.logs._run_logger", lambda: None)  # that of a run in another test
    caplog.set_level("INFO")
    return caplog


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The results of two processes."""
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
def of_one():
    """The results of one process, each computed once."""
    return {}


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_as_one_on_the_whole_batch(of_two, of_one, name, way):
    if name not in of_one:
        of_one[name] = run_training(name)
    start = {**dict(build().named_parameters()), **dict(build().named_buffers())}
    assert any(not torch.equal(tensor, start[key]) for key, tensor in of_one[name].items())
    for rank in of_two:
        assert rank[way, name].keys() == of_one[name].keys()
        for key, tensor in rank[way, name].items():
            tolerance = 1e-5 if tensor.dtype == torch.float32 else 1e-10
            torch.testing.assert_close(tensor, of_one[name][key], rtol=tolerance, atol=tolerance, msg=key)
    first, second = (rank[way, name] for rank in of_two)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_uneven_batches_are_normalised_as_one(of_two):
    expected = uneven_batches()
    for index in (0, 1):  # what is theirs alone: outputs and the gradients of inputs
        got = torch.cat([rank["uneven"][index] for rank in of_two])
        torch.testing.assert_close(got, expected[index], rtol=1e-5, atol=1e-5)
    for index in (2, 3):  # of which each has its part
        got = sum(rank["uneven"][index] for rank in of_two)
        torch.testing.assert_close(got, expected[index], rtol=1e-5, atol=1e-5)
    for rank in of_two:
        torch.testing.assert_close(rank["uneven"][4:], expected[4:], rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def group_of_one(tmp_path_factory):
    """A process group of this process alone, in which ``DistributedDataParallel`` complains as in any other."""
    store = distributed.FileStore(str(tmp_path_factory.mktemp("one") / "store"), 1)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@every_class_in_time
def test_no_parameter_is_unused_whatever_is_frozen(case):
    for frozen_stages in range(-1, 3 if case == "TridentResNet" else 4):  # of 4 nothing would be left to train
        net = make(case, frozen_stages=frozen_stages)
        train(DistributedDataParallel(net), torch.randn(2, 3, 64, 64))


@pytest.mark.usefixtures("group_of_one")
def test_an_unused_parameter_would_show():
    net = make("ResNet")
    net.unused = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration"):
        train(DistributedDataParallel(net), torch.randn(2, 3, 64, 64))


@pytest.mark.usefixtures("group_of_one")
@every_class_in_time
@pytest.mark.parametrize("out_indices", [(1,), ("stem", 0), ("stem",)], ids=str)
def test_w10_no_parameter_is_unused_whatever_the_outputs_are(case, out_indices):
    net = make(case, out_indices=out_indices)
    train(DistributedDataParallel(net), torch.randn(2, 3, 64, 64))
    net.freeze(-1)
    train(DistributedDataParallel(net), torch.randn(2, 3, 64, 64))


@pytest.mark.usefixtures("group_of_one")
def test_a_group_of_one_process_on_a_cpu_trains_what_says_sync_bn(images):
    net = build(norm_cfg={"type": "SyncBN"}, norm_eval=False)
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        net(images)
    sync_batch_norms(net)
    net(images)


def test_u8_one_process_has_plain_norms_and_one_line_says_what_was_changed(shake, images, own_log):
    net = shake(build(norm_cfg={"type": "SyncBN"}, norm_eval=False, frozen_stages=1))
    plain = build(norm_eval=False, frozen_stages=1)
    plain.load_state_dict(net.state_dict())
    layers, parameters = list(net.modules()), list(net.parameters())
    assert sync_batch_norms(plain) is plain
    assert own_log.messages == []  # nothing was changed
    assert sync_batch_norms(net) is net
    assert own_log.messages == ["in one process 31 synchronised batch norms are plain"]
    assert {type(norm) for norm in net.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)} == {BatchNorm}
    assert all(map(lambda old, new: old is new, layers, net.modules()))
    assert all(map(lambda old, new: old is new, parameters, net.parameters()))
    assert list(net.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(*outs) for outs in zip(net(images), plain(images), strict=True))
    assert torch.equal(net.layer4[1].bn3.running_var, plain.layer4[1].bn3.running_var)


def test_several_processes_synchronise_what_is_plain_and_nothing_else(monkeypatch, own_log):
    class WithReLU(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    net = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3), WithReLU(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3))
    monkeypatch.setattr("resbackbone.training.sync_batch_norm.num_processes", lambda: 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sync_batch_norms(net)
    assert [type(layer) for layer in net] == [
        SyncedBatchNorm,
        SyncedBatchNorm,
        WithReLU,
        nn.GroupNorm,
        nn.InstanceNorm2d,
    ]
    x = torch.randn(4, 3)
    assert torch.equal(net[0].eval()(x), nn.BatchNorm1d(3).eval()(x))  # nothing to exchange, as in a frozen stage
    assert own_log.messages == ["2 batch norms see the batches of 2 processes"]
    monkeypatch.setattr("resbackbone.training.sync_batch_norm.num_processes", lambda: 1)
    sync_batch_norms(net)
    assert [type(layer) for layer in list(net)[:2]] == [BatchNorm, BatchNorm]


def test_one_process_of_several_writes_the_line_about_batch_norms(monkeypatch, own_log):
    monkeypatch.setattr("resbackbone.training.sync_batch_norm.num_processes", lambda: 2)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        sync_batch_norms(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    assert own_log.messages == ["2 batch norms see the batches of 2 processes"]


def test_a_net_without_batch_norms_is_told_nothing():
    assert len(sync_batch_norms(nn.Sequential(nn.Conv2d(3, 3, 1)))) == 1


def test_several_processes_synchronise_half_precision_as_plain_norms_have_it(of_two):
    parts = torch.randn(4, 5, 4, 4, generator=torch.Generator().manual_seed(3)).bfloat16()
    plain = nn.BatchNorm2d(5).bfloat16()
    expected = [plain(parts), plain.running_mean, plain.running_var]
    for rank in of_two:
        assert {tensor.dtype for tensor in rank["half"]} == {torch.bfloat16}
    got = [torch.cat([rank["half"][0] for rank in of_two]), *of_two[0]["half"][1:]]
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def test_one_value_per_channel_is_refused_by_all_processes(of_two):
    for rank, shape in enumerate(("(1, 5)", "(0, 5)")):
        assert of_two[rank]["one value"] == (
            "expected more than 1 value per channel when training, of all processes together; "
            f"got input of shape {shape} in this one; drop_last=True of the data loader leaves out a last batch of one"
        )


def test_norms_stay_in_the_group_that_they_have(of_two):
    parts = torch.randn(4, 5, 4, 4, generator=torch.Generator().manual_seed(3)).chunk(2)
    for rank, part in zip(of_two, parts, strict=True):
        torch.testing.assert_close(rank["alone"], nn.BatchNorm2d(5)(part), rtol=1e-5, atol=1e-5)


def test_what_freezes_stays_where_it_is_with_gradients_and_momentum():
    net = build()
    optimizer = torch.optim.SGD(param_groups(net, 0.01, weight_decay=1e-3, with_frozen=True), momentum=0.9)
    for _ in range(2):
        net(torch.randn(2, 3, 64, 64))[-1].square().mean().backward()
        optimizer.step()
    freeze(net, 1)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    optimizer.step()  # of which the loop has not yet cleared the gradients
    moved = {name.split(".")[0] for name, parameter in net.named_parameters() if not parameter.equal(before[name])}
    assert moved == {"layer2", "layer3", "layer4"}


@pytest.mark.usefixtures("group_of_one")
def test_communication_hooks_outlive_freezing():
    seen = []

    def double(state, bucket):
        state.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer() * 2)
        return future

    images = torch.randn(2, 3, 64, 64)
    plain, hooked = build(frozen_stages=1), DistributedDataParallel(build(frozen_stages=2))
    hooked.register_comm_hook(seen, double)
    for _ in range(2):  # the second time, that of the first
        freeze(hooked, 1)
    for net in (plain, hooked):
        sum(out.square().mean() for out in net(images)).backward()
    assert sum(seen) == sum(parameter.numel() for parameter in plain.parameters() if parameter.requires_grad)
    torch.testing.assert_close(hooked.module.layer4[0].conv1.weight.grad, plain.layer4[0].conv1.weight.grad * 2)


def test_freezing_takes_every_backbone_of_a_model():
    model = nn.ModuleDict({"one": build(), "other": build(frozen_stages=2)})
    freeze(model, 1)
    assert [net.frozen_stages for net in model.values()] == [1, 1]
    assert model["one"].layer1[0].conv1.weight.requires_grad is False
    assert model["other"].layer2[0].conv1.weight.requires_grad is True
    with pytest.raises(ValueError, match="there is no backbone of resbackbone in this Conv2d to freeze"):
        freeze(nn.Conv2d(3, 3, 1), 1)
