"""What an ingest did: every row that was read is kept, dropped for a reason, or repaired."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


class IngestError(ValueError):
    """A source that can't be ingested; the message says what is wrong and what to do."""


@dataclass
class IngestReport:
    """Counts of one ingest. ``rows_read == rows_kept + sum(dropped.values())``."""

    format: str
    files: list[str]
    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # rows, by reason
    repaired: dict[str, int] = field(default_factory=dict)  # values, by what was done
    items_added: int = 0  # new or changed in the item catalog
    segments: list[int] = field(default_factory=list)  # numbers in the event log
    first_timestamp_ms: int | None = None
    last_timestamp_ms: int | None = None
    notes: list[str] = field(default_factory=list)

    def count(self, kind: str, amount: int) -> None:
        """Add a tally, named as in `train.data.staged_rows`, to its place."""
        group, _, reason = kind.partition(":")
        if group == "rows":
            self.rows_read += amount
        elif group == "dropped":
            self.dropped[reason] = self.dropped.get(reason, 0) + amount
        elif group == "repaired":
            self.repaired[reason] = self.repaired.get(reason, 0) + amount
        else:
            raise AssertionError(f"unknown tally {kind!r}")

    def to_dict(self) -> dict[str, Any]:
        """This report as plain JSON values."""
        return asdict(self)
