from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.group_commit import (
    CommitQueue,
    GroupCommitter,
    LogBackpressureError,
    RecentReports,
    report_identity,
)
from marm.events import TASKS, EventBatch


def reports(keys: list[int], click: float = 1.0) -> EventBatch:
    count = len(keys)
    zeros = np.zeros(count, np.int64)
    labels = np.full((count, len(TASKS)), np.nan, np.float32)
    labels[:, 0] = click
    return EventBatch(
        user_id=np.array(keys, np.int64) % 7,
        item_id=np.array(keys, np.int64),
        timestamp_ms=np.array(keys, np.int64),
        event_key=np.array(keys, np.uint64),
        author_id=zeros,
        tag_id=zeros,
        duration_ms=zeros,
        context_id=zeros.astype(np.int32),
        labels=labels,
    )


def committer_of(path: Path, capacity: int = 1_000) -> GroupCommitter:
    log = EventLog(path)
    return GroupCommitter(log, RecentReports.of_log(log, capacity))


def keys_in(path: Path) -> list[int]:
    return [int(k) for batch in EventLog(path).read(LogOffsets.start()) for k in batch.event_key]


def test_a_group_is_one_segment_and_repeats_are_told(tmp_path: Path) -> None:
    committer = committer_of(tmp_path)
    outcome = committer.commit([reports([1, 2]), reports([]), reports([2, 3, 3])])
    assert outcome == [[True, True], [], [False, True, False]]
    assert committer.commit([reports([3, 1])]) == [[False, False]]
    assert keys_in(tmp_path) == [1, 2, 3]
    assert EventLog(tmp_path).last_segment() == 1
    stats = committer.stats
    assert (stats.appended, stats.duplicates, stats.commits) == (3, 4, 1)


def test_other_feedback_of_the_same_event_is_an_update(tmp_path: Path) -> None:
    committer = committer_of(tmp_path)
    assert committer.commit([reports([1], click=1.0)]) == [[True]]
    assert committer.commit([reports([1], click=0.0)]) == [[True]]
    assert committer.commit([reports([1], click=-0.0)]) == [[False]]
    assert committer.commit([reports([1], click=float("nan"))]) == [[True]]
    assert keys_in(tmp_path) == [1, 1, 1]


def test_identity_ignores_the_clock_and_nothing_else() -> None:
    one = reports([5])
    identity = report_identity(one)
    assert report_identity(replace(one, timestamp_ms=one.timestamp_ms + 1)) == identity
    for name in ("user_id", "item_id"):
        assert report_identity(replace(one, **{name: getattr(one, name) + 1})) != identity
    assert report_identity(replace(one, event_key=one.event_key + np.uint64(1))) != identity
    for task in range(len(TASKS)):
        labels = one.labels.copy()
        labels[0, task] = 0.25
        assert report_identity(replace(one, labels=labels)) != identity
    other_nan = one.labels.copy()
    other_nan.view(np.uint32)[0, 1] = 0xFFC00001
    assert report_identity(replace(one, labels=other_nan)) == identity


def test_repeats_are_recognised_after_a_restart(tmp_path: Path) -> None:
    committer_of(tmp_path).commit([reports(list(range(50)))])
    restarted = committer_of(tmp_path)
    assert restarted.commit([reports([10, 60])]) == [[False, True]]


def test_the_oldest_reports_are_forgotten_first(tmp_path: Path) -> None:
    for start in (0, 5, 10):
        committer_of(tmp_path).commit([reports(list(range(start, start + 5)))])
    recent = RecentReports.of_log(EventLog(tmp_path), capacity=7)
    assert len(recent) == 7
    known = ~recent.unseen(report_identity(reports(list(range(15)))))
    assert np.flatnonzero(known).tolist() == list(range(8, 15))


def test_a_failed_commit_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = committer_of(tmp_path)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            committer.commit([reports([1])])
    assert committer.commit([reports([1])]) == [[True]]
    assert keys_in(tmp_path) == [1]


def test_concurrent_appends_share_a_commit(tmp_path: Path) -> None:
    async def run() -> list[list[bool]]:
        queue = CommitQueue(committer_of(tmp_path), interval_ms=50)
        return await asyncio.gather(
            *(queue.append(reports([key % 40, 100 + key])) for key in range(80))
        )

    outcomes = asyncio.run(run())
    assert sum(map(sum, outcomes)) == 120
    assert sorted(keys_in(tmp_path)) == [*range(40), *range(100, 180)]
    assert EventLog(tmp_path).last_segment() == 1


def test_a_full_group_does_not_wait(tmp_path: Path) -> None:
    async def run() -> None:
        queue = CommitQueue(committer_of(tmp_path), interval_ms=3_600_000, max_events=10)
        await asyncio.gather(*(queue.append(reports([key])) for key in range(10)))
        late = asyncio.create_task(queue.append(reports([10])))
        await asyncio.sleep(0)
        assert queue.num_pending == 1
        await queue.flush()
        assert await late == [True]
        await queue.flush()
        assert queue.num_pending == 0

    asyncio.run(run())
    assert keys_in(tmp_path) == list(range(11))


def test_a_bad_batch_fails_alone(tmp_path: Path) -> None:
    async def run() -> list:
        queue = CommitQueue(committer_of(tmp_path), interval_ms=20)
        bad = replace(reports([1, 2]), item_id=np.zeros(1, np.int64))
        return await asyncio.gather(
            queue.append(reports([1])),
            queue.append(bad),
            queue.append(EventBatch.empty()),
            return_exceptions=True,
        )

    good, refused, empty = asyncio.run(run())
    assert (good, empty) == ([True], [])
    assert isinstance(refused, ValueError)
    assert keys_in(tmp_path) == [1]


def test_a_failed_commit_tells_every_caller_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    async def run() -> None:
        queue = CommitQueue(committer_of(tmp_path), interval_ms=20)
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", no_space)
            failed = await asyncio.gather(
                *(queue.append(reports([key])) for key in range(3)), return_exceptions=True
            )
        assert [type(error) for error in failed] == [OSError] * 3
        assert queue.num_pending == 0
        assert await queue.append(reports([1])) == [True]

    asyncio.run(run())
    assert keys_in(tmp_path) == [1]


def test_too_much_waiting_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        queue = CommitQueue(committer_of(tmp_path), interval_ms=3_600_000, max_pending_events=10)
        accepted = asyncio.create_task(queue.append(reports(list(range(8)))))
        await asyncio.sleep(0)
        with pytest.raises(LogBackpressureError, match="8 events wait for a commit, at most 10"):
            await queue.append(reports([20, 21, 22]))
        await queue.flush()
        assert await accepted == [True] * 8
        too_large_for_ever = list(range(100, 120))  # alone, even this is accepted
        waiting = asyncio.create_task(queue.append(reports(too_large_for_ever)))
        await asyncio.sleep(0)
        await queue.flush()
        assert await waiting == [True] * 20

    asyncio.run(run())


def test_a_caller_that_gives_up_does_not_harm_the_group(tmp_path: Path) -> None:
    async def run() -> None:
        queue = CommitQueue(committer_of(tmp_path), interval_ms=3_600_000)
        gone = asyncio.create_task(queue.append(reports([1])))
        stays = asyncio.create_task(queue.append(reports([2])))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        await queue.flush()
        assert await stays == [True]

    asyncio.run(run())
    assert keys_in(tmp_path) == [1, 2]
