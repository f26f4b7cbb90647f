"""Background threads that load items ahead and write results behind, in order and within a memory limit."""

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


def num_worker_threads() -> int:
    """Return how many threads this process should start: its share of the CPU cores, under torchrun of one node's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_THREADS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def prefetch(
    items: Iterable[Item],
    load: Callable[[Item], Result],
    *,
    num_threads: int,
    max_bytes: int,
    nbytes: Callable[[Result], int],
) -> Iterator[Result]:
    """Yield ``load(item)`` for each item, in order, while background threads load the next ones.

    Args:
        items: Arguments of ``load``.
        load: Called in a background thread; its exceptions are raised here.
        num_threads: Number of threads.
        max_bytes: No item is started while loaded results of this size wait, so at most ``num_threads`` go beyond it.
        nbytes: Size of a result in bytes, at least 1.
    """
    remaining = iter(items)
    pending: deque[Future[Result]] = deque()
    num_running = waiting_bytes = 0
    lock = threading.Lock()

    def work(item: Item) -> Result:
        nonlocal num_running, waiting_bytes
        size = 0
        try:
            result = load(item)
            size = nbytes(result)
            return result
        finally:
            with lock:
                num_running -= 1
                waiting_bytes += size
                submit()

    def submit() -> None:
        """Start as many items as the limits allow; the caller holds the lock."""
        nonlocal num_running
        while num_running < num_threads and waiting_bytes < max_bytes:
            try:
                item = next(remaining)
            except StopIteration:
                return
            num_running += 1
            pending.append(pool.submit(work, item))

    with _thread_pool(num_threads) as pool:  # shuts down when the consumer stops, and accepts no more items
        with lock:
            submit()
        while pending:
            result = pending[0].result()
            with lock:
                pending.popleft()
                waiting_bytes -= nbytes(result)
                submit()
            yield result


def write_behind(
    items: Iterable[Item],
    write: Callable[[Item], Result],
    *,
    num_threads: int,
    max_bytes: int,
    nbytes: Callable[[Item], int],
) -> Iterator[Result]:
    """Yield ``write(item)`` for each item, in order, while background threads write and this thread computes the next.

    Args:
        items: Arguments of ``write``; an iterator runs in this thread.
        write: Called in a background thread; its exceptions are raised here.
        num_threads: Number of threads.
        max_bytes: No item is computed while items of more than this size wait to be written.
        nbytes: Size of an item in bytes.
    """
    pending: deque[tuple[int, Future[Result]]] = deque()
    waiting_bytes = 0
    with _thread_pool(num_threads) as pool:
        for item in items:
            pending.append((nbytes(item), pool.submit(write, item)))
            waiting_bytes += pending[-1][0]
            while pending and (waiting_bytes > max_bytes or pending[0][1].done()):
                size, future = pending.popleft()
                yield future.result()
                waiting_bytes -= size
        for _, future in pending:
            yield future.result()


def _thread_pool(num_threads: int) -> ThreadPoolExecutor:
    # torch's number of threads is a setting of each thread: the main thread, which computes, keeps all cores.
    return ThreadPoolExecutor(num_threads, initializer=partial(torch.set_num_threads, 1))
