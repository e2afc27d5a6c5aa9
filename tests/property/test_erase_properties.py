"""Whatever is appended, read and erased in whatever order: readers see exactly what is left."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_actors.event_log.erase import erase_users
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.addressing import mix64, user_bucket
from marm.events import TASKS, EventBatch

NEIGHBOURS = np.flatnonzero(user_bucket(np.arange(3_000)) == 7)[:5].tolist()
"""Users of one bucket, whose events of one millisecond only their keys tell apart."""

users = st.sampled_from([*NEIGHBOURS, -3, 0])
times = st.integers(1, 12)
appended = st.lists(st.tuples(users, times), min_size=1, max_size=30)
erased = st.dictionaries(users, times, min_size=1, max_size=4)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), appended),
        st.tuples(st.just("read"), st.integers(1, 15)),
        st.tuples(st.just("erase"), erased),
    ),
    max_size=12,
)


def events_of(pairs: list[tuple[int, int]], first_item: int) -> EventBatch:
    count = len(pairs)
    items = np.arange(first_item, first_item + count)
    # Keys are in no order, and collide in time, so that only file order tells rows apart.
    keys = mix64(items)
    zeros = np.zeros(count, np.int64)
    return EventBatch(
        user_id=np.array([user for user, _ in pairs]),
        item_id=items,
        timestamp_ms=np.array([time for _, time in pairs]),
        event_key=keys,
        author_id=zeros,
        tag_id=zeros,
        duration_ms=zeros,
        context_id=zeros.astype(np.int32),
        labels=np.zeros((count, len(TASKS)), np.float32),
    )


@settings(max_examples=60, deadline=None)
@given(steps, st.integers(1, 9))
def test_readers_see_what_is_left(plan: list[tuple[str, object]], max_part: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        log = EventLog(path, max_part)
        log.append(events_of([(0, 1)], 0))
        waiting = [(0, 1, 0)]  # (user, time, item), in the order of the log
        until: dict[int, int] = {}
        offsets, next_item = LogOffsets.start(), 1
        for kind, what in plan:
            if kind == "append":
                assert isinstance(what, list)
                events = events_of(what, next_item)
                next_item += len(events)
                log.append(events)
                order = np.lexsort((events.event_key, events.timestamp_ms))
                waiting += [(*what[i], int(events.item_id[i])) for i in order]
            elif kind == "erase":
                assert isinstance(what, dict)
                erase_users(path, what)
                for user, time in what.items():
                    until[user] = max(time, until.get(user, time))
            else:
                assert isinstance(what, int)
                left = [one for one in waiting if one[1] > until.get(one[0], 0)]
                reader = log.reader(offsets)
                batch = reader.next(what)
                got = [] if batch is None else batch.item_id.tolist()
                assert got == [item for _, _, item in left[:what]]
                offsets = LogOffsets.from_json(reader.offsets.to_json())
                waiting = left[what:]
        left = [item for user, time, item in waiting if time > until.get(user, 0)]
        rest = [int(i) for batch in log.read(offsets) for i in batch.item_id]
        assert rest == left
        if until:
            erase_users(path, until)
            for file in (path / "segments").rglob("*.parquet"):
                if file.is_file():
                    table = pq.ParquetFile(file).read()
                    for user, time, bucket in zip(
                        table.column("user_id").to_pylist(),
                        table.column("timestamp_ms").to_pylist(),
                        table.column("bucket").to_pylist(),
                        strict=True,
                    ):
                        assert bucket == -1 or time > until.get(user, 0)
            assert EventLog(path).num_events(offsets) == len(left)
