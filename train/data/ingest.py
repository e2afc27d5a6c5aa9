"""Ingest of a published or own log into the event log and item catalog of a home."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from cache_actors.event_log.catalog import append_items, read_catalog
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.segments import MAX_SEGMENT_EVENTS
from cache_actors.home import Home
from marm.events import EventBatch
from marm.items import ItemFeatures
from train.data.column_map import open_parquet
from train.data.ingest_report import IngestError, IngestReport
from train.data.kuairand import open_kuairand
from train.data.movielens import open_movielens
from train.data.ray_prepare import staged_in_order
from train.data.seen_items import SeenItems, changed_items
from train.data.sequencer import Sequencer
from train.data.source import Source
from train.data.source_ledger import SourceLedger, file_fingerprint
from train.data.staged_rows import PROBLEM, split_tallies

FORMATS = ("movielens", "kuairand", "parquet")
PORTION_ROWS = 100_000
"""Rows that are put in order at a time; less than a segment, so that what waits fits beside."""

Progress = Callable[[str, int], None]
"""Told what is going on and how far it is: ("fingerprint", bytes), ("prepare", 0) while Ray Data
reads and sorts, ("write", events), ("commit", events)."""


def ingest(
    home: Home | Path,
    format: str,
    path: str,
    column_map: Mapping[str, str] | None = None,
    *,
    timestamp_unit: str = "auto",
    again: bool = False,
    progress: Progress | None = None,
) -> IngestReport:
    """Append the events of ``path`` to the log of ``home``, and its items to the catalog.

    Needs an initialised Ray. Nothing is added to the log unless everything could be read. A source
    that the log already holds is refused, unless ``again``. Events of one ingest are in global time
    order; they come after what the log held, also when they are older.
    """
    home = home if isinstance(home, Home) else Home(home)
    tell = progress or (lambda stage, amount: None)
    source = open_source_of(format, path, column_map or {}, timestamp_unit)
    fingerprints = {
        str(file): file_fingerprint(file, lambda size: tell("fingerprint", size))
        for file in source.files
    }
    home.create()
    ledger = SourceLedger(home.log)
    ledger.recover()
    if not again:
        ledger.refuse_known(fingerprints)
    report = IngestReport(source.format, list(fingerprints), notes=list(source.notes))
    area = ledger.staging_area()
    try:
        tell("prepare", 0)
        items = _stage_events(source, area, report, tell)
        if not report.rows_kept:
            raise IngestError(_nothing_usable(report))
        tell("commit", report.rows_kept)
        added = changed_items(read_catalog(home.log), items)
        append_items(home.log, added)
        report.items_added = len(added)
        report.segments = ledger.commit(area, fingerprints, {"report": report.to_dict()})
        return report
    except BaseException:
        ledger.abandon(area)
        raise


def open_source_of(
    format: str, path: str, column_map: Mapping[str, str], timestamp_unit: str = "auto"
) -> Source:
    """Find the files of a source and check that they have what its format needs."""
    if format not in FORMATS:
        raise IngestError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "parquet":
        return open_parquet(path, column_map, timestamp_unit)
    if column_map or timestamp_unit != "auto":
        raise IngestError(
            f"columns of {format} are fixed; --map and a timestamp unit go with --format parquet"
        )
    return open_movielens(path) if format == "movielens" else open_kuairand(path)


def sequence(
    pieces: Iterable[pa.Table],
    report: IngestReport,
    portion_rows: int = PORTION_ROWS,
    max_events: int = MAX_SEGMENT_EVENTS,
) -> Iterator[EventBatch]:
    """Events of staged pieces in time order, in batches for one segment each; what happened to the
    rows is counted in ``report``. However the rows were cut into pieces, the events are the same.
    """
    sequencer = Sequencer()
    events = EventBatch.empty()
    for rows in _in_portions(pieces, report, portion_rows):
        yield from _cut(events, max_events)
        events = sequencer.push(rows)
    yield from _cut(EventBatch.concat([events, sequencer.finish()]), max_events)
    if sequencer.num_duplicates:
        report.count("dropped:duplicate", sequencer.num_duplicates)
    if sequencer.num_spread:
        report.count("repaired:timestamp_moved_after_a_tie", sequencer.num_spread)


def _in_portions(
    pieces: Iterable[pa.Table], report: IngestReport, portion_rows: int
) -> Iterator[pa.Table]:
    """Staged events, large pieces cut and small ones gathered; tallies go to ``report``."""
    gathered: list[pa.Table] = []
    for piece in pieces:
        rows, tallies = split_tallies(piece)
        for name, amount in tallies.items():
            if name.startswith(PROBLEM):
                raise IngestError(name.removeprefix(PROBLEM))
            report.count(name, amount)
        for start in range(0, rows.num_rows, portion_rows):
            gathered.append(rows.slice(start, portion_rows))
            if sum(len(part) for part in gathered) >= portion_rows:
                yield pa.concat_tables(gathered)
                gathered = []
    if gathered:
        yield pa.concat_tables(gathered)


def _cut(events: EventBatch, at_most: int) -> Iterator[EventBatch]:
    for start in range(0, len(events), at_most):
        yield events.take(slice(start, start + at_most))


def _stage_events(source: Source, area: Path, report: IngestReport, tell: Progress) -> ItemFeatures:
    """Write all events of a source to a log of their own in ``area``; the items of the source."""
    log = EventLog(area)
    seen = SeenItems(source.items)
    for batch in sequence(staged_in_order(source), report):
        events = seen.complete(batch)
        log.append(events)
        report.rows_kept += len(events)
        first = report.first_timestamp_ms
        report.first_timestamp_ms = int(events.timestamp_ms[0]) if first is None else first
        report.last_timestamp_ms = int(events.timestamp_ms[-1])
        tell("write", report.rows_kept)
    return seen.items()


def _nothing_usable(report: IngestReport) -> str:
    reasons = ", ".join(f"{amount} {reason}" for reason, amount in report.dropped.items())
    return (
        f"none of the {report.rows_read} rows of {', '.join(report.files)} can be used"
        + (f" ({reasons})" if reasons else "")
        + "; check the column map and the timestamp unit"
    )
