"""The metrics of a run as a JSON file, for people and for plots."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cache_actors.atomic_files import replace_text
from train.daily import DayTable
from train.predictions import Figures


@dataclass(frozen=True)
class MetricsReport:
    """What the file holds; a figure that is not known is null there.

    Attributes:
        evaluated_ms: the first and the last time of the evaluated part of the log; None for none.
        total: figures of the evaluated part by stage and task; empty until the run has ended.
        days: figures of every day of the stream, closed ones only until the run has ended.
        late_events: events that came after their day was closed, and count on no day.
    """

    evaluated_ms: tuple[int, int] | None
    total: dict[str, Figures] = field(default_factory=dict)
    days: DayTable = field(default_factory=dict)
    late_events: int = 0


def write_metrics(path: Path, report: MetricsReport) -> None:
    """Replace the file in ``path`` at once."""
    replace_text(path, json.dumps(_known(asdict(report)), allow_nan=False, indent=1))


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
