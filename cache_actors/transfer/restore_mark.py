"""A note in a pool's directory that a restore is under way, or was finished.

Whoever decides when to send traffic reads it: a pool that is being refilled answers, but misses
most of what it will know in a minute. It outlives the process that restores, so a restore that
died is seen as unfinished, not as done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cache_actors.atomic_files import replace_text
from cache_actors.transfer.storage import without_password

MARK_NAME = "restore.json"


@dataclass(frozen=True)
class RestoreMark:
    """The last restore into a pool; unfinished while ``finished_ms`` is None."""

    source_url: str
    started_ms: int
    finished_ms: int | None = None
    rows: int = 0


def read_restore_mark(pool_directory: Path) -> RestoreMark | None:
    """The last restore; None when there never was one."""
    path = Path(pool_directory) / MARK_NAME
    try:
        return RestoreMark(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} must describe a restore, but is unreadable ({error}); remove it, or restore "
            "again"
        ) from error


def restore_awaited(pool_directory: Path, *, required: bool) -> str | None:
    """Why the pool should not be given traffic yet; None when nothing is in the way.

    ``required`` asks for a finished restore, so that a new cluster is not taken for ready before
    its restore even began.
    """
    try:
        mark = read_restore_mark(pool_directory)
    except ValueError as error:
        return str(error)
    if mark is None:
        return "the memory waits for `marm memory restore`" if required else None
    if mark.finished_ms is not None:
        return None
    minutes = max(0, time.time_ns() // 1_000_000 - mark.started_ms) / 60_000
    return (
        f"the memory is being restored from {mark.source_url} since {minutes:.0f} min; if that "
        "stopped, run `marm memory restore` again, or give it up with --abandon"
    )


@contextmanager
def restoring(pool_directory: Path, source_url: str) -> Iterator[list[int]]:
    """Marks a restore while it runs; one that raises stays marked as unfinished. What is appended
    to the list is noted as the number of rows."""
    path, mark = (
        Path(pool_directory) / MARK_NAME,
        RestoreMark(without_password(source_url), _now_ms()),
    )
    replace_text(path, json.dumps(asdict(mark)))
    rows: list[int] = []
    yield rows
    done = RestoreMark(mark.source_url, mark.started_ms, _now_ms(), sum(rows))
    replace_text(path, json.dumps(asdict(done)))


def abandon_restore(pool_directory: Path) -> RestoreMark | None:
    """Stop waiting for a restore that will not be finished; the one that was given up."""
    mark = read_restore_mark(pool_directory)
    if mark is None or mark.finished_ms is not None:
        return None
    (Path(pool_directory) / MARK_NAME).unlink(missing_ok=True)
    return mark


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
