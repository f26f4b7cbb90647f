"""Losses, mixup and CutMix, and accuracy."""

import pytest
import torch
import torch.nn.functional as F

from resbackbone.training.classification import (
    Accuracy,
    BinaryCrossEntropy,
    CrossEntropy,
    MixupCutmix,
)
from resbackbone.training.classification.metrics import label_ranks
from resbackbone.training.engine import EpochSampler


def test_losses():
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


@pytest.mark.parametrize("alphas", [{"mixup_alpha": 0.2}, {"cutmix_alpha": 1}, {"mixup_alpha": 0.1, "cutmix_alpha": 1}])
def test_targets_match_the_mixing_ratio(alphas):
    mixup_cutmix = MixupCutmix(**alphas)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 32, 24)  # picture i is i everywhere
    targets = torch.eye(4)
    seen = set()
    for _ in range(50):
        mixed, shares = mixup_cutmix(images, targets)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), shares @ torch.arange(4.0))
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        flat = all(len(picture.unique()) == 1 for picture in mixed)
        seen.add("mixup" if flat else "cutmix")
    assert seen == {name.removesuffix("_alpha") for name in alphas}
    assert images[1].eq(1).all()
    torch.manual_seed(7)
    once = mixup_cutmix(images, targets)
    torch.manual_seed(7)
    torch.testing.assert_close(mixup_cutmix(images, targets), once, rtol=0, atol=0)


def test_repeated_pictures_are_mixed_with_others():
    batch = [index.item for index in EpochSampler(range(300), seed=0, num_repeats=3)][:32]
    mixup_cutmix = MixupCutmix(mixup_alpha=1.0, cutmix_alpha=1.0)
    for _ in range(10):
        _, targets = mixup_cutmix(torch.zeros(32, 3, 64, 64), F.one_hot(torch.tensor(batch), 300).float())
        assert (targets > 0).sum(1).tolist() == [2] * 32


def test_accuracy():
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


def test_nan_score_ranks_last():
    nan = float("nan")
    assert label_ranks(torch.tensor([[nan, nan], [1.0, nan], [nan, 1.0]]), torch.tensor([0, 0, 0])).tolist() == [
        2,
        1,
        2,
    ]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MixupCutmix(), "`mixup_alpha` and `cutmix_alpha` must not both be 0"),
        (lambda: MixupCutmix(mixup_alpha=-1), "`mixup_alpha` must be from 0 to 1000, got -1"),
        (lambda: MixupCutmix(cutmix_alpha=1001), "`cutmix_alpha` must be from 0 to 1000, got 1001"),
        (lambda: CrossEntropy(label_smoothing=1), "`label_smoothing` must be at least 0 and below 1, got 1"),
        (lambda: BinaryCrossEntropy(label_smoothing=-0.1), "`label_smoothing` must be at least 0 and below 1"),
        (lambda: BinaryCrossEntropy(threshold=float("nan")), "`threshold` must be finite, got nan"),
    ],
)
def test_invalid_arguments(build, words):
    with pytest.raises(ValueError, match=words):
        build()
