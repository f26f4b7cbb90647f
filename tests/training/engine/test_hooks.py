"""Layer-wise learning rates, unfreezing schedules and synchronized batch norm in mmengine's runner."""

import warnings

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

from resbackbone import ResNet
from resbackbone.training import param_groups
from resbackbone.training.engine import EpochSampler, ResumableRunner, UnfreezeHook

OPTIMIZER = {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.05}
CONSTRUCTOR = {"constructor": "resbackbone.LayerDecayOptimWrapperConstructor", "optimizer": OPTIMIZER}


class Model(BaseModel):
    def __init__(self, **options):
        super().__init__()
        self.backbone = ResNet(18, base_channels=4, norm_eval=False, **options)
        self.head = nn.Linear(32, 2)

    def forward(self, inputs, mode="tensor"):
        return {"loss": self.head(self.backbone(inputs)[-1].mean((2, 3))).square().mean()}


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, draw):
        return {"inputs": torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(draw[0]))}


class RecordUpdates(Hook):
    """Records which layers each step changes."""

    def __init__(self):
        self.moved = []

    def before_train_iter(self, runner, **unused):
        self.before = {name: parameter.detach().clone() for name, parameter in runner.model.named_parameters()}

    def after_train_iter(self, runner, **unused):
        moved = [name for name, p in runner.model.named_parameters() if not torch.equal(p, self.before[name])]
        names = {name.removeprefix("backbone.").split(".")[0] for name in moved}
        self.moved.append({"stem" if name in ("conv1", "bn1") else name for name in names})


def train(folder, hooks, *, epochs=3, resume=False, model=None, optim_wrapper=CONSTRUCTOR, sampler=None):
    """Train epochs of two steps; return the runner."""
    torch.manual_seed(0)
    runner = ResumableRunner(
        model=Model(frozen_stages=2) if model is None else model,
        work_dir=str(folder),
        train_dataloader={
            "dataset": Images(),
            "batch_size": 2,
            "sampler": sampler or {"type": "resbackbone.EpochSampler"},
            "collate_fn": {"type": "default_collate"},
        },
        train_cfg={"type": "resbackbone.ResumableTrainLoop", "max_epochs": epochs},
        optim_wrapper=optim_wrapper,
        default_hooks={"checkpoint": {"type": "resbackbone.ResumableCheckpointHook", "interval": 1}},
        custom_hooks=hooks,
        randomness={"seed": 0},
        resume=resume,
        experiment_name=f"{folder.parent.name}_{folder.name}_{epochs}_{resume}",  # mmengine has one logger per name
        log_level="ERROR",
    )
    runner.train()
    return runner


@pytest.fixture(autouse=True)
def _no_scope():
    """Remove the default scope that a runner leaves."""
    yield
    DefaultScope._instance_dict.clear()


# Layer-wise learning rate decay


@pytest.mark.parametrize("paramwise_cfg", [None, {"layer_decay": 0.5}, {"layer_decay": 0.5, "no_decay": ("head",)}])
def test_constructor_uses_param_groups(paramwise_cfg):
    model = Model(frozen_stages=1)
    cfg = Config({"optim_wrapper": {**CONSTRUCTOR, "paramwise_cfg": paramwise_cfg}}).optim_wrapper
    optimizer = build_optim_wrapper(model, cfg).optimizer
    assert type(optimizer) is torch.optim.AdamW
    expected = param_groups(model, 1e-3, weight_decay=0.05, with_frozen=True, **(paramwise_cfg or {}))
    for group, (name, params, lr, weight_decay) in zip(optimizer.param_groups, map(dict.values, expected), strict=True):
        assert (group["name"], group["lr"], group["weight_decay"]) == (name, lr, weight_decay)
        assert list(map(id, group["params"])) == list(map(id, params))


def test_constructor_without_scope_prefix():
    with DefaultScope.overwrite_default_scope("resbackbone"):
        optim_wrapper = build_optim_wrapper(
            Model(), {**CONSTRUCTOR, "constructor": "LayerDecayOptimWrapperConstructor"}
        )
    assert {group["name"] for group in optim_wrapper.optimizer.param_groups} == {"decay", "no decay"}


@pytest.mark.parametrize(
    ("cfg", "error", "words"),
    [
        ({"paramwise_cfg": {"layerdecay": 0.5}}, KeyError, "no 'layerdecay'; did you mean 'layer_decay'"),
        ({"paramwise_cfg": 0.5}, TypeError, "`paramwise_cfg` must be a dict or None, got 0.5"),
        ({"paramwise_cfg": {"layer_decay": 2}}, ValueError, "`layer_decay` must be above 0 and at most 1, got 2"),
        ({"optimizer": {"type": "AdamW", "lr": 1e-3}}, KeyError, "needs `weight_decay` in `optimizer`"),
    ],
)
def test_invalid_constructor_config(cfg, error, words):
    with pytest.raises(error, match=words):
        build_optim_wrapper(Model(), {**CONSTRUCTOR, **cfg})


# Sampler


def test_sampler_seed(tmp_path):
    samplers = {
        "config": {"type": "resbackbone.EpochSampler", "seed": 7},
        "object": EpochSampler(Images(), seed=7),
        "seed of the run": EpochSampler(Images()),
        "default": None,
    }
    weights = {
        name: train(tmp_path / name, [], epochs=1, sampler=sampler).model.head.weight
        for name, sampler in samplers.items()
    }
    assert torch.equal(weights["config"], weights["object"])
    assert torch.equal(weights["seed of the run"], weights["default"])
    assert not torch.equal(weights["config"], weights["default"])


# Unfreezing


@pytest.mark.parametrize(
    ("schedule", "by_epoch", "frozen"),
    [([(1, 1), (2, -1)], True, [2, 2, 1, 1, -1, -1]), ([(0, 3), (3, 0), (4, 2)], False, [3, 3, 3, 0, 2, 2])],
)
def test_unfreeze_schedule_and_resuming(tmp_path, schedule, by_epoch, frozen):
    hook = {"type": "resbackbone.UnfreezeHook", "schedule": schedule, "by_epoch": by_epoch}
    records = RecordUpdates()
    uninterrupted = train(tmp_path / "uninterrupted", [hook, records])
    stages = ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert records.moved == [{"head", *stages[frozen_stages + 1 :]} for frozen_stages in frozen]

    train(tmp_path / "interrupted", [hook], epochs=1)
    resumed = train(tmp_path / "interrupted", [hook], resume=True)
    assert resumed.model.backbone.frozen_stages == frozen[-1]
    for (name, tensor), other in zip(
        uninterrupted.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name
    states = [runner.optim_wrapper.optimizer.state_dict() for runner in (uninterrupted, resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for index, state in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][index][key]) for key, value in state.items())


@pytest.mark.parametrize(
    "schedule",
    [[], [(2, 1), (1, 0)], [(1, 1), (1, 0)], [(-1, 1)]],
    ids=["empty", "decreasing", "duplicate", "negative"],
)
def test_invalid_schedule(schedule):
    with pytest.raises(ValueError, match="`schedule` must be pairs of a start and `frozen_stages`"):
        UnfreezeHook(schedule)
    with pytest.raises(ValueError, match=r"`schedule\[0\]` must have 2 entries"):
        UnfreezeHook([(1,)])


def test_schedule_that_does_not_fit_the_model(tmp_path):
    with pytest.raises(ValueError, match="`frozen_stages` must be from -1 to 4, got 5"):
        train(tmp_path / "stages", [UnfreezeHook([(1, 5)])])
    headless = Model()
    headless.backbone = nn.Conv2d(3, 32, 1)
    with pytest.raises(ValueError, match="there is no backbone of resbackbone in this Model to freeze"):
        train(tmp_path / "backbone", [UnfreezeHook([(1, 0)])], model=headless)
    model = Model(frozen_stages=2)
    optim_wrapper = OptimWrapper(torch.optim.AdamW(param_groups(model, 1e-3)))
    with pytest.raises(ValueError, match=r"trains 'layer2\.0\.conv1\.weight', which is not in the optimizer"):
        train(tmp_path / "optimizer", [UnfreezeHook([(1, 1)])], model=model, optim_wrapper=optim_wrapper)


# Several optimizers


class TwoOptimizers(Model):
    def train_step(self, data, optim_wrapper):
        loss = self(**self.data_preprocessor(data, True))["loss"]
        for wrapper in optim_wrapper.values():
            wrapper.zero_grad()
        loss.backward()
        for wrapper in optim_wrapper.values():
            wrapper.step()
        return {"loss": loss.detach()}


def two_optimizers(model):
    wrappers = {
        name: OptimWrapper(torch.optim.AdamW(getattr(model, name).parameters(), lr=1e-3))
        for name in ("backbone", "head")
    }
    return OptimWrapperDict(**wrappers)


def test_resume_several_optimizers(tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        model = TwoOptimizers()
        return train(folder, [], model=model, optim_wrapper=two_optimizers(model), **options)

    uninterrupted = run(tmp_path / "uninterrupted")
    run(tmp_path / "interrupted", epochs=1)
    resumed = run(tmp_path / "interrupted", resume=True)
    for (name, tensor), other in zip(
        uninterrupted.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name


# Synchronized batch norm


def test_sync_batch_norm_hook_in_one_process(tmp_path, caplog):
    # mmengine's runner itself replaces SyncBN by plain batch norm, and logs it.
    caplog.set_level("INFO", "resbackbone")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path, [{"type": "resbackbone.SyncBatchNormHook"}], epochs=1)
    assert caplog.messages == []
