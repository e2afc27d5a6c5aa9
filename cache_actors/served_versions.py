"""Which versions of a variant have served, in order: what rolling back goes by.

Servers note a version when it goes live. The notes are hints: a lost one costs a rollback nothing
but precision, so several servers may write at once, and a home they may not write to is no error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cache_actors.atomic_files import write_hint

SERVED_FILE = "served.json"
MAX_NOTES = 100


def read_served(directory: Path) -> list[int]:
    """Versions in the order in which they went live; empty when nothing readable was noted."""
    try:
        noted = json.loads((directory / SERVED_FILE).read_text(encoding="utf-8"))["versions"]
        return [int(version) for version in noted]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def note_served(directory: Path, version: int) -> None:
    """Note that ``version`` went live, unless the last note says so already."""
    served = read_served(directory)
    if served[-1:] == [version]:
        return
    text = json.dumps({"versions": [*served, version][-MAX_NOTES:]})
    write_hint(directory / SERVED_FILE, text)


def served_before(served: Sequence[int], current: int) -> list[int]:
    """Distinct versions that served before ``current`` first did, the last one first.

    Counted from the first time, so that rolling back twice goes two versions back instead of
    forward again to the version that was rolled back.
    """
    earlier = served[: served.index(current)] if current in served else served
    return list(dict.fromkeys(reversed(earlier)))
