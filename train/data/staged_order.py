"""Staged rows of a log that fits in memory, as events in time order: an ingest without Ray."""

from __future__ import annotations

import pyarrow as pa

from marm.events import EventBatch
from train.data.ingest_report import IngestError
from train.data.sequencer import Sequencer
from train.data.staged_rows import PROBLEM, SORT_KEY, split_tallies


def in_order(staged: pa.Table) -> EventBatch:
    """The events of ``staged`` (rows and tallies of `train.data.source.stage` or
    `train.data.staged_rows.clean`) in global time order: duplicates out, ties of a user spread, as
    the ingest does it.

    Raises:
        IngestError: when a part of the source could not be read.
    """
    rows, tallies = split_tallies(staged)
    for name in tallies:
        if name.startswith(PROBLEM):
            raise IngestError(name.removeprefix(PROBLEM))
    sequencer = Sequencer()
    events = sequencer.push(rows.sort_by([(name, "ascending") for name in SORT_KEY]))
    return EventBatch.concat([events, sequencer.finish()])
