"""Training configs, and the commands `resbackbone train` and `resbackbone test`."""

import random
import shutil

import pytest
import torch
from digits_folder import write_digits
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from PIL import Image
from training_runs import CONFIG, CONFIGS, curves, last_checkpoint, prepare, run, train

from resbackbone import MODELS, build_backbone
from resbackbone.training.classification.transforms import build_transforms
from resbackbone.training.engine import load_training_config

TRAINING_CONFIGS = sorted(path.name for path in CONFIGS.glob("[!_]*.py"))

NUM_CLASSES = {
    "digits_finetune_all.py": 5,
    "digits_finetune_head.py": 5,
    "digits_resnet18.py": 10,
    "imagenet_resnet50_a2.py": 1000,
    "imagenet_resnet50_a3.py": 1000,
}


@pytest.mark.parametrize("name", TRAINING_CONFIGS)
def test_every_config_builds(name):
    config = load_training_config(CONFIGS / name)
    model = MODELS.build(config.model)
    transforms = {
        key: build_transforms(config[key].dataset.transforms) for key in ("train_dataloader", "val_dataloader")
    }
    channels = config.train_dataloader.dataset.get("channels", 3)
    picture = Image.new("RGB" if channels == 3 else "L", (300, 200))
    for changes in transforms.values():
        sizes = set()
        for seed in range(3):
            changed = picture
            for change in changes:
                changed = change(changed, random.Random(seed))
            sizes.add(changed.size)
        assert len(sizes) == 1
    assert model.backbone.in_channels == channels
    assert model.num_classes == NUM_CLASSES[name]
    for key in transforms:
        assert len(config[key].dataset.get("classes", range(NUM_CLASSES[name]))) == NUM_CLASSES[name]
    optim_wrapper = {**config.optim_wrapper, "type": "OptimWrapper"}  # AmpOptimWrapper needs a GPU
    with DefaultScope.overwrite_default_scope("resbackbone"):
        optimizer = build_optim_wrapper(model, optim_wrapper).optimizer
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert config.param_scheduler[-1].end == config.train_cfg.max_epochs


def test_overrides():
    path = CONFIGS / "digits_resnet18.py"
    config = load_training_config(
        path, ["train_cfg.max_epochs=3", "train_dataloader.dataset.classes=[0,1]", "load_from=a.pth"]
    )
    assert config.train_cfg.max_epochs == 3
    assert config.train_dataloader.dataset.classes == [0, 1]
    assert config.load_from == "a.pth"
    for override in (
        "compile=True",
        "experiment_name=a",
        "activation_checkpointing=fc",
        "efficient_conv_bn_eval=backbone",
    ):
        assert override.partition("=")[0] in load_training_config(path, [override])
    with pytest.raises(KeyError, match=r"the config has no 'modle'; did you mean 'model'\?"):
        load_training_config(path, ["modle.num_classes=3"])
    with pytest.raises(ValueError, match=r"an override must be KEY=VALUE, such as train_cfg.max_epochs=5; got '3'"):
        load_training_config(path, ["3"])


def test_build_backbone_reads_training_configs():
    assert build_backbone(CONFIGS / "digits_resnet18.py").in_channels == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished training in ``run``, and the command's output."""
    folder = tmp_path_factory.mktemp("trained")
    prepare(folder)
    return folder, train(folder, "run")


def test_train_output(trained):
    folder, output = trained
    assert "Epoch(train) [1][1/6]" in output
    assert "eta: " in output
    lines = output.splitlines()
    assert lines[-3:] == [
        f"trained: {folder / 'run' / 'iter_18.pth'}",
        f"best: {max(record['accuracy/top1'] for record in curves(folder / 'run') if record['mode'] == 'val'):.2f} of "
        f"{last_checkpoint(folder / 'run')['message_hub']['runtime_info']['best_ckpt']}",
        f"curves: {folder / 'run' / 'curves.png'}",
    ]
    with Image.open(folder / "run" / "curves.png") as picture:
        assert picture.size == (1200, 480)
    modes = [(record["mode"], record["step"], record["epoch"]) for record in curves(folder / "run")]
    assert modes == [("train", step, step / 6) for step in range(1, 19)] + [("val", step, step) for step in (1, 2, 3)]


def test_tensorboard_curves(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    backends = '[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]'
    prepare(tmp_path, f"{CONFIG}visualizer = dict(vis_backends={backends})\n")
    train(tmp_path, "run", "train_cfg.max_epochs=1")
    (events,) = (tmp_path / "run").glob("*/vis_data/events.*")
    found = accumulator.EventAccumulator(str(events)).Reload()
    losses = [(record["step"], record["loss"]) for record in curves(tmp_path / "run") if record["mode"] == "train"]
    assert [(event.step, pytest.approx(event.value)) for event in found.Scalars("loss")] == losses


def test_test_reproduces_validation_accuracy(trained):
    folder, _ = trained
    best = last_checkpoint(folder / "run")["message_hub"]["runtime_info"]
    output = run(folder, "test", "config.py", best["best_ckpt"])
    assert output.splitlines()[-1].startswith(
        f"accuracy/top1 {best['best_score']:.2f}, accuracy/top5 100.00, accuracy/cross_entropy "
    )


@pytest.fixture(scope="module")
def tested(trained):
    """Run `resbackbone test` on that training, with other pictures and options."""
    folder, _ = trained
    for name, links in {
        "others": {"fish": "dark", "bird": "bright"},
        "subset": {"dark": "dark"},
        "more": {"dark": "dark", "bright": "bright", "bird": "bright"},
    }.items():
        (folder / name).mkdir()
        for link, target in links.items():
            (folder / name / link).symlink_to(folder / "pictures" / target)
    checkpoint = folder / "run" / "iter_18.pth"
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save({key: weights[key] for key in weights if key.startswith(("backbone", "fc"))}, folder / "weights.pth")

    def test(root, *options, weights=checkpoint, status=0):
        options = (f"test_dataloader.dataset.root={root}", *options)
        return run(folder, "test", "config.py", weights, *options, status=status).splitlines()[-1]

    return test


NO_HOOK = "custom_hooks=None"


@pytest.mark.parametrize("options", [(), (NO_HOOK,)], ids=["hook", "no hook"])
@pytest.mark.parametrize("root", ["others", "more"])
def test_unknown_classes_are_an_error(tested, root, options):
    output = tested(root, *options, status=2)
    unknown = "2 of the 2 classes" if root == "others" else "1 of the 3 classes"
    assert output.startswith(f"error: {unknown} of test_dataloader are unknown to the weights: ")
    assert f": {'bird, fish' if root == 'others' else 'bird'}; " in output
    assert "the weights were trained on bright, dark; rename the folders to match" in output


@pytest.mark.parametrize("options", [(), (NO_HOOK,)], ids=["hook", "no hook"])
def test_labels_follow_class_names(tested, options):
    expected = tested("pictures", *options)
    assert tested("pictures", "test_dataloader.dataset.classes=[dark,bright]", *options) == expected


def test_subset_of_classes(tested):
    both, dark = (float(tested(root).split()[1].rstrip(",")) for root in ("pictures", "subset"))
    bright = float(tested("pictures", "test_dataloader.dataset.classes=[bright]").split()[1].rstrip(","))
    assert both == pytest.approx((dark + bright) / 2, abs=0.02)
    empty = "test_dataloader.dataset.allow_empty=True", "test_dataloader.dataset.classes=[bright,dark,none]"
    assert "are unknown to the weights: none;" in tested("subset", *empty, status=2)
    empty = empty[0], "test_dataloader.dataset.classes=[bright,dark]"
    assert float(tested("subset", *empty).split()[1].rstrip(",")) == dark


def test_weights_without_class_names(tested):
    expected = tested("pictures")
    assert tested("pictures", weights="weights.pth") == expected
    assert "accuracy/top1" in tested("others", weights="weights.pth")
    for root, count in (("subset", 1), ("more", 3)):
        output = tested(root, weights="weights.pth", status=2)
        assert f"test_dataloader has {count} classes" in output
        assert "`model.num_classes` is 2" in output


def test_resuming_with_other_classes_is_an_error(trained, tested, tmp_path):
    folder, _ = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    other = [f"{part}_dataloader.dataset.classes=[dark,bright]" for part in ("train", "val")]
    output = train(folder, tmp_path / "run", "--resume", "train_cfg.max_epochs=4", *other, status=2).splitlines()[-1]
    assert "error: the run started with the classes bright, dark, but train_dataloader now has dark, bright" in output


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_data_loader_without_batches_is_an_error(trained, tmp_path, part):
    folder, _ = trained
    options = f"{part}_dataloader.batch_size=64", f"{part}_dataloader.drop_last=True", "--work-dir", tmp_path
    command = ("test", "config.py", folder / "run" / "iter_18.pth") if part == "test" else ("train", "config.py")
    output = run(folder, *command, *options, status=2).splitlines()[-1]
    assert output.startswith(
        "error: the data loader of 'pictures' has 22 pictures and no batch: batch_size is 64, and "
    )
    assert "lower batch_size to at most 22, or set drop_last=False" in output
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(("batch_size", "batch"), [(3, "8 of 8"), (1, "1 of 22")])
def test_batch_too_small_error_is_one_line(trained, tmp_path, batch_size, batch):
    folder, _ = trained
    options = (f"train_dataloader.batch_size={batch_size}", "train_dataloader.dataset.transforms.0.size=2")
    options += ("train_cfg.max_epochs=1",)
    output = train(folder, tmp_path / "run", *options, status=2)
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith(f"error: batch {batch} in epoch 1 has one picture (batch_size is {batch_size}, of 22)")
    assert ("train_dataloader.drop_last=True drops such a last batch" in last) == (batch_size > 1)
    if batch_size > 1:
        train(folder, tmp_path / "run", *options, "train_dataloader.drop_last=True")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing.py",), "no config file at 'nothing.py'"),
        (("config.py", "train_dataloader.dataset.root=nowhere"), "no folder 'nowhere'; it must have one subfolder"),
        (
            ("config.py", "train_dataloader.sampler.type=DefaultSampler"),
            "ResumableTrainLoop needs train_dataloader=dict(",
        ),
        (
            ("config.py", "model.num_classes=3"),
            "train_dataloader has 2 classes (bright, dark), but `model.num_classes` is 3",
        ),
        (
            ("config.py", "val_dataloader.dataset.classes=[dark,bright]"),
            "training and validation classes differ: label 0 is 'bright' in training and 'dark' in validation;",
        ),
        (
            ("config.py", "model.num_class=3"),
            "ImageClassifier.__init__() got an unexpected keyword argument 'num_class'",
        ),
        (("config.py", "model.backbone.depth=19"), "19"),
        (("config.py", "load_from=nowhere.pth"), "nowhere.pth"),
    ],
)
def test_user_errors_are_one_line(trained, tmp_path, arguments, words):
    folder, _ = trained
    output = run(folder, "train", *arguments, "--work-dir", tmp_path, status=2)
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("error: ")
    assert words in output.splitlines()[-1]


def accuracy(work_dir):
    """Return the final accuracy of a run."""
    return [record["accuracy/top1"] for record in curves(work_dir) if record["mode"] == "val"][-1]


@pytest.mark.slow
def test_digits_and_fine_tuning(tmp_path):
    write_digits(tmp_path / "data" / "digits")
    output = run(tmp_path, "train", CONFIGS / "digits_resnet18.py")
    assert accuracy(tmp_path / "work_dirs/digits_resnet18") >= 98, output

    few = [f"{part}_dataloader.dataset.classes=[0,1,2,3,4]" for part in ("train", "val")]
    run(
        tmp_path,
        "train",
        CONFIGS / "digits_resnet18.py",
        "--work-dir",
        "work_dirs/digits_0to4",
        "model.num_classes=5",
        *few,
    )
    run(tmp_path, "train", CONFIGS / "digits_finetune_head.py")
    before = last_checkpoint(tmp_path / "work_dirs/digits_0to4")["state_dict"]
    after = last_checkpoint(tmp_path / "work_dirs/digits_finetune_head")["state_dict"]
    for key in before:
        if key.startswith(("backbone", "data_preprocessor")):
            assert torch.equal(after[key], before[key]), key
    assert accuracy(tmp_path / "work_dirs/digits_finetune_head") >= 80  # on features of other classes

    run(tmp_path, "train", CONFIGS / "digits_finetune_all.py", "--resume")  # starts from the weights of the first step
    tuned = last_checkpoint(tmp_path / "work_dirs/digits_finetune_all")
    assert tuned["meta"]["epoch"] == 10
    for key in ("backbone.conv1.weight", "backbone.layer4.1.conv2.weight", "fc.weight"):
        assert not torch.equal(tuned["state_dict"][key], after[key]), key
    assert accuracy(tmp_path / "work_dirs/digits_finetune_all") >= 95
