"""Faults injected into a training process: kills, non-finite losses, values that cannot be saved."""

import os
import signal
from pathlib import Path

import numpy as np


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(target, call, *, after=False):
    """Kill this process at the given call of a method, before or after running it."""
    owner, name = target
    method, calls = getattr(owner, name), 0

    def killing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and not after:
            die()
        result = method(*args, **kwargs)
        if calls == call:
            die()
        return result

    setattr(owner, name, killing)


def die_in_iteration(number):
    from resbackbone.training.classification import ImageClassifier

    die_at((ImageClassifier, "parse_losses"), number)  # also called by model wrappers


def die_in_validation(number):
    from resbackbone.training.classification import ImageClassifier

    die_at((ImageClassifier, "val_step"), number)


def die_before_replacing_file(number):
    die_at((Path, "replace"), number)


def die_after_replacing_file(number):
    die_at((Path, "replace"), number, after=True)


def scale_loss(value, rank=0):
    """Multiply the loss of one rank by a number in the eighth step."""
    from resbackbone.training.classification import CrossEntropy

    forward, calls = CrossEntropy.forward, 0

    def scaled(self, *args):
        nonlocal calls
        calls += 1
        return forward(self, *args) * (value if calls == 8 else 1.0)

    if os.environ.get("RANK", "0") == str(rank):
        CrossEntropy.forward = scaled


def add_array_to_message_hub():
    """Store a NumPy array, which cannot be resumed, in the message hub."""
    from resbackbone.training.classification import ClassCheckHook

    def before_train(self, runner):
        runner.message_hub.update_info("means", {"of classes": np.zeros(3)})

    ClassCheckHook.before_train = before_train
