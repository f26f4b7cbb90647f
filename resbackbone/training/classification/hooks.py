"""Check before a run begins that the classes of its data sets and model agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook

from resbackbone.checkpoints.tensors import class_names
from resbackbone.registry import HOOKS


class ClassesDoNotFit(ValueError):
    """The classes of the pictures are not those of the model, or not the same in training and validation."""


@HOOKS.register_module()
class ClassesHook(Hook):
    """Compares the classes of data sets and model, whose mismatch would otherwise only show as a wrong accuracy."""

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
        """Number the labels as the model does, by the names of the classes if its weights came with them.

        Raises:
            ClassesDoNotFit: If a class is none of the model's, or of weights without names, the model has not as many.
        """
        dataset = runner.test_dataloader.dataset
        names = getattr(runner.bare_model, "classes", None)
        if names is None:
            _check(runner, runner.test_dataloader, "test_dataloader")
            return
        own = tuple(dataset.metainfo["classes"])
        if others := [name for name in own if name not in names]:
            raise ClassesDoNotFit(
                f"test_dataloader has {len(own)} classes, {len(others)} of which the weights do not know: "
                f"{_some(others)}; those that they were trained on are {_some(names)}; name the folders as these"
            )
        if own != names:
            if not hasattr(dataset, "relabel"):
                raise ClassesDoNotFit(
                    f"test_dataloader has other classes than the weights, or in another order, {_some(own)} for "
                    f"{_some(names)}, and {type(dataset).__name__} has no method `relabel`, as ImageFolder has"
                )
            dataset.relabel(names)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Compare the classes of a run that goes on with those that it began with.

        Raises:
            ClassesDoNotFit: If they are others, or in another order.
        """
        began = class_names(checkpoint)
        if not runner.resuming or began is None:
            return
        now = tuple(runner.train_dataloader.dataset.metainfo["classes"])
        if now != began:
            raise ClassesDoNotFit(
                f"the run began with the classes {_some(began)}, and train_dataloader has {_some(now)} now; resume "
                "with the same folders, or begin anew with `load_from`"
            )


def _check(runner: Any, dataloader: Any, name: str) -> tuple[str, ...]:
    classes = tuple(dataloader.dataset.metainfo["classes"])
    wanted = runner.bare_model.num_classes
    if len(classes) != wanted:
        raise ClassesDoNotFit(f"{name} has {len(classes)} classes ({_some(classes)}), `model.num_classes` is {wanted}")
    return classes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
