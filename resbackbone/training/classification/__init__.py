"""Image classification: model, dataset, augmentation, losses and metric for mmengine's runner."""

from resbackbone.training.classification.classifier import ImageClassifier
from resbackbone.training.classification.datasets import ImageFolder, UnreadablePictureError
from resbackbone.training.classification.hooks import ClassCheckHook, ClassMismatchError
from resbackbone.training.classification.losses import BinaryCrossEntropy, CrossEntropy
from resbackbone.training.classification.metrics import Accuracy
from resbackbone.training.classification.mixup import MixupCutmix
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
    "ClassCheckHook",
    "ClassMismatchError",
    "CrossEntropy",
    "ImageClassifier",
    "ImageFolder",
    "MixupCutmix",
    "RandAugment",
    "RandomCrop",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "Resize",
    "UnreadablePictureError",
]
