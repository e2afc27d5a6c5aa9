"""Background work that yields to requests."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

LOADER_NICE = 19
"""Niceness of a loading thread, the highest: where threads that answer requests want all of the
CPU, it gets a hundredth of it."""


def lower_priority(nice: int = LOADER_NICE) -> None:
    """Let the scheduler prefer every other thread to this one, and to the ones it starts.

    Linux keeps niceness per thread, and threads inherit it, so the OpenMP team of a loading thread
    yields as well. The number of torch's threads is one setting of the whole process, which a
    loader must not lower: requests would be slower from then on. Elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
