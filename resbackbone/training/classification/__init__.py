"""Image classification, to train backbones and to see that they work."""

from resbackbone.training.classification.classifier import ImageClassifier
from resbackbone.training.classification.datasets import ImageFolder, UnreadablePicture
from resbackbone.training.classification.hooks import ClassesDoNotFit, ClassesHook
from resbackbone.training.classification.losses import BinaryCrossEntropy, CrossEntropy
from resbackbone.training.classification.metrics import Accuracy
from resbackbone.training.classification.mixup import Mixing
from resbackbone.training.classification.rand_augment import RandAugment
from resbackbone.training.classification.transforms import (
    CenterCrop,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
)

__all__ = [
    "Accuracy",
    "BinaryCrossEntropy",
    "CenterCrop",
    "ClassesDoNotFit",
    "ClassesHook",
    "CrossEntropy",
    "ImageClassifier",
    "ImageFolder",
    "Mixing",
    "RandAugment",
    "RandomCrop",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "Resize",
    "UnreadablePicture",
]
