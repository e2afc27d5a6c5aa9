"""Whole histories of some users, as the rows that they become: sorted, without repeats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.events import EventBatch
from marm.sequence import enters_sequence


@dataclass(frozen=True)
class Histories:
    """Events of ``U`` users: user ``u`` owns ``events[offsets[u]:offsets[u + 1]]``, oldest first.

    One event per (timestamp, key), and only events that enter the sequence: one event is one row.
    """

    user_ids: NDArray[np.int64]  # [U] in the order asked for
    offsets: NDArray[np.int64]  # [U + 1]
    events: EventBatch

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of events of each user, ``[U]``."""
        return np.diff(self.offsets)

    @property
    def user_row(self) -> NDArray[np.int64]:
        """Position of each event's user, ``[E]``."""
        return np.repeat(np.arange(len(self.user_ids)), self.counts)

    @property
    def from_newest(self) -> NDArray[np.int64]:
        """How many events of the same user come after each event, ``[E]``."""
        return self.offsets[1:][self.user_row] - 1 - np.arange(len(self.events))

    def of_users(self, start: int, end: int) -> Histories:
        """The users at positions ``start`` to ``end``."""
        first, last = int(self.offsets[start]), int(self.offsets[end])
        return Histories(
            self.user_ids[start:end],
            self.offsets[start : end + 1] - first,
            self.events.take(slice(first, last)),
        )

    def select(self, keep: NDArray[np.bool_]) -> Histories:
        """Only the events of a mask ``[E]``, and only users that have any."""
        counts = np.bincount(self.user_row[keep], minlength=len(self.user_ids))
        having = counts > 0
        offsets = np.concatenate([[0], np.cumsum(counts[having])])
        return Histories(self.user_ids[having], offsets, self.events.take(keep))


def gather_histories(
    batches: Iterable[EventBatch],
    user_ids: NDArray[np.int64],
    sequence: str,
    newest: int | None = None,
) -> Histories:
    """The histories of distinct ``user_ids`` in ``batches``; the newest ``newest`` events of each.

    Events that arrived late take their place in time, and repeated reports of an event are one
    event with the feedback of all, which is what a memory makes of them.
    """
    by_id = np.argsort(user_ids)
    ascending = user_ids[by_id]
    parts, owners = [], []
    for batch in batches:
        at = np.minimum(np.searchsorted(ascending, batch.user_id), max(0, len(ascending) - 1))
        mine = ascending[at] == batch.user_id if len(ascending) else np.zeros(len(batch), np.bool_)
        parts.append(batch.take(mine))
        owners.append(by_id[at[mine]] if len(ascending) else at[mine])
    events = EventBatch.concat(parts)
    owner = np.concatenate([*owners, np.empty(0, np.int64)]).astype(np.int64)
    order = np.lexsort((events.event_key, events.timestamp_ms, owner))
    events, owner = _merge_repeats(events.take(order), owner[order])
    entering = enters_sequence(events, sequence)
    events, owner = events.take(entering), owner[entering]
    counts = np.bincount(owner, minlength=len(user_ids))
    histories = Histories(user_ids, np.concatenate([[0], np.cumsum(counts)]), events)
    if newest is None:
        return histories.select(np.ones(len(events), np.bool_))
    return histories.select(histories.from_newest < newest)


def _merge_repeats(
    events: EventBatch, owner: NDArray[np.int64]
) -> tuple[EventBatch, NDArray[np.int64]]:
    """One event per (owner, time, key) of sorted events: the last report, with the feedback of all
    (the maximum of every label merges as `marm.events.merge_feedback` does)."""
    if not len(events):
        return events, owner
    is_first = np.append(
        True,
        (np.diff(owner) != 0)
        | (np.diff(events.timestamp_ms) != 0)
        | (events.event_key[1:] != events.event_key[:-1]),
    )
    if is_first.all():
        return events, owner
    starts = np.flatnonzero(is_first)
    last = np.append(starts[1:], len(events)) - 1
    merged = events.take(last)
    labels = np.fmax.reduceat(events.labels, starts, axis=0)
    columns = {name: getattr(merged, name) for name in merged.__dataclass_fields__}
    return EventBatch(**{**columns, "labels": labels}), owner[last]
