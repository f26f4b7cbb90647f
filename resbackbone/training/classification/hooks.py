"""Hook that checks that datasets and model have the same classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook

from resbackbone.checkpoints.tensors import class_names
from resbackbone.registry import HOOKS


class ClassMismatchError(ValueError):
    """The classes of a dataset differ from those of the model, or between training and validation."""


@HOOKS.register_module()
class ClassCheckHook(Hook):
    """Compares the classes of datasets and model; a mismatch would otherwise only show as a wrong accuracy."""

    def before_train(self, runner: Any) -> None:
        """Check the training and validation datasets.

        Raises:
            ClassMismatchError: If they differ from each other, or in number from the model's.
        """
        training = _check(runner, runner.train_dataloader, "train_dataloader")
        if runner.val_loop is not None:
            validation = _check(runner, runner.val_dataloader, "val_dataloader")
            for label, (train_name, val_name) in enumerate(zip(training, validation, strict=True)):
                if train_name != val_name:
                    raise ClassMismatchError(
                        f"training and validation classes differ: label {label} is {train_name!r} in training and "
                        f"{val_name!r} in validation; set the same `classes` for both datasets"
                    )

    def before_test(self, runner: Any) -> None:
        """Renumber the labels of the test dataset by the class names of the weights, if they have any.

        Raises:
            ClassMismatchError: If a class is unknown to the model; without class names, if the numbers differ.
        """
        dataset = runner.test_dataloader.dataset
        names = getattr(runner.unwrapped_model, "classes", None)
        if names is None:
            _check(runner, runner.test_dataloader, "test_dataloader")
            return
        own = tuple(dataset.metainfo["classes"])
        if unknown := [name for name in own if name not in names]:
            raise ClassMismatchError(
                f"{len(unknown)} of the {len(own)} classes of test_dataloader are unknown to the weights: "
                f"{_shorten(unknown)}; the weights were trained on {_shorten(names)}; rename the folders to match"
            )
        if own != names:
            if not hasattr(dataset, "relabel"):
                raise ClassMismatchError(
                    f"the classes of test_dataloader and the weights differ or are in another order, {_shorten(own)} "
                    f"and {_shorten(names)}, and {type(dataset).__name__} has no method `relabel` as ImageFolder has"
                )
            dataset.relabel(names)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Check that a resumed run has the classes that it started with.

        Raises:
            ClassMismatchError: If they differ or are in another order.
        """
        before = class_names(checkpoint)
        if not runner.resuming or before is None:
            return
        now = tuple(runner.train_dataloader.dataset.metainfo["classes"])
        if now != before:
            raise ClassMismatchError(
                f"the run started with the classes {_shorten(before)}, but train_dataloader now has {_shorten(now)}; "
                "resume with the same folders, or start a new run with `load_from`"
            )


def _check(runner: Any, dataloader: Any, name: str) -> tuple[str, ...]:
    classes = tuple(dataloader.dataset.metainfo["classes"])
    num_classes = runner.unwrapped_model.num_classes
    if len(classes) != num_classes:
        raise ClassMismatchError(
            f"{name} has {len(classes)} classes ({_shorten(classes)}), but `model.num_classes` is {num_classes}"
        )
    return classes


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
