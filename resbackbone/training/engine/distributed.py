"""What the processes of a run must do all or none: fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.dist import all_gather_object, all_reduce


@contextmanager
def fail_together(*kinds: type[Exception]) -> Iterator[None]:
    """Let every process fail in this block if one does, so that none waits for another that has ended.

    Every process must come to it. Each raises its own error, or else that of the first process that has one.

    Args:
        kinds: The exceptions that are told to the others. They must take a message alone.
    """
    own: Exception | None = None
    try:
        yield
    except kinds as error:
        own = error
    failed = torch.tensor(float(own is not None))
    all_reduce(failed, op="max")
    if not failed:
        return
    errors = all_gather_object(own)
    if own is not None:
        raise own
    rank, other = next((rank, error) for rank, error in enumerate(errors) if error is not None)
    raise type(other)(f"process {rank}: {other}")
