"""Giving new parts of a mapped file their pages before the writer gets there.

The first write to a page of a file that grew has the kernel find and zero a page. That took a
third of the writer's time; here another thread does it, outside the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from numpy.typing import NDArray

_MADV_POPULATE_WRITE = 23
"""Since Linux 5.14; what it means is in madvise(2). Contents are never changed."""

_PIECE_BYTES = 1 << 18
"""Others can't allocate memory meanwhile."""


class Populate:
    """Touches memory in the background; what fails is left to the writer. The thread starts with
    the first call, so that readers have none."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "memory-populate")

    def ahead(self, part: NDArray) -> None:
        """Have the pages of ``part``, a view of a mapping, made in the background."""
        if _madvise is not None and part.nbytes:
            self._executor.submit(_touch, part)

    def close(self) -> None:
        """Return when nothing is under way."""
        self._executor.shutdown(cancel_futures=True)


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise  # that of the module mmap keeps the interpreter locked
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return cast("Callable[[int, int, int], int]", madvise)


_madvise = _find_madvise()


def _touch(part: NDArray) -> None:
    assert _madvise is not None
    address = part.ctypes.data
    start, end = address // mmap.PAGESIZE * mmap.PAGESIZE, address + part.nbytes
    for piece in range(start, end, _PIECE_BYTES):
        _madvise(piece, min(_PIECE_BYTES, end - piece), _MADV_POPULATE_WRITE)
