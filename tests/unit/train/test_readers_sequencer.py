from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from marm.addressing import event_key
from marm.events import EventBatch
from train.data.ingest import sequence
from train.data.ingest_report import IngestError, IngestReport
from train.data.sequencer import Sequencer, spread_ties
from train.data.staged_rows import PROBLEM, SORT_KEY, clean, split_tallies, tally_rows

T0_MS = 1_600_000_000_000


def staged(users: list[int], items: list[int], times: list[int]) -> pa.Table:
    table = pa.table(
        {
            "user_id": users,
            "item_id": items,
            "timestamp": pa.array(np.asarray(times) + T0_MS, pa.int64()),
            "long_view": [float(n % 2) for n in range(len(users))],
        }
    )
    rows, _ = split_tallies(clean(table, "ms", 0))
    return rows.sort_by([(name, "ascending") for name in SORT_KEY])


def run(rows: pa.Table, cuts: list[int]) -> tuple[EventBatch, Sequencer]:
    sequencer = Sequencer()
    edges = [0, *cuts, rows.num_rows]
    parts = [sequencer.push(rows.slice(a, b - a)) for a, b in pairwise(edges)]
    parts.append(sequencer.finish())
    return EventBatch.concat(parts), sequencer


def slow_reference(rows: pa.Table) -> list[tuple[int, int, int]]:
    """(time, user, item) by the definition, one row at a time."""
    seen: set[tuple[int, int, int]] = set()
    last: dict[int, int] = {}
    result = []
    for row in rows.to_pylist():
        key = (row["timestamp_ms"], row["user_id"], row["item_id"])
        if key in seen:
            continue
        seen.add(key)
        time = max(row["timestamp_ms"], last.get(row["user_id"], -1) + 1)
        last[row["user_id"]] = time
        result.append((time, row["user_id"], row["item_id"]))
    return sorted(result)


def triples(events: EventBatch) -> list[tuple[int, int, int]]:
    columns = (events.timestamp_ms, events.user_id, events.item_id)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_definition_wherever_the_input_is_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 200))
    span = int(rng.choice([3, 20, 500]))  # from nearly all ties to hardly any
    rows = staged(
        rng.integers(1, 5, count).tolist(),
        rng.integers(1, 6, count).tolist(),
        rng.integers(0, span, count).tolist(),
    )
    cuts = sorted(rng.integers(0, count + 1, int(rng.integers(0, 8))).tolist())
    events, sequencer = run(rows, cuts)
    assert triples(events) == slow_reference(rows)
    assert sequencer.num_duplicates == count - len(events)
    whole, _ = run(rows, [])
    np.testing.assert_array_equal(events.event_key, whole.event_key)
    np.testing.assert_array_equal(events.labels, whole.labels)
    for user in np.unique(events.user_id):
        assert np.all(np.diff(events.timestamp_ms[events.user_id == user]) > 0)


def test_keys_belong_to_the_times_that_are_stored() -> None:
    events, sequencer = run(staged([1, 1, 1], [7, 8, 7], [0, 0, 0]), [])
    assert events.timestamp_ms.tolist() == [T0_MS, T0_MS + 1]
    assert events.item_id.tolist() == [7, 8]  # the order of the source
    expected = event_key(events.user_id, events.item_id, events.timestamp_ms)
    np.testing.assert_array_equal(events.event_key, expected)
    assert (sequencer.num_duplicates, sequencer.num_spread) == (1, 1)


def test_a_long_tie_does_not_overtake_later_events_of_others() -> None:
    rows = staged([1] * 10 + [2, 2], list(range(12)), [0] * 10 + [4, 30])
    for cut in range(13):
        events, _ = run(rows, [cut])
        assert np.all(np.diff(events.timestamp_ms) >= 0)
        assert events.user_id.tolist()[5:7] in ([1, 2], [2, 1])


def test_spreading_extreme_times_does_not_overflow() -> None:
    users = np.array([1, 1, 2, 2], np.int64)
    times = np.array([0, 0, 2**62, 2**62], np.int64)
    spread = spread_ties(users, times, np.zeros(4, np.int64))
    assert spread.tolist() == [0, 1, 2**62, 2**62 + 1]


def test_rows_out_of_order_are_a_bug_that_shows() -> None:
    rows = staged([1, 2], [1, 2], [0, 5])
    with pytest.raises(AssertionError, match="time order"):
        Sequencer().push(pa.concat_tables([rows.slice(1), rows.slice(0, 1)]))


@pytest.mark.parametrize("piece_rows", [1, 7, 1000])
def test_batches_and_counts_do_not_depend_on_pieces(piece_rows: int) -> None:
    rng = np.random.default_rng(3)
    rows = staged(
        rng.integers(1, 9, 300).tolist(),
        rng.integers(1, 9, 300).tolist(),
        rng.integers(0, 99, 300).tolist(),
    )
    pieces = [tally_rows({"rows": 310, "dropped:no_label": 10})]
    pieces += [rows.slice(start, piece_rows) for start in range(0, 300, piece_rows)]
    report = IngestReport("parquet", ["x"])
    batches = list(sequence(pieces, report, portion_rows=40, max_events=50))
    assert max(len(batch) for batch in batches) <= 50
    assert triples(EventBatch.concat(batches)) == slow_reference(rows)
    report.rows_kept = sum(len(batch) for batch in batches)
    assert report.rows_read == report.rows_kept + sum(report.dropped.values())


def test_a_problem_in_a_block_is_raised_with_its_words() -> None:
    with pytest.raises(IngestError, match="disk on fire"):
        list(sequence([tally_rows({f"{PROBLEM}disk on fire": 1})], IngestReport("parquet", [])))
