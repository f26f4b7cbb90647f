"""Propagate exceptions to all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.dist import all_gather_object, all_reduce


@contextmanager
def raise_on_all_ranks(*exceptions: type[Exception]) -> Iterator[None]:
    """Raise on every rank if one rank raises in this block, so that no rank waits for one that has ended.

    Every rank must enter the block. A rank raises its own exception, or else that of the first rank that has one.

    Args:
        exceptions: The exceptions to propagate. They must be constructible from a message alone.
    """
    own: Exception | None = None
    try:
        yield
    except exceptions as error:
        own = error
    failed = torch.tensor(float(own is not None))
    all_reduce(failed, op="max")
    if not failed:
        return
    errors = all_gather_object(own)
    if own is not None:
        raise own
    rank, other = next((rank, error) for rank, error in enumerate(errors) if error is not None)
    raise type(other)(f"rank {rank}: {other}")
