"""Log a line in one process: to mmengine's logger where there is one, else to the logger "resbackbone"."""

from __future__ import annotations

import logging
import sys

import torch

_waiting: list[str] = []  # said while a config was read, before mmengine made the log


def log_info(message: str) -> None:
    """Write a line of level INFO."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    (_mmengines_logger() or logging.getLogger("resbackbone")).info(message)


def log_info_later(message: str) -> None:
    """Write a line as soon as :func:`write_waiting` is called with a log of mmengine's there, and no sooner."""
    _waiting.append(message)


def write_waiting() -> None:
    """Write the lines that wait, if mmengine has made its log."""
    if _waiting and _mmengines_logger() is not None:
        messages = list(_waiting)
        _waiting.clear()
        for message in messages:
            log_info(message)


def _mmengines_logger() -> logging.Logger | None:
    """Return the log of the latest run; not the one that mmengine makes for itself, which writes to the terminal."""
    module = sys.modules.get("mmengine.logging")
    loggers: dict[str, logging.Logger] = {} if module is None else module.MMLogger._instance_dict
    return next((loggers[name] for name in reversed(loggers) if name != "mmengine"), None)
