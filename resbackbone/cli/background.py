"""Work in background threads: results in order, and never more of them at once than a limit allows."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 8


def usable_threads() -> int:
    """How many threads one process should start: the cores it may use, shared with its siblings under torchrun."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_THREADS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Result], *, threads: int, limit: int, weigh: Callable[[Result], int]
) -> Iterator[Result]:
    """Yield ``read(item)`` for each item, in order, while background threads read on.

    Args:
        items: What is read.
        read: Called in a background thread; what it raises is raised here.
        threads: How many.
        limit: Nothing new is begun while what was read and not yet taken weighs that much, so that at most
            ``threads`` results go beyond it.
        weigh: What a result weighs, at least 1, in the unit of ``limit``.
    """
    remaining = iter(items)
    begun: deque[Future[Result]] = deque()
    running = held = 0
    lock = threading.Lock()

    def work(item: Item) -> Result:
        nonlocal running, held
        weight = 0
        try:
            result = read(item)
            weight = weigh(result)
            return result
        finally:
            with lock:
                running -= 1
                held += weight
                begin()

    def begin() -> None:
        """Begin what may begin; the caller holds the lock."""
        nonlocal running
        while running < threads and held < limit:
            try:
                item = next(remaining)
            except StopIteration:
                return
            running += 1
            begun.append(pool.submit(work, item))

    with _pool(threads) as pool:  # which, when the consumer leaves, shuts down and takes nothing more from `begin`
        with lock:
            begin()
        while begun:
            result = begun[0].result()
            with lock:
                begun.popleft()
                held -= weigh(result)
                begin()
            yield result


def write_behind(
    items: Iterable[Item], write: Callable[[Item], Result], *, threads: int, limit: int, weigh: Callable[[Item], int]
) -> Iterator[Result]:
    """Yield ``write(item)`` for each item, in order, as background threads get done, while the next items come.

    Args:
        items: What is written; an iterator does its own work in this thread.
        write: Called in a background thread; what it raises is raised here.
        threads: How many.
        limit: No further item is asked for while those that wait to be written weigh more.
        weigh: What an item weighs, in the unit of ``limit``.
    """
    begun: deque[tuple[int, Future[Result]]] = deque()
    held = 0
    with _pool(threads) as pool:
        for item in items:
            begun.append((weigh(item), pool.submit(write, item)))
            held += begun[-1][0]
            while begun and (held > limit or begun[0][1].done()):
                weight, written = begun.popleft()
                yield written.result()
                held -= weight
        for _, written in begun:
            yield written.result()


def _pool(threads: int) -> ThreadPoolExecutor:
    # The setting is each thread's own: all cores are left to the main thread, which computes.
    return ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1))
