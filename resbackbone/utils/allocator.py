"""Tuning of the C library's memory allocator for large tensors."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3), from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Make the allocator keep freed memory for later allocations.

    By default, glibc returns blocks of more than 32 MiB to the system at once. The feature maps of detectors are
    larger, so every call waits for the system to allocate and zero them. The setting applies to the whole process until
    it ends, and keeps the peak memory; so the library makes it by itself only in the command ``resbackbone extract``.

    Returns:
        Whether the setting took effect: False for C libraries other than glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))
