"""Progress lines for the long steps of an export, and filters for the log lines of other libraries."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL = 15.0  # seconds between two lines of one step
_TALKATIVE = ("torch.onnx", "torch.export", "torch._inductor", "onnxscript", "onnx_ir")


@contextmanager
def step(what: str, report: Callable[[str], None]) -> Iterator[None]:
    """Say what begins, and while it lasts, every ``INTERVAL``, for how long it has.

    Args:
        what: What is done.
        report: Called with each line.
    """
    report(what)
    begin, done = time.monotonic(), threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            report(f"{what}: {time.monotonic() - begin:.0f} s so far")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Leave out warnings of other libraries about themselves, in whichever way they come.

    torch's exporter to ONNX logs four lines where torchvision is not installed, one for each operator of its.
    """
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
