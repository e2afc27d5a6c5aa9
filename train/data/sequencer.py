"""Staged rows in time order to events: duplicates out, and no two events of a user at one instant.

Two events of a user in the same millisecond could not see each other (`marm.events.EventBatch`),
but sources with coarse clocks hold many. So ties of a user are spread: in the order of the source,
each event is at least 1 ms after the one before it.

The input is cut only between instants. That makes every duplicate and every tie local to a cut, so
it does not matter where blocks of the input end. What crosses a cut is carried: the last instant of
a user whose spread events reached beyond it, and those events themselves, until time catches up.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from marm.addressing import event_key
from marm.events import EVENT_DTYPES, TASKS, EventBatch


class Sequencer:
    """Takes staged rows sorted by ``SORT_KEY``, gives events in global time order.

    Memory: the rows of the last `push`, of the newest instant, and of events that were spread
    beyond it.
    """

    def __init__(self) -> None:
        self.num_duplicates = 0
        self.num_spread = 0
        self._waiting = EventBatch.empty()  # rows of the newest instant, it may go on
        self._ahead = EventBatch.empty()  # finished events later than what was given out
        self._busy_users = np.empty(0, np.int64)  # sorted; users of ``_ahead``
        self._busy_until = np.empty(0, np.int64)  # their last instants

    def push(self, rows: pa.Table) -> EventBatch:
        """Events that are complete after ``rows``, later than all that were given out before."""
        batch = EventBatch.concat([self._waiting, _as_batch(rows)])
        if np.any(np.diff(batch.timestamp_ms) < 0):
            raise AssertionError("staged rows must arrive in time order")
        if not len(batch):
            return batch
        cut = int(np.searchsorted(batch.timestamp_ms, batch.timestamp_ms[-1]))
        self._waiting = batch.take(slice(cut, None))
        return self._sequence(batch.take(slice(cut)))

    def finish(self) -> EventBatch:
        """The events that are left, after the last `push`."""
        waiting, self._waiting = self._waiting, EventBatch.empty()
        events = EventBatch.concat([self._sequence(waiting), self._ahead])
        self._ahead = EventBatch.empty()
        return events

    def _sequence(self, batch: EventBatch) -> EventBatch:
        if not len(batch):
            return batch
        limit_ms = int(batch.timestamp_ms[-1])
        unique = is_first_of_its_kind(batch)
        self.num_duplicates += int(np.count_nonzero(~unique))
        batch = batch.take(unique)
        order = np.argsort(batch.user_id, kind="stable")  # by user, then time, then source
        batch = batch.take(order)
        floor_ms = self._not_before(batch.user_id)
        times = spread_ties(batch.user_id, batch.timestamp_ms, floor_ms)
        self.num_spread += int(np.count_nonzero(times != batch.timestamp_ms))
        done = EventBatch.concat([self._ahead, _at_times(batch, times)])
        done = done.take(np.lexsort((done.user_id, done.timestamp_ms)))
        cut = int(np.searchsorted(done.timestamp_ms, limit_ms, side="right"))
        self._ahead = done.take(slice(cut, None))
        self._busy_users, last = _last_of_each(self._ahead.user_id)
        self._busy_until = self._ahead.timestamp_ms[last]
        return done.take(slice(cut))

    def _not_before(self, user_id: NDArray[np.int64]) -> NDArray[np.int64]:
        """The instant before which each user has no room."""
        if not len(self._busy_users):
            return np.zeros(len(user_id), np.int64)
        found = np.searchsorted(self._busy_users, user_id).clip(max=len(self._busy_users) - 1)
        is_busy = self._busy_users[found] == user_id
        return np.where(is_busy, self._busy_until[found] + 1, 0)


def is_first_of_its_kind(batch: EventBatch) -> NDArray[np.bool_]:
    """False for a row that repeats an earlier (user, item, timestamp, event id) of ``batch``, which
    is in time order."""
    same_instant = np.diff(batch.timestamp_ms) == 0
    candidates = np.flatnonzero(np.append(same_instant, False) | np.append(False, same_instant))
    columns = (batch.event_key, batch.item_id, batch.user_id, batch.timestamp_ms)
    keys = [column[candidates] for column in columns]
    order = np.lexsort(keys)  # stable: the first of the source stays first
    repeats = np.ones(max(len(order) - 1, 0), np.bool_)
    for key in keys:
        repeats &= key[order][1:] == key[order][:-1]
    first = np.ones(len(batch), np.bool_)
    first[candidates[order[1:][repeats]]] = False
    return first


def spread_ties(
    user_id: NDArray[np.int64], timestamp_ms: NDArray[np.int64], floor_ms: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Strictly increasing times within each user: ``t'[i] = max(t[i], floor[i], t'[i - 1] + 1)``.

    Rows are grouped by user and in time order within; ``floor_ms`` is one value per user.
    """
    if not len(user_id):
        return timestamp_ms
    # t'[i] - i is a running maximum of max(t, floor)[j] - j. Ranks keep the maxima of different
    # users apart without overflow, whatever the times are.
    index = np.arange(len(user_id))
    slack = np.maximum(timestamp_ms, floor_ms) - index
    values, rank = np.unique(slack, return_inverse=True)
    segment = np.cumsum(np.append(True, user_id[1:] != user_id[:-1])) - 1
    running = np.maximum.accumulate(segment * len(values) + rank) - segment * len(values)
    return values[running] + index


def _last_of_each(user_id: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct users, and the last position of each."""
    users, from_end = np.unique(user_id[::-1], return_index=True)
    return users, len(user_id) - 1 - from_end


def _at_times(batch: EventBatch, times: NDArray[np.int64]) -> EventBatch:
    """``batch`` at new times, with the keys of events that brought no id of their own."""
    columns = {name: getattr(batch, name) for name in EVENT_DTYPES}
    derived = event_key(batch.user_id, batch.item_id, times)
    columns |= {
        "timestamp_ms": times,
        "event_key": np.where(batch.event_key == 0, derived, batch.event_key),
    }
    return EventBatch(**columns, labels=batch.labels)


def _as_batch(rows: pa.Table) -> EventBatch:
    return EventBatch(
        **{name: rows.column(name).to_numpy() for name in EVENT_DTYPES},
        labels=np.stack([rows.column(task).to_numpy() for task in TASKS], axis=1),
    )
