"""Seeing before it begins that a run's classes fit together."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook

from resbackbone.registry import HOOKS


class ClassesDoNotFit(ValueError):
    """The classes of the pictures are not those of the model, or not the same in training and validation."""


@HOOKS.register_module()
class ClassesHook(Hook):
    """Compares the classes of data sets and model, which otherwise show as accuracies that nobody understands."""

    def before_train(self, runner: Any) -> None:
        """Look at both data sets.

        Raises:
            ClassesDoNotFit: If the model has not as many, or they differ.
        """
        training = _check(runner, runner.train_dataloader, "train_dataloader")
        if runner.val_loop is not None:
            validation = _check(runner, runner.val_dataloader, "val_dataloader")
            for label, (one, other) in enumerate(zip(training, validation, strict=True)):
                if one != other:
                    raise ClassesDoNotFit(
                        "training and validation have not the same classes in the same order: label "
                        f"{label} is {one!r} in training, {other!r} in validation; give both data sets the same "
                        "`classes`"
                    )

    def before_test(self, runner: Any) -> None:
        """Look at the data set.

        Raises:
            ClassesDoNotFit: If the model has not as many.
        """
        _check(runner, runner.test_dataloader, "test_dataloader")


def _check(runner: Any, dataloader: Any, name: str) -> tuple[str, ...]:
    classes = tuple(dataloader.dataset.metainfo["classes"])
    wanted = runner.bare_model.num_classes
    if len(classes) != wanted:
        raise ClassesDoNotFit(
            f"{name} has {len(classes)} classes ({', '.join(classes[:5])}, ...), `model.num_classes` is {wanted}"
        )
    return classes
