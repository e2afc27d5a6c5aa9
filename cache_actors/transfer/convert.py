"""Copies the rows of a namespace into one of another dtype, while both are in use.

Bucket by bucket and some users at a time, so memory stays bounded however large the namespace is.
Only what the target lacks is written: the target is read first, and an event it holds from the same
training step, or from a later one, is left alone. So a conversion that stopped is simply started
again, one that ran before training ended is repeated to catch up, and rows that training already
computes in the target are safe from their older versions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from marm.addressing import NUM_BUCKETS
from marm.events import merge_feedback
from marm.memory import RAW_STEP, Ack, Memory, Namespace, ScannableMemory, UserRows

_MAX_PENDING_SAVES = 4


@dataclass(frozen=True)
class Converted:
    """What was done for one bucket, or for several together."""

    buckets: int = 0
    users: int = 0
    rows: int = 0  # rows found in the source
    rows_written: int = 0  # rows that the target lacked, or held from an earlier step

    def __add__(self, other: Converted) -> Converted:
        return Converted(
            self.buckets + other.buckets,
            self.users + other.users,
            self.rows + other.rows,
            self.rows_written + other.rows_written,
        )


def convert_namespace(
    source: ScannableMemory, target: Memory, buckets: Iterable[int] = range(NUM_BUCKETS)
) -> Converted:
    """`convert_buckets` to the end; the sum of what was done."""
    return sum(convert_buckets(source, target, buckets), Converted())


def convert_buckets(
    source: ScannableMemory, target: Memory, buckets: Iterable[int] = range(NUM_BUCKETS)
) -> Iterator[Converted]:
    """Copy ``buckets`` of ``source`` to ``target``; yields after each one, once all its rows are
    acknowledged, so that a caller can show progress and remember where to go on.

    Raises:
        ValueError: the namespaces differ in more than dtype, or a row doesn't fit the target's
            dtype. Buckets already yielded stay converted.
    """
    check_convertible(source.namespace, target.namespace)
    return (_convert_bucket(source, target, bucket) for bucket in buckets)


def check_convertible(source: Namespace, target: Namespace) -> None:
    """Raise ValueError unless the two differ in dtype, and in nothing else."""
    if source.dtype == target.dtype or replace(source, dtype=target.dtype) != target:
        raise ValueError(
            "a conversion needs two namespaces that differ in dtype alone, "
            f"got {source.name} and {target.name}"
        )


def convert_rows(rows: NDArray[np.void], source: Namespace, target: Namespace) -> NDArray[np.void]:
    """Rows of ``source`` as rows of ``target``.

    Raises:
        ValueError: a number is beyond what the target's numbers reach (65,504 for float16).
    """
    converted = np.empty(rows.shape, target.row_dtype)
    for field in target.row_dtype.names or ():
        if field != "memory":
            converted[field] = rows[field]
    with np.errstate(over="ignore"):  # refused below, with a better message
        converted["memory"] = rows["memory"]
    bad = np.flatnonzero(~np.isfinite(converted["memory"]).all(axis=(1, 2)))
    if len(bad):
        largest = float(np.abs(rows["memory"][bad[0]].astype(np.float64)).max())
        raise ValueError(
            f"{len(bad)} of {len(rows)} rows of {source.name} don't fit {target.name}: event "
            f"{rows['event_key'][bad[0]]} reaches {largest:g}, the limit is "
            f"{np.finfo(target.memory_dtype).max:g}; keep these rows in float32"
        )
    return converted


def _convert_bucket(source: ScannableMemory, target: Memory, bucket: int) -> Converted:
    done = Converted(buckets=1)
    pending: deque[Ack] = deque()
    for found in source.scan(bucket):
        held = _held_rows(target, found)
        owners, rows = _missing(found, held)
        done += Converted(0, len(found.user_ids), len(found.rows), len(rows))
        if not len(rows):
            continue
        converted = convert_rows(rows, source.namespace, target.namespace)
        pending.append(target.save(owners, converted))
        if len(pending) > _MAX_PENDING_SAVES:
            pending.popleft().wait()
    while pending:
        pending.popleft().wait()
    return done


def _held_rows(target: Memory, found: UserRows) -> UserRows:
    """Everything ``target`` holds of the users of ``found``."""
    n = int(found.counts.max(initial=0)) + 1
    while True:
        held = target.fetch(found.user_ids, n)
        if int(held.counts.max(initial=0)) < n:
            return held
        n *= 2  # the target has rows that the source lacks


def _missing(found: UserRows, held: UserRows) -> tuple[NDArray[np.int64], NDArray[np.void]]:
    """Rows of ``found`` to write over ``held``, and their users."""
    user = np.repeat(np.arange(len(found.user_ids)), found.counts)
    position = _same_event(user, found, held)
    is_held = position >= 0
    same = held.rows[position[is_held]]
    mine = found.rows[is_held]
    is_later = np.ones(len(user), bool)
    is_later[is_held] = mine["written_step"] > same["written_step"]
    tells_more = np.zeros(len(user), bool)
    merged = merge_feedback(same["feedback"], mine["feedback"])
    tells_more[is_held] = merged != same["feedback"]
    wanted = is_later | tells_more
    rows = found.rows[wanted]
    # A raw row brings its feedback along and leaves the memory that the target has.
    is_feedback_only = ~is_later[wanted]
    rows["written_step"][is_feedback_only] = RAW_STEP
    rows["written_s"][is_feedback_only] = 0
    rows["memory"][is_feedback_only] = 0
    return found.user_ids[user[wanted]], rows


def _same_event(user: NDArray[np.int64], found: UserRows, held: UserRows) -> NDArray[np.int64]:
    """For each row of ``found``, the position in ``held.rows`` of the same event, or -1."""
    held_user = np.repeat(np.arange(len(held.user_ids)), held.counts)
    users = np.concatenate([held_user, user])
    stamps = np.concatenate([held.rows["timestamp_ms"], found.rows["timestamp_ms"]])
    keys = np.concatenate([held.rows["event_key"], found.rows["event_key"]])
    # Stable: a held row comes right before the found row of the same event.
    order = np.lexsort((keys, stamps, users))
    is_repeat = (
        (np.diff(users[order]) == 0)
        & (np.diff(stamps[order]) == 0)
        & (keys[order][1:] == keys[order][:-1])
    )
    position = np.full(len(user), -1, np.int64)
    position[order[1:][is_repeat] - len(held_user)] = order[:-1][is_repeat]
    return position
