"""Whatever the batch sizes, the owners and the interruptions: the same events in the same order."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.addressing import user_bucket
from marm.events import TASKS, EventBatch

appends = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=25),
    min_size=1,
    max_size=6,
)
"""For each append, the user and the timestamp of each event; ties are frequent."""


@dataclass(frozen=True)
class Phase:
    """Some workers read for a while, then their offsets are merged and saved."""

    num_workers: int
    max_events: int
    num_batches: int
    appended_before: list[tuple[int, int]]


phases = st.lists(
    st.builds(
        Phase,
        num_workers=st.integers(1, 4),
        max_events=st.integers(1, 20),
        num_batches=st.integers(0, 4),
        appended_before=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=5),
    ),
    max_size=5,
)


def make_events(pairs: list[tuple[int, int]], first_key: int) -> EventBatch:
    count = len(pairs)
    keys = first_key + np.arange(count)
    labels = np.full((count, len(TASKS)), np.nan, np.float32)
    labels[:, 0] = keys
    return EventBatch(
        user_id=np.array([user for user, _ in pairs], np.int64),
        item_id=keys,
        timestamp_ms=np.array([timestamp for _, timestamp in pairs], np.int64),
        event_key=keys[::-1].astype(np.uint64),
        author_id=keys,
        tag_id=keys,
        duration_ms=keys,
        context_id=keys.astype(np.int32),
        labels=labels,
    )


class ModelLog:
    """The expected order: appends one after the other, each in (timestamp, key) order."""

    def __init__(self, path: Path, max_segment_events: int) -> None:
        self.log = EventLog(path, max_segment_events)
        self.buckets: list[int] = []
        self.items: list[int] = []

    def append(self, pairs: list[tuple[int, int]]) -> None:
        events = make_events(pairs, first_key=len(self.items))
        self.log.append(events)
        ordered = events.take(np.lexsort((events.event_key, events.timestamp_ms)))
        self.items += ordered.item_id.tolist()
        self.buckets += user_bucket(ordered.user_id).tolist() if len(ordered) else []

    def items_of(self, buckets: set[int]) -> list[int]:
        return [i for i, b in zip(self.items, self.buckets, strict=True) if b in buckets]


@settings(max_examples=60, deadline=None)
@given(appends, st.integers(1, 10), st.integers(1, 30))
def test_resuming_after_every_batch_changes_nothing(
    pairs_of: list[list[tuple[int, int]]], max_segment_events: int, max_events: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = ModelLog(Path(directory), max_segment_events)
        for pairs in pairs_of:
            model.append(pairs)
        offsets, got = LogOffsets.start(), []
        while (batch := (reader := model.log.reader(offsets)).next(max_events)) is not None:
            got += batch.item_id.tolist()
            assert batch.labels[:, 0].tolist() == batch.item_id.tolist()
            assert len(batch) == max_events or len(got) == len(model.items)
            offsets = LogOffsets.from_json(reader.offsets.to_json())
            assert model.log.num_events(offsets) == len(model.items) - len(got)
        assert got == model.items
        assert offsets == model.log.end()


@settings(max_examples=60, deadline=None)
@given(appends, phases, st.integers(1, 40))
def test_changing_owners_neither_loses_nor_repeats_nor_reorders(
    pairs_of: list[list[tuple[int, int]]], plan: list[Phase], max_segment_events: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = ModelLog(Path(directory), max_segment_events)
        for pairs in pairs_of:
            model.append(pairs)
        offsets, got = LogOffsets.start(), []
        for phase in [*plan, Phase(3, 5, 1_000, [])]:
            model.append(phase.appended_before)
            owned = [np.arange(r, 256, phase.num_workers) for r in range(phase.num_workers)]
            readers = [model.log.reader(offsets, buckets) for buckets in owned]
            for _ in range(phase.num_batches):
                batches = [reader.next(phase.max_events) for reader in readers]
                got += [int(i) for batch in batches if batch is not None for i in batch.item_id]
                if not any(batches):
                    break
            offsets = LogOffsets.merge([reader.offsets for reader in readers], owned)
        assert sorted(got) == sorted(model.items)
        bucket_of = dict(zip(model.items, model.buckets, strict=True))
        for bucket in set(model.buckets):
            assert [item for item in got if bucket_of[item] == bucket] == model.items_of({bucket})
