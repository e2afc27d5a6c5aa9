"""Freed memory that stays with the process, so that the next request need not fault it in again.

A pass over thousands of candidates makes and frees some ten MiB. glibc gives freed memory back to
the kernel, and gets it anew, page by page, for the next request. A page fault costs a microsecond
or two where the kernel runs on the machine itself, and more inside of a virtual machine.
"""

from __future__ import annotations

import ctypes
import sys

KEPT_BYTES = 64 << 20
"""A thread's freed memory, up to here, is kept. glibc has no larger piece for a thread."""

_LARGEST_ON_HEAP_BYTES = 32 << 20  # the most that glibc allows: half of such a piece
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


def keep_freed_memory() -> bool:
    """Have this process keep what it frees for itself; whether its C library can.

    It holds from now on, for all threads, and can't be taken back. The process then stays as large
    as what each of its threads needed at most, one beside the other.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # a C library other than glibc
        return False
    settings = {_TRIM_THRESHOLD: KEPT_BYTES, _MMAP_THRESHOLD: _LARGEST_ON_HEAP_BYTES}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
