"""Progress lines for the long steps of an export, and filters for the log lines of other libraries."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL = 15.0  # seconds between two progress lines
_VERBOSE_LOGGERS = ("torch.onnx", "torch.export", "torch._inductor", "onnxscript", "onnx_ir")


@contextmanager
def report_progress(step: str, report: Callable[[str], None]) -> Iterator[None]:
    """Report a step when it begins, and every ``INTERVAL`` the time it has taken so far.

    Args:
        step: What is done.
        report: Called with each line.
    """
    report(step)
    start, done = time.monotonic(), threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            report(f"{step}: {time.monotonic() - start:.0f} s so far")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Suppress the warnings of other libraries about themselves, whether logged or issued.

    torch's ONNX exporter logs four lines where torchvision is not installed, one for each of its operators.
    """
    loggers = [logging.getLogger(name) for name in _VERBOSE_LOGGERS]
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
