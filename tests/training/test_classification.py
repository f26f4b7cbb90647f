"""The classification task: classifier, pictures and their changes, losses, accuracy, recipes, and the two commands."""

import math
import random
import shutil
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from digits_folder import write_digits
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from PIL import Image
from torch import nn
from training_runs import CONFIG, CONFIGS, curves, last_checkpoint, prepare, run, train

from resbackbone import MODELS, build_backbone
from resbackbone.checkpoints import convert_state_dict, load_checkpoint
from resbackbone.data.preprocessing import CAFFE, TORCHVISION, Preprocessing
from resbackbone.training.classification import (
    Accuracy,
    BinaryCrossEntropy,
    CenterCrop,
    CrossEntropy,
    ImageClassifier,
    ImageFolder,
    Mixing,
    RandAugment,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    UnreadablePicture,
)
from resbackbone.training.classification.metrics import places
from resbackbone.training.classification.rand_augment import OPERATIONS
from resbackbone.training.classification.transforms import build_transforms
from resbackbone.training.engine import LAMB, BatchTooSmall, Draw, EpochSampler, load_recipe

SMALL = {"type": "ResNet", "depth": 18, "base_channels": 8, "stem_channels": 8}


@pytest.fixture
def photograph():
    """A picture in which no two places look alike."""
    y, x = np.mgrid[:60, :80]
    return Image.fromarray(np.stack([x * 3, y * 4, (x * y) % 256], 2).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Three pictures each of two classes, one of them a folder deeper."""
    for name in ("cat/0.png", "cat/1.png", "cat/more/2.png", "dog/0.png", "dog/1.png", "dog/2.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (200, int(path.stem) * 10, 0)).save(path)
    return tmp_path / "pictures"


# --- the classifier ---------------------------------------------------------------------------------------------------


def test_it_is_torchvisions_resnet(torchvision, images):
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    ours = ImageClassifier("resnet18", num_classes=7).eval()
    converted = convert_state_dict(ours.state_dict(), target="torchvision")
    theirs.load_state_dict(converted)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_the_last_output_is_pooled(images):
    model = ImageClassifier({**SMALL, "out_indices": (0, 2)}, num_classes=3).eval()
    features = model.backbone(images)[-1]
    assert features.shape[1] == model.fc.in_features == 32
    torch.testing.assert_close(model(images), features.mean((2, 3)) @ model.fc.weight.T + model.fc.bias)


def test_what_the_modes_return(images):
    model = ImageClassifier(SMALL, num_classes=3).eval()
    labels = torch.tensor([2, 0])
    logits = model(images)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(model(images, labels, mode="loss"), {"loss": F.cross_entropy(logits, labels)})
    predicted = model(images, labels, mode="predict")
    torch.testing.assert_close(torch.stack([sample["scores"] for sample in predicted]), logits)
    with pytest.raises(TypeError, match="a loss needs `labels`, got None"):
        model(images, mode="loss")
    with pytest.raises(ValueError, match=r"`mode` must be one of 'tensor', 'loss', 'predict'; got 'train'"):
        model(images, mode="train")


def test_u4_a_batch_of_one_at_maps_of_one_pixel_names_drop_last():
    model = ImageClassifier(SMALL, num_classes=3).train()
    words = r"images \(1, 3, 32, 32\) come to maps of one pixel, .* drop_last=True of the data loader leaves out a last"
    with pytest.raises(BatchTooSmall, match=words):
        model(torch.randn(1, 3, 32, 32), torch.tensor([0]), mode="loss")
    model(torch.randn(1, 3, 64, 64), torch.tensor([0]), mode="loss")
    model.eval()(torch.randn(1, 3, 32, 32))


def test_batch_norms_learn_unless_they_are_told_not_to():
    assert not ImageClassifier("resnet18", num_classes=2).backbone.norm_eval
    assert ImageClassifier({**SMALL, "norm_eval": True}, num_classes=2).backbone.norm_eval


@pytest.mark.parametrize(
    ("backbone", "options", "expected"),
    [
        (SMALL, {}, TORCHVISION),
        ({**SMALL, "depth": 50, "style": "caffe"}, {}, CAFFE),
        ({**SMALL, "in_channels": 1}, {}, TORCHVISION.gray()),
        (SMALL, {"preprocessing": {"mean": (1.0, 2.0, 3.0), "std": (4.0, 5.0, 6.0), "order": "BGR"}}, None),
    ],
)
def test_pictures_are_normalized_as_the_weights_expect(backbone, options, expected, photograph):
    expected = expected or Preprocessing(**options["preprocessing"])
    model = ImageClassifier(backbone, num_classes=2, **options)
    picture = photograph if len(expected.mean) == 3 else photograph.convert("L")
    pixels = torch.from_numpy(np.array(picture)).reshape(60, 80, -1).permute(2, 0, 1)[None]
    batch = model.data_preprocessor({"inputs": pixels, "labels": torch.tensor([1])})
    torch.testing.assert_close(batch["inputs"], expected(picture))
    assert batch["labels"].tolist() == [1]


def test_pretrained_weights_bring_their_preprocessing(tmp_path):
    torch.save(convert_state_dict(build_backbone("resnet50").state_dict(), target="detectron2"), tmp_path / "net.pth")
    backbone = {"type": "ResNet", "depth": 50, "init_cfg": {"type": "Pretrained", "checkpoint": tmp_path / "net.pth"}}
    model = ImageClassifier(backbone, num_classes=2)
    model.init_weights()
    assert model.data_preprocessor.mean.flatten().tolist() == pytest.approx(CAFFE.mean)
    assert model.data_preprocessor.channels.tolist() == [2, 1, 0]
    fixed = ImageClassifier(backbone, num_classes=2, preprocessing={"order": "RGB"})
    fixed.init_weights()
    assert fixed.data_preprocessor.channels.tolist() == [0, 1, 2]


def test_weights_of_a_run_come_back_with_all_that_belongs_to_them(tmp_path, images, shake):
    odd = {"mean": (1.0, 2.0, 3.0), "std": (4.0, 5.0, 6.0), "order": "BGR"}
    trained = shake(ImageClassifier(SMALL, num_classes=3, preprocessing=odd)).eval()
    other = {f"module.{key}": value + 1 for key, value in trained.state_dict().items()}
    torch.save({"meta": {}, "state_dict": trained.state_dict(), "ema_state_dict": other}, tmp_path / "run.pth")

    model = ImageClassifier(SMALL, num_classes=3).eval()
    model.load_weights(tmp_path / "run.pth")
    torch.testing.assert_close(dict(model.state_dict()), dict(trained.state_dict()), rtol=0, atol=0)

    net = build_backbone(SMALL)
    load_checkpoint(net, tmp_path / "run.pth")
    assert net.preprocessing == Preprocessing(**odd)

    command_line.run("convert", tmp_path / "run.pth", tmp_path / "their.pth", "--to", "torchvision")
    converted = torch.load(tmp_path / "their.pth")
    torch.testing.assert_close(converted["fc.weight"], trained.fc.weight.detach(), rtol=0, atol=0)
    assert not [key for key in converted if "." not in key or key.startswith(("backbone", "data"))]


def test_anybodys_classifier_is_loaded(torchvision, tmp_path, images):
    theirs = torchvision.models.resnet18(num_classes=4).eval()
    torch.save(theirs.state_dict(), tmp_path / "their.pth")
    model = ImageClassifier("resnet18", num_classes=4).eval()
    model.load_weights(tmp_path / "their.pth")
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)
    model = ImageClassifier("resnet18", num_classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"nothing was changed: fc.weight is \(4, 512\) for \(5, 512\), 1 more"):
        model.load_weights(tmp_path / "their.pth")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_folders_are_classes(folder):
    data = ImageFolder(folder)
    assert data.metainfo == {"classes": ("cat", "dog")}
    assert [label for _, label in data.items] == [0, 0, 0, 1, 1, 1]
    sample = data[2]
    assert sample["labels"] == 0
    assert sample["inputs"].shape == (3, 10, 12)
    assert sample["inputs"].dtype is torch.uint8
    assert sample["inputs"][:, 0, 0].tolist() == [200, 20, 0]
    assert ImageFolder(folder, channels=1)[0]["inputs"].shape == (1, 10, 12)


def test_classes_can_be_chosen(folder):
    data = ImageFolder(folder, classes=["dog"])
    assert len(data) == 3
    assert {label for _, label in data.items} == {0}
    with pytest.raises(KeyError, match=r"has no class 'dgo'; did you mean 'dog'\? Known: cat, dog"):
        ImageFolder(folder, classes=["dgo"])


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*one subfolder of pictures for each class"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no subfolders"):
        ImageFolder(folder / "dog")
    (folder / "mouse").mkdir()
    with pytest.raises(ValueError, match=r"no pictures in .*mouse"):
        ImageFolder(folder)


@pytest.fixture
def logged(monkeypatch):
    """What a data set logs."""
    lines = []
    monkeypatch.setattr(
        "resbackbone.training.classification.datasets.print_log", lambda text, **options: lines.append(text)
    )
    return lines


def test_w5_links_are_followed_and_loops_end(folder, tmp_path, logged):
    far = tmp_path / "far"
    (folder / "dog").rename(far)
    (folder / "dog").symlink_to(far)  # a class
    (folder / "cat/more").rename(tmp_path / "more")
    (folder / "cat/more").symlink_to(tmp_path / "more")  # a folder within one
    (folder / "cat/up").symlink_to(folder)
    (folder / "all").symlink_to(folder)
    (far / "again").symlink_to(far)
    data = ImageFolder(folder)
    assert data.metainfo == {"classes": ("cat", "dog")}
    assert [label for _, label in data.items] == [0, 0, 0, 1, 1, 1]
    assert logged == []


def test_w5_w9_what_is_left_out_is_named_once(folder, logged):
    for name in ("cat", "dog"):
        (folder / name / "a.heic").touch()
        (folder / name / "b.png").symlink_to("gone.png")
    (folder / "mouse").symlink_to("gone")
    Image.new("RGB", (4, 4)).save(folder / "beside.png")
    data = ImageFolder(folder)
    assert len(data) == 6
    for count, reason, name in (
        (2, "as Pillow cannot read .heic here (pip install pillow-heif)", "cat/a.heic"),
        (3, "a broken link", "mouse"),
        (1, "as it stands beside the folders of the classes", "beside.png"),
    ):
        (line,) = (line for line in logged if reason in line)
        assert line.startswith(f"{count} skipped, {reason}: ")
        assert f"{folder / name}'" in line


def test_a_picture_that_cannot_be_read_is_named(folder, caplog):
    (folder / "cat" / "1.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UnreadablePicture, match=r"cannot read picture .*cat/1.png"):
        ImageFolder(folder)[1]
    replaced = ImageFolder(folder, unreadable="replace")
    torch.testing.assert_close(replaced[1], replaced[2])
    for path, _ in replaced.items:
        Path(path).write_bytes(b"")
    with pytest.raises(UnreadablePicture, match=r"no picture in .* can be read"):
        replaced[0]


def test_a_draws_seed_decides_its_changes(folder):
    def change(picture, rng):
        return Image.new("L", (1, 1), rng.randrange(256))

    data = ImageFolder(folder, transforms=[change])
    values = [int(data[Draw(0, seed)]["inputs"]) for seed in range(20)]
    assert len(set(values)) > 10
    assert values == [int(data[Draw(0, seed)]["inputs"]) for seed in range(20)]
    assert int(data[0]["inputs"]) == values[0]


def test_the_same_transforms_as_torchvision(torchvision, photograph):
    transforms = torchvision.transforms
    for size in (40, (30, 50)):
        for name in ("bilinear", "bicubic"):
            theirs = transforms.Resize(size, transforms.InterpolationMode(name))(photograph)
            assert np.array_equal(Resize(size, name)(photograph, random.Random()), theirs), (size, name)
    for size in (40, (21, 50), 70, (70, 31)):
        theirs = transforms.CenterCrop(size)(photograph)
        assert np.array_equal(CenterCrop(size)(photograph, random.Random()), theirs), size


def test_random_resized_crops_have_the_areas_and_ratios_that_were_asked_for():
    size, rng = 1000, random.Random(0)
    crop = RandomResizedCrop(8, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    boxes = [crop._box(Image.new("L", (size, size)), rng) for _ in range(2000)]
    for left, top, width, height in boxes:
        assert 0 <= left <= size - width
        assert 0 <= top <= size - height
    inside = [(w * h / size**2, w / h) for _, _, w, h in boxes if w * h < 0.7 * size**2]  # no second attempts there
    areas, ratios = zip(*inside, strict=True)
    assert min(areas) > 0.079
    assert np.mean(areas) == pytest.approx((0.08 + 0.7) / 2, abs=0.02)
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.02)  # as often wide as high
    assert np.std(np.log(ratios)) == pytest.approx(
        math.log(16 / 9) / math.sqrt(12), rel=0.05
    )  # a uniform distribution's
    assert 0.74 < min(ratios) < 0.76
    assert 1.32 < max(ratios) < 1.34


def test_a_crop_that_does_not_fit_is_the_largest_in_the_middle():
    crop = RandomResizedCrop(8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert crop._box(Image.new("L", (100, 40)), random.Random(0)) == (30, 0, 40, 40)
    assert crop(Image.new("L", (100, 40)), random.Random(0)).size == (8, 8)


def test_random_crops_reach_every_place():
    picture = Image.fromarray(np.arange(1, 10, dtype=np.uint8).reshape(3, 3))
    corners = {np.array(RandomCrop(3, padding=1)(picture, random.Random(seed)))[0, 0] for seed in range(100)}
    assert corners == {0, 1, 2, 4, 5}
    assert RandomCrop(5)(picture, random.Random(0)).size == (5, 5)


def test_flips(photograph):
    mirrored = np.array(photograph)[:, ::-1]
    assert np.array_equal(RandomHorizontalFlip(1.0)(photograph, random.Random(0)), mirrored)
    assert RandomHorizontalFlip(0.0)(photograph, random.Random(0)) is photograph
    flipped = [RandomHorizontalFlip()(photograph, random.Random(seed)) is not photograph for seed in range(400)]
    assert 0.4 < np.mean(flipped) < 0.6


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_of_rand_augment(name, mode, photograph):
    picture = photograph.convert(mode)
    for strength in (-1.0, 0.0, 0.3, 1.0):
        changed = OPERATIONS[name](picture, strength, Image.Resampling.BICUBIC)
        assert changed.size == picture.size
        assert changed.mode == mode
    gradual = {"rotate", "add to dark", "color", "contrast", "brightness", "sharpness", "solarize"}
    if name in gradual or name.startswith(("shear", "shift")):
        assert np.array_equal(OPERATIONS[name](picture, 0.0, Image.Resampling.BICUBIC), picture)
    if (name, mode) not in {("color", "L"), ("autocontrast", "L")}:
        assert not np.array_equal(OPERATIONS[name](picture, 1.0, Image.Resampling.BICUBIC), picture)


def test_rand_augment_applies_as_many_as_it_should(photograph, monkeypatch):
    seen = []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda picture, strength, _, name=name: seen.append(strength) or picture)
    augment = RandAugment(operations=2, magnitude=7, deviation=0.5, probability=0.5)
    for seed in range(1000):
        augment(photograph, random.Random(seed))
    assert len(seen) == pytest.approx(1000, rel=0.1)  # two of probability 1/2
    assert np.mean(np.abs(seen)) == pytest.approx(0.7, abs=0.01)
    assert np.std(np.abs(seen)) == pytest.approx(0.05, rel=0.1)
    assert np.mean(np.sign(seen)) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Resize(0), "`height` must be at least 1, got 0"),
        (lambda: Resize(5, "best"), "`interpolation` must be one of 'nearest', .*; got 'best'"),
        (lambda: RandomResizedCrop(5, scale=(0.5, 2)), "`scale` must rise from above 0 to at most 1.0, got"),
        (lambda: RandomHorizontalFlip(2), "`probability` must be from 0 to 1, got 2"),
        (lambda: RandAugment(magnitude=11), "`magnitude` must be from 0 to 10"),
        (lambda: Mixing(), "`mixup` and `cutmix` must not both be 0"),
        (lambda: Mixing(mixup=-1), "`mixup` must be from 0 to 1000, got -1"),
        (lambda: Mixing(cutmix=1001), "`cutmix` must be from 0 to 1000, got 1001"),
        (lambda: CrossEntropy(label_smoothing=1), "`label_smoothing` must be at least 0 and below 1, got 1"),
        (
            lambda: BinaryCrossEntropy(label_smoothing=-0.1),
            "`label_smoothing` must be at least 0 and below 1",
        ),
        (lambda: BinaryCrossEntropy(threshold=float("nan")), "`threshold` must be finite, got nan"),
        (lambda: LAMB([nn.Parameter(torch.ones(1))], lr=-1), "`lr`, `eps` and `weight_decay` must not be negative"),
    ],
)
def test_arguments_are_checked(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_an_epoch_shows_everything_once_in_another_order_than_the_next():
    sampler = EpochSampler(range(100), seed=3)
    first = list(sampler)
    assert sorted(draw.item for draw in first) == list(range(100))
    assert first == list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert [draw.item for draw in second] != [draw.item for draw in first]
    assert not {draw.seed for draw in first} & {draw.seed for draw in second}
    assert list(EpochSampler(range(100), seed=4)) != first


def test_an_epoch_begins_where_it_was_broken_off():
    sampler = EpochSampler(range(10), seed=0)
    whole = list(sampler)
    sampler.skip(4)
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole


def test_processes_take_turns(monkeypatch):
    whole = list(EpochSampler(range(10), seed=0))
    ranks = []
    for rank in range(3):
        monkeypatch.setattr("resbackbone.training.engine.sampler.get_dist_info", lambda rank=rank: (rank, 3))
        ranks.append(EpochSampler(range(10), seed=0))
    parts = [list(sampler) for sampler in ranks]
    assert [len(part) for part in parts] == [len(sampler) for sampler in ranks] == [4, 4, 4]
    together = [draw for turn in zip(*parts, strict=True) for draw in turn]
    assert [draw.item for draw in together] == [draw.item for draw in whole + whole[:2]]
    assert len({draw.seed for draw in together}) == 12
    ranks[1].skip(3)
    assert list(ranks[1]) == parts[1][3:]


def test_repeats_come_in_a_row_and_are_changed_differently():
    draws = list(EpochSampler(range(10), seed=0, repeats=3))
    assert len(draws) == 10
    items = [draw.item for draw in draws]
    assert len(set(items)) == 4
    assert items[0] == items[1] == items[2] != items[3]
    assert len({draw.seed for draw in draws}) == 10


# --- losses, mixing, accuracy -----------------------------------------------------------------------------------------


def test_losses_against_their_definitions():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 1])
    targets = F.one_hot(labels, 4).float()
    torch.testing.assert_close(CrossEntropy(0.1)(logits, targets), F.cross_entropy(logits, labels, label_smoothing=0.1))
    mixed = 0.7 * targets + 0.3 * targets.roll(1, 0)
    by_hand = -(mixed * logits.sigmoid().log() + (1 - mixed) * (1 - logits.sigmoid()).log()).mean()
    torch.testing.assert_close(BinaryCrossEntropy()(logits, mixed), by_hand)
    both = ((targets + targets.roll(1, 0)) > 0).float()
    torch.testing.assert_close(
        BinaryCrossEntropy(threshold=0.2)(logits, mixed), F.binary_cross_entropy_with_logits(logits, both)
    )
    smooth = BinaryCrossEntropy(label_smoothing=0.1)(logits, targets)
    torch.testing.assert_close(smooth, F.binary_cross_entropy_with_logits(logits, targets * 0.9 + 0.025))


@pytest.mark.parametrize("kinds", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.1, "cutmix": 1.0}])
def test_targets_say_how_much_of_a_picture_is_whose(kinds):
    mixing = Mixing(**kinds)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 32, 24)  # picture i is i everywhere
    targets = torch.eye(4)
    seen = set()
    for _ in range(50):
        mixed, shares = mixing(images, targets)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), shares @ torch.arange(4.0))
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        flat = all(len(picture.unique()) == 1 for picture in mixed)
        seen.add("mixup" if flat else "cutmix")
    assert "mixup" in seen if "mixup" in kinds else "cutmix" in seen
    assert ("cutmix" in seen) == ("cutmix" in kinds)
    assert images[1].eq(1).all()
    torch.manual_seed(7)
    once = mixing(images, targets)
    torch.manual_seed(7)
    torch.testing.assert_close(mixing(images, targets), once, rtol=0, atol=0)


def test_no_picture_is_mixed_with_a_copy_of_itself():
    batch = [draw.item for draw in EpochSampler(range(300), seed=0, repeats=3)][:32]
    mixing = Mixing(mixup=1.0, cutmix=1.0)
    for _ in range(10):
        _, targets = mixing(torch.zeros(32, 3, 64, 64), F.one_hot(torch.tensor(batch), 300).float())
        assert (targets > 0).sum(1).tolist() == [2] * 32


def test_mixing_is_for_training_alone(images):
    model = ImageClassifier(SMALL, num_classes=3, mixing={"mixup": 5.0}).eval()
    labels = torch.tensor([0, 1])
    plain = F.cross_entropy(model(images), labels)
    assert not torch.isclose(model(images, labels, mode="loss")["loss"], plain)
    torch.testing.assert_close(model(images, labels, mode="predict")[0]["scores"], model(images)[0])


def test_accuracy_against_torchs_topk():
    scores, labels = torch.randn(200, 10).round(decimals=1), torch.randint(10, (200,))
    metric = Accuracy(topk=(1, 3))
    for part in (slice(0, 120), slice(120, 200)):
        metric.process({"labels": labels[part]}, [{"scores": row} for row in scores[part]])
    found = metric.evaluate(200)
    order = scores.argsort(dim=1, descending=True, stable=True)
    for k in (1, 3):
        assert found[f"accuracy/top{k}"] == pytest.approx(
            100 * (order[:, :k] == labels[:, None]).any(1).float().mean().item()
        )
    assert found["accuracy/cross_entropy"] == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-5)


def test_a_score_that_is_nan_is_never_right():
    nan = float("nan")
    assert places(torch.tensor([[nan, nan], [1.0, nan], [nan, 1.0]]), torch.tensor([0, 0, 0])).tolist() == [2, 1, 2]


# --- LAMB -------------------------------------------------------------------------------------------------------------


def test_lamb_against_its_definition():
    start, decayless = torch.randn(5, 3), torch.randn(4)
    weight, bias = nn.Parameter(start.clone()), nn.Parameter(decayless.clone())
    groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = LAMB(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.02)
    expected = {weight: start.double(), bias: decayless.double()}
    mean = {weight: 0.0, bias: 0.0}
    square = {weight: 0.0, bias: 0.0}
    for step in range(1, 4):
        for parameter in (weight, bias):
            parameter.grad = torch.randn_like(parameter)
            grad = parameter.grad.double()
            mean[parameter] = 0.8 * mean[parameter] + 0.2 * grad
            square[parameter] = 0.9 * square[parameter] + 0.1 * grad**2
            update = (mean[parameter] / (1 - 0.8**step)) / ((square[parameter] / (1 - 0.9**step)).sqrt() + 1e-6)
            if parameter is weight:
                update = update + 0.02 * expected[parameter]
                update = update * (expected[parameter].norm() / update.norm())
            expected[parameter] = expected[parameter] - 0.1 * update
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected[weight].float())
    torch.testing.assert_close(bias.detach(), expected[bias].float())


def test_lamb_steps_are_as_long_as_the_rate_times_the_tensor():
    for scale in (1e-4, 1.0, 1e4):
        weight = nn.Parameter(torch.randn(6) * scale)
        before = weight.detach().clone()
        weight.grad = torch.randn(6)
        LAMB([weight], lr=0.01, weight_decay=1e-9).step()
        torch.testing.assert_close(
            (weight.detach() - before).norm() / before.norm(), torch.tensor(0.01), rtol=1e-3, atol=0
        )
    still = nn.Parameter(torch.zeros(3))
    still.grad = torch.ones(3)
    LAMB([still], lr=0.01, weight_decay=0.1).step()
    assert still.isfinite().all()
    assert still.ne(0).all()


# --- recipes and commands ---------------------------------------------------------------------------------------------

RECIPES = sorted(path.name for path in CONFIGS.glob("[!_]*.py"))
NUM_CLASSES = {
    "digits_finetune_all.py": 5,
    "digits_finetune_head.py": 5,
    "digits_resnet18.py": 10,
    "imagenet_resnet50_a2.py": 1000,
    "imagenet_resnet50_a3.py": 1000,
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_complete(name):
    recipe = load_recipe(CONFIGS / name)
    model = MODELS.build(recipe.model)
    transforms = {
        key: build_transforms(recipe[key].dataset.transforms) for key in ("train_dataloader", "val_dataloader")
    }
    channels = recipe.train_dataloader.dataset.get("channels", 3)
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
        assert len(recipe[key].dataset.get("classes", range(NUM_CLASSES[name]))) == NUM_CLASSES[name]
    optimizing = {**recipe.optim_wrapper, "type": "OptimWrapper"}  # the one with mixed precision needs a GPU
    with DefaultScope.overwrite_default_scope("resbackbone"):
        optimizer = build_optim_wrapper(model, optimizing).optimizer
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert recipe.param_scheduler[-1].end == recipe.train_cfg.max_epochs


def test_overrides_change_a_recipe_and_typing_errors_are_told():
    path = CONFIGS / "digits_resnet18.py"
    recipe = load_recipe(path, ["train_cfg.max_epochs=3", "train_dataloader.dataset.classes=[0,1]", "load_from=a.pth"])
    assert recipe.train_cfg.max_epochs == 3
    assert recipe.train_dataloader.dataset.classes == [0, 1]
    assert recipe.load_from == "a.pth"
    for override in (
        "compile=True",
        "experiment_name=a",
        "activation_checkpointing=fc",
        "efficient_conv_bn_eval=backbone",
    ):
        assert override.partition("=")[0] in load_recipe(path, [override])
    with pytest.raises(KeyError, match=r"the config has no 'modle'; did you mean 'model'\?"):
        load_recipe(path, ["modle.num_classes=3"])
    with pytest.raises(ValueError, match=r"an override is KEY=VALUE, such as train_cfg.max_epochs=5; got '3'"):
        load_recipe(path, ["3"])


def test_a_config_is_a_backbones_too():
    assert build_backbone(CONFIGS / "digits_resnet18.py").in_channels == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a config and pictures, and what the command said when it trained there, to ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    prepare(folder)
    return folder, train(folder, "run")


def test_train_says_how_far_it_is_and_what_came_of_it(trained):
    folder, said = trained
    assert "Epoch(train) [1][1/6]" in said
    assert "eta: " in said
    lines = said.splitlines()
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


def test_tensorboard_gets_the_curves_that_it_is_asked_for(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    backends = '[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]'
    prepare(tmp_path, f"{CONFIG}visualizer = dict(vis_backends={backends})\n")
    train(tmp_path, "run", "train_cfg.max_epochs=1")
    (events,) = (tmp_path / "run").glob("*/vis_data/events.*")
    found = accumulator.EventAccumulator(str(events)).Reload()
    losses = [(record["step"], record["loss"]) for record in curves(tmp_path / "run") if record["mode"] == "train"]
    assert [(event.step, pytest.approx(event.value)) for event in found.Scalars("loss")] == losses


def test_test_measures_what_training_measured(trained):
    folder, _ = trained
    best = last_checkpoint(folder / "run")["message_hub"]["runtime_info"]
    said = run(folder, "test", "config.py", best["best_ckpt"])
    assert said.splitlines()[-1].startswith(
        f"accuracy/top1 {best['best_score']:.2f}, accuracy/top5 100.00, accuracy/cross_entropy "
    )


@pytest.fixture(scope="module")
def tested(trained):
    """What `resbackbone test` says of a run, with other pictures and options."""
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
def test_w3_classes_that_the_weights_do_not_know_are_an_error(tested, root, options):
    said = tested(root, *options, status=2)
    assert said.startswith("error: test_dataloader has ")
    assert f"of which the weights do not know: {'bird, fish' if root == 'others' else 'bird'}; " in said
    assert "those that they were trained on are bright, dark; name the folders as these" in said


@pytest.mark.parametrize("options", [(), (NO_HOOK,)], ids=["hook", "no hook"])
def test_w3_labels_go_by_the_names_of_the_classes(tested, options):
    wanted = tested("pictures", *options)
    assert tested("pictures", "test_dataloader.dataset.classes=[dark,bright]", *options) == wanted


def test_w3_a_subset_of_the_classes_can_be_tested(tested):
    both, dark = (float(tested(root).split()[1].rstrip(",")) for root in ("pictures", "subset"))
    bright = float(tested("pictures", "test_dataloader.dataset.classes=[bright]").split()[1].rstrip(","))
    assert both == pytest.approx((dark + bright) / 2, abs=0.02)
    empty = "test_dataloader.dataset.allow_empty=True", "test_dataloader.dataset.classes=[bright,dark,none]"
    assert "weights do not know: none;" in tested("subset", *empty, status=2)
    empty = empty[0], "test_dataloader.dataset.classes=[bright,dark]"
    assert float(tested("subset", *empty).split()[1].rstrip(",")) == dark


def test_w3_weights_without_names_go_by_the_order_of_as_many_folders(tested):
    wanted = tested("pictures")
    assert tested("pictures", weights="weights.pth") == wanted
    assert "accuracy/top1" in tested("others", weights="weights.pth")
    for root, count in (("subset", 1), ("more", 3)):
        said = tested(root, weights="weights.pth", status=2)
        assert f"test_dataloader has {count} classes" in said
        assert "`model.num_classes` is 2" in said


def test_w3_a_run_is_not_resumed_with_other_classes(trained, tested, tmp_path):
    folder, _ = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    other = [f"{part}_dataloader.dataset.classes=[dark,bright]" for part in ("train", "val")]
    said = train(folder, tmp_path / "run", "--resume", "train_cfg.max_epochs=4", *other, status=2).splitlines()[-1]
    assert "error: the run began with the classes bright, dark, and train_dataloader has dark, bright now" in said


def test_w3_classes_without_pictures_keep_their_labels(folder):
    (folder / "mouse").mkdir()
    data = ImageFolder(folder, classes=["mouse", "cat", "elk", "dog"], allow_empty=True)
    assert data.metainfo == {"classes": ("mouse", "cat", "elk", "dog")}
    assert [label for _, label in data.items] == [1, 1, 1, 3, 3, 3]
    with pytest.raises(KeyError, match="or allow_empty=True"):
        ImageFolder(folder, classes=["elk"])
    with pytest.raises(ValueError, match=r"no pictures in .*, in folders called elk, mouse"):
        ImageFolder(folder, classes=["elk", "mouse"], allow_empty=True)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_w4_a_data_loader_without_a_batch_is_refused(trained, tmp_path, part):
    folder, _ = trained
    options = f"{part}_dataloader.batch_size=64", f"{part}_dataloader.drop_last=True", "--work-dir", tmp_path
    command = ("test", "config.py", folder / "run" / "iter_18.pth") if part == "test" else ("train", "config.py")
    said = run(folder, *command, *options, status=2).splitlines()[-1]
    assert said.startswith("error: the data loader of 'pictures' has 22 pictures and no batch: batch_size is 64, and ")
    assert "lower batch_size to at most 22, or say drop_last=False" in said
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(("batch_size", "batch"), [(3, "8 of 8"), (1, "1 of 22")])
def test_u4_a_batch_of_one_at_maps_of_one_pixel_is_one_line(trained, tmp_path, batch_size, batch):
    folder, _ = trained
    options = (f"train_dataloader.batch_size={batch_size}", "train_dataloader.dataset.transforms.0.size=2")
    options += ("train_cfg.max_epochs=1",)
    said = train(folder, tmp_path / "run", *options, status=2)
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith(f"error: batch {batch} in epoch 1 has one picture (batch_size is {batch_size}, of 22)")
    assert ("train_dataloader.drop_last=True leaves such a last batch out" in last) == (batch_size > 1)
    if batch_size > 1:
        train(folder, tmp_path / "run", *options, "train_dataloader.drop_last=True")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing.py",), "no config file at 'nothing.py'"),
        (("config.py", "train_dataloader.dataset.root=nowhere"), "no folder 'nowhere'; it should have one subfolder"),
        (
            ("config.py", "train_dataloader.sampler.type=DefaultSampler"),
            "ResumableTrainLoop needs train_dataloader=dict(",
        ),
        (
            ("config.py", "model.num_classes=3"),
            "train_dataloader has 2 classes (bright, dark), `model.num_classes` is 3",
        ),
        (
            ("config.py", "val_dataloader.dataset.classes=[dark,bright]"),
            "not the same classes in the same order: label 0 is 'bright' in training, 'dark' in validation; give both",
        ),
        (
            ("config.py", "model.num_class=3"),
            "ImageClassifier.__init__() got an unexpected keyword argument 'num_class'",
        ),
        (("config.py", "model.backbone.depth=19"), "19"),
        (("config.py", "load_from=nowhere.pth"), "nowhere.pth"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(trained, tmp_path, arguments, words):
    folder, _ = trained
    said = run(folder, "train", *arguments, "--work-dir", tmp_path, status=2)
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ")
    assert words in said.splitlines()[-1]


def accuracy(work_dir):
    """The last one of a run."""
    return [record["accuracy/top1"] for record in curves(work_dir) if record["mode"] == "val"][-1]


@pytest.mark.slow
def test_digits_and_fine_tuning(tmp_path):
    write_digits(tmp_path / "data" / "digits")
    said = run(tmp_path, "train", CONFIGS / "digits_resnet18.py")
    assert accuracy(tmp_path / "work_dirs/digits_resnet18") >= 98, said

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
    assert accuracy(tmp_path / "work_dirs/digits_finetune_head") >= 80  # by a linear map of what tells others apart

    run(tmp_path, "train", CONFIGS / "digits_finetune_all.py", "--resume")  # begins from the other's weights
    tuned = last_checkpoint(tmp_path / "work_dirs/digits_finetune_all")
    assert tuned["meta"]["epoch"] == 10
    for key in ("backbone.conv1.weight", "backbone.layer4.1.conv2.weight", "fc.weight"):
        assert not torch.equal(tuned["state_dict"][key], after[key]), key
    assert accuracy(tmp_path / "work_dirs/digits_finetune_all") >= 95
