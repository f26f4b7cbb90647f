"""Logging on rank 0: to mmengine's logger if a run has one, otherwise to the logger "resbackbone"."""

from __future__ import annotations

import logging
import sys

import torch

_pending: list[str] = []  # messages logged while a config is read, before mmengine creates its logger


def log_info(message: str) -> None:
    """Log a message at level INFO on rank 0."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    (_run_logger() or logging.getLogger("resbackbone")).info(message)


def log_info_later(message: str) -> None:
    """Queue a message until mmengine's logger exists; :func:`log_pending` logs it."""
    _pending.append(message)


def log_pending() -> None:
    """Log the queued messages if mmengine's logger exists."""
    if _pending and _run_logger() is not None:
        messages = list(_pending)
        _pending.clear()
        for message in messages:
            log_info(message)


def _run_logger() -> logging.Logger | None:
    """Return the logger of the latest run, but not mmengine's own default logger, which writes to the terminal."""
    module = sys.modules.get("mmengine.logging")
    loggers: dict[str, logging.Logger] = {} if module is None else module.MMLogger._instance_dict
    return next((loggers[name] for name in reversed(loggers) if name != "mmengine"), None)
