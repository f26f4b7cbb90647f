"""How the process gets the memory of large tensors."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3), from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for what it allocates next.

    The C library of Linux returns blocks of more than 32 MiB to the system at once. The feature maps of detectors are
    larger, so each call gets its memory anew, and waits for the system to clear it. This holds for the whole process
    and until it ends, which is why only the command ``resbackbone extract``, whose process is its own, does it unasked.
    The memory that is kept is what was needed at the worst moment.

    Returns:
        Whether it will: False where the C library is another than glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))
