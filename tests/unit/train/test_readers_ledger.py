from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.addressing import event_key
from marm.events import TASKS, EventBatch
from marm.items import ItemCatalog, ItemFeatures
from train.data.ingest_report import IngestError
from train.data.seen_items import SeenItems, changed_items, latest_known
from train.data.source_ledger import SourceLedger, file_fingerprint


def some_events(count: int, start: int = 0) -> EventBatch:
    ids = np.arange(start, start + count)
    return EventBatch(
        user_id=ids,
        item_id=ids,
        timestamp_ms=ids,
        event_key=event_key(ids, ids, ids),
        author_id=ids,
        tag_id=np.zeros(count, np.int64),
        duration_ms=ids,
        context_id=np.zeros(count, np.int32),
        labels=np.ones((count, len(TASKS)), np.float32),
    )


def staged_segments(ledger: SourceLedger, batches: int) -> Path:
    area = ledger.staging_area()
    for n in range(batches):
        EventLog(area).append(some_events(5, start=5 * n))
    return area


def test_a_commit_appends_to_what_was_there(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append(some_events(3, start=100))
    ledger = SourceLedger(tmp_path)
    area = staged_segments(ledger, 3)
    assert log.num_events() == 3  # nothing shows before the commit
    assert ledger.commit(area, {"x": "f1"}, {}) == [2, 3, 4]
    users = np.concatenate([batch.user_id for batch in log.read(LogOffsets.start())])
    assert users.tolist() == [100, 101, 102, *range(15)]
    assert log.problems == []
    assert not area.exists()


def test_a_source_is_known_by_content(tmp_path: Path) -> None:
    ledger = SourceLedger(tmp_path / "log")
    first, copy, other = (tmp_path / name for name in ("a", "b", "c"))
    first.write_text("rows")
    copy.write_text("rows")
    other.write_text("cows")
    (tmp_path / "log").mkdir()
    ledger.commit(staged_segments(ledger, 1), {str(first): file_fingerprint(first)}, {})
    ledger.refuse_known({str(other): file_fingerprint(other)})
    with pytest.raises(IngestError, match=r"already in the log .* --again"):
        ledger.refuse_known({str(copy): file_fingerprint(copy)})


@pytest.mark.parametrize("already_linked", [0, 1, 3])
def test_an_interrupted_commit_is_finished_by_the_next(tmp_path: Path, already_linked: int) -> None:
    """The state that a process leaves which dies after ``already_linked`` segments."""
    ledger = SourceLedger(tmp_path)
    area = staged_segments(ledger, 3)
    staged = sorted((area / "segments").glob("*.parquet"))
    kept = tmp_path / "kept"
    kept.mkdir()
    for path in staged:
        (kept / path.name).write_bytes(path.read_bytes())
    ledger.commit(area, {"x": "f1"}, {})
    entry = next((tmp_path / "sources").glob("*.json"))
    entry.write_text(entry.read_text().replace('"done"', '"committing"'))
    (area / "segments").mkdir(parents=True)
    for number, path in enumerate(staged, start=1):
        committed = tmp_path / "segments" / f"{number:012d}.parquet"
        if number > already_linked:
            committed.unlink()
            path.write_bytes((kept / path.name).read_bytes())
        elif number == already_linked:  # linked, but the staged name was not removed yet
            os.link(committed, path)
    assert SourceLedger(tmp_path).recover() == 1
    assert SourceLedger(tmp_path).recover() == 0
    users = [batch.user_id for batch in EventLog(tmp_path).read(LogOffsets.start())]
    assert np.concatenate(users).tolist() == list(range(15))


def test_work_that_nobody_finished_is_swept(tmp_path: Path) -> None:
    ledger = SourceLedger(tmp_path)
    old, fresh = ledger.staging_area(), ledger.staging_area()
    long_ago = time.time() - 200_000
    os.utime(old, (long_ago, long_ago))
    ledger.abandon(ledger.staging_area())
    assert not old.exists()
    assert fresh.exists()


def features(*rows: tuple[int, int, int, int]) -> ItemFeatures:
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    return ItemFeatures(*columns)


def rows_of(items: ItemFeatures) -> list[tuple[int, ...]]:
    columns = (items.item_id, items.author_id, items.tag_id, items.duration_ms)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_the_last_known_feature_wins_and_unknown_ones_never_do() -> None:
    items = latest_known(features((2, 5, 0, 1), (1, 1, 1, 0), (2, 0, 7, 0), (2, 6, 0, 0)))
    assert rows_of(items) == [(1, 1, 1, 0), (2, 6, 7, 1)]
    assert rows_of(latest_known(features())) == []


def test_only_changes_reach_the_catalog() -> None:
    known = ItemCatalog(features((1, 1, 1, 1), (2, 2, 2, 0)))
    given = features((1, 0, 1, 1), (2, 0, 2, 9), (3, 0, 0, 0))
    assert rows_of(changed_items(known, given)) == [(2, 2, 2, 9), (3, 0, 0, 0)]


def test_events_are_completed_from_the_side_table() -> None:
    seen = SeenItems(features((0, 9, 9, 9), (1, 0, 8, 7), (50, 1, 1, 1)))
    events = seen.complete(some_events(3))
    assert events.author_id.tolist() == [9, 1, 2]
    assert events.tag_id.tolist() == [9, 8, 0]
    assert events.duration_ms.tolist() == [9, 1, 2]
    assert rows_of(seen.items()) == [(0, 9, 9, 9), (1, 1, 8, 1), (2, 2, 0, 2), (50, 1, 1, 1)]
