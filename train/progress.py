"""How far a run has got, for whoever watches it from another process."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Progress:
    """A moment of a run."""

    events_seen: int
    step: int
    events_per_s: float
    window: dict[str, dict[str, dict[str, float]]]  # latest metrics by stage and task


def write_progress(path: Path, progress: Progress) -> None:
    """Replace the record in ``path`` atomically."""
    pending = path.with_suffix(f".{os.getpid()}.pending")
    pending.write_text(json.dumps(asdict(progress)))
    pending.replace(path)


def read_progress(path: Path) -> Progress | None:
    """The latest record; None before the first."""
    try:
        return Progress(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
