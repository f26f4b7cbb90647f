"""What goes wrong in a training process: it is killed, its loss is lost, it holds what cannot be saved."""

import os
import signal
from pathlib import Path

import numpy as np


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(target, call, *, after=False):
    """Be killed when a method is called for that time, before it or after."""
    owner, name = target
    method, calls = getattr(owner, name), 0

    def deadly(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and not after:
            die()
        result = method(*args, **kwargs)
        if calls == call:
            die()
        return result

    setattr(owner, name, deadly)


def die_in_iteration(number):
    from resbackbone.training.classification import ImageClassifier

    die_at((ImageClassifier, "parse_losses"), number)  # which wrappers of the model call, too


def die_in_validation(number):
    from resbackbone.training.classification import ImageClassifier

    die_at((ImageClassifier, "val_step"), number)


def die_before_file_is_there(number):
    die_at((Path, "replace"), number)


def die_after_file_is_there(number):
    die_at((Path, "replace"), number, after=True)


def lose_the_loss(value, rank=0):
    """Let the loss of one process be multiplied by a number in the eighth step."""
    from resbackbone.training.classification import CrossEntropy

    forward, calls = CrossEntropy.forward, 0

    def poisoned(self, *args):
        nonlocal calls
        calls += 1
        return forward(self, *args) * (value if calls == 8 else 1.0)

    if os.environ.get("RANK", "0") == str(rank):
        CrossEntropy.forward = poisoned


def note_an_array():
    """Let a hook keep what no checkpoint can be resumed with."""
    from resbackbone.training.classification import ClassesHook

    def before_train(self, runner):
        runner.message_hub.update_info("means", {"of classes": np.zeros(3)})

    ClassesHook.before_train = before_train
