"""Will the tables of a run fit? Asked before they are allocated, as the system would not refuse.

Linux hands out more memory than there is and ends a process when it is used, without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from marm.config import ModelConfig
from marm.error_vectors import error_table_bytes
from marm.item_stats import stats_bytes
from marm.tables import table_bytes

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_GIB = 1 << 30


class TableMemoryError(RuntimeError):
    """The tables of a run need more memory than there is."""


def needed_bytes(
    models: Sequence[ModelConfig], num_workers: int = 1, num_shards: int = 1, num_gathering: int = 1
) -> int:
    """What embedding tables and those of errors, their optimisers and item statistics take in
    ``num_workers`` workers, with the copies of the largest model that a checkpoint or a publication
    makes.

    One copy is counted for each worker that has all rows. Where ``num_shards`` workers share them,
    ``num_gathering`` of those counted (worker 0, or none) gather all rows and copy them.
    """
    own, whole = (
        [
            table_bytes(model, shards)
            + stats_bytes(model.num_slots, len(model.tasks))
            + error_table_bytes(model)
            for model in models
        ]
        for shards in (num_shards, 1)
    )
    copies = num_workers if num_shards == 1 else 2 * num_gathering
    return sum(own) * num_workers + max(whole) * copies


def require_table_memory(
    models: Sequence[ModelConfig],
    available: int | None,
    num_workers: int = 1,
    num_shards: int = 1,
    num_gathering: int = 1,
) -> None:
    """Refuse tables that do not fit.

    Args:
        models: the models of the run.
        available: bytes free for ``num_workers`` workers together; None: not known, nothing is
            refused.
        num_workers: workers that share them.
        num_shards: workers of the run that a table's rows are spread over; 1: each has all of them.
        num_gathering: of ``num_workers``, those that gather shared rows: whether worker 0 is there.

    Raises:
        TableMemoryError: with what is needed, what is there, and what to lower.
    """
    needed = needed_bytes(models, num_workers, num_shards, num_gathering)
    if available is None or needed <= available:
        return
    sizes = ", ".join(
        f"{model.stage} {model.num_slots:,} rows of {model.feature_dim}" for model in models
    )
    raise TableMemoryError(
        f"the tables of {num_workers} worker(s) ({sizes}) need {needed:,} bytes "
        f"({needed / _GIB:.1f} GiB), but {available:,} ({available / _GIB:.1f} GiB) are available; "
        "lower num_slots or feature_dim, train fewer stages or workers at a time, or use a larger "
        "machine"
    )


def device_bytes(device: str) -> int | None:
    """Bytes free on ``device`` (``cpu`` or ``cuda``) now; None when it is not known."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return available_bytes()


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Bytes that this process may still use: what the machine has left, or its container (cgroup
    v2) if that is less. None where the system says neither."""
    known = [size for size in (_machine_bytes(meminfo), _cgroup_bytes(cgroup)) if size is not None]
    return min(known, default=None)


def _machine_bytes(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024
    return None


def _cgroup_bytes(cgroup: Path) -> int | None:
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
        stat = (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    if limit == "max":
        return None
    counts = dict(line.split() for line in stat)
    # Cached files count as used, and are given up when memory is wanted.
    return int(limit) - used + int(counts.get("inactive_file", 0))
