"""Finding and copying rows: from index records to packed rows of a batch of users.

Two ways lead to the same rows. `gather_batch` works on columns of all users at once; `gather_one`
on plain integers, which is faster for a single user. Both copy inside the read transaction, and
check every row they copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.lookup import UserState
from cache_actors.store.records import (
    CHECK,
    COUNT_MASK,
    HEAD_WORDS,
    START_SHIFT,
    Flag,
    Record,
    RecordBatch,
)
from cache_actors.store.row_file import MappedRows, RowFile, row_sums
from cache_actors.store.rules import ReadRules
from marm.addressing import user_bucket

_WORD_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Gathered:
    """Rows as stored, of users in the order asked for."""

    rows: NDArray[np.void]  # [R], opaque
    counts: NDArray[np.int64]  # [U]
    state: NDArray[np.uint8]  # [U]


def gather_batch(
    batch: RecordBatch,
    user_ids: NDArray[np.int64],
    n: int,
    before_ms: NDArray[np.int64] | None,
    file: RowFile,
    rules: ReadRules,
    now_s: int,
) -> Gathered:
    """Every user's newest ``n`` rows before a time."""
    state = user_states(batch, user_ids, rules, now_s)
    num_extents = np.where(state_gives_rows(state), batch.num_extents, 0)
    owner = np.repeat(np.arange(len(user_ids)), num_extents)
    first_extent = np.cumsum(num_extents) - num_extents
    position = np.arange(len(owner)) - first_extent[owner] + batch.starts[owner] + HEAD_WORDS
    extents = batch.words[position]
    start = (extents >> np.uint64(START_SHIFT)).astype(np.int64)
    count = (extents & np.uint64(COUNT_MASK)).astype(np.int64)
    mapped = file.at_least(int((start + count).max(initial=0)))
    before_extent = np.cumsum(count) - count  # rows of all users that come before an extent
    total = np.bincount(owner, count, len(user_ids)).astype(np.int64)
    before_user = np.cumsum(total) - total
    end = total.copy()
    if before_ms is not None:
        for index in np.flatnonzero((batch.newest_ms >= before_ms) & (total > 0)).tolist():
            mine = slice(first_extent[index], first_extent[index] + num_extents[index])
            bound = int(before_ms[index])
            end[index] = rows_before(mapped, start[mine].tolist(), count[mine].tolist(), bound)
    limit = rules.max_rows_per_user
    begin = np.maximum(0, end - n)
    if limit is not None:
        begin = np.minimum(np.maximum(begin, total - limit), end)
    # The wanted rows begin..end of each user, as a part of each extent.
    offset = before_extent - before_user[owner]
    low = np.clip(begin[owner] - offset, 0, count)
    length = np.clip(end[owner] - offset, 0, count) - low
    np.maximum(length, 0, out=length)
    places = np.repeat(start + low - (np.cumsum(length) - length), length)
    places += np.arange(len(places))
    rows, checks = mapped.opaque.take(places), mapped.checks.take(places)
    counts = np.where(state_gives_rows(state), end - begin, 0)
    return _checked(rows, checks, counts, user_ids, state)


def gather_one(
    record: Record, user_id: int, n: int, before_ms: int | None, file: RowFile, limit: int | None
) -> tuple[memoryview, NDArray[np.uint64]]:
    """One user's newest ``n`` rows before a time, as bytes, and their check words."""
    spans, count = find_one(record, n, before_ms, file, limit)
    out = memoryview(np.empty(count * file.row_bytes, np.uint8))  # type: ignore[arg-type]
    return out, copy_spans(spans, file, out)


def find_one(
    record: Record, n: int, before_ms: int | None, file: RowFile, limit: int | None
) -> tuple[list[tuple[int, int]], int]:
    """Where a user's newest ``n`` rows before a time are: runs (first place, rows), oldest first;
    and how many rows that is."""
    if not record.extents:
        return [], 0
    starts = [extent.start for extent in record.extents]
    counts = [extent.count for extent in record.extents]
    mapped = file.at_least(max(map(int.__add__, starts, counts)))
    newer, missing = 0, n
    if before_ms is not None and record.newest_ms >= before_ms:
        newer = sum(counts) - rows_before(mapped, starts, counts, before_ms)
    if limit is not None:
        missing = min(n, max(0, limit - newer))
    wanted = missing
    spans: list[tuple[int, int]] = []
    for start, count in zip(reversed(starts), reversed(counts), strict=True):
        if missing <= 0:
            break
        hidden = min(newer, count)
        newer -= hidden
        length = min(count - hidden, missing)
        if length:
            spans.append((start + count - hidden - length, length))
            missing -= length
    spans.reverse()
    return spans, wanted - max(missing, 0)


def copy_spans(spans: list[tuple[int, int]], file: RowFile, out: memoryview) -> NDArray[np.uint64]:
    """Copy runs of rows into ``out``; their check words."""
    mapped, row_bytes = file.mapped, file.row_bytes
    data, checks = mapped.data, mapped.checks
    position = 0
    parts = []
    for first, length in spans:
        size = length * row_bytes
        out[position : position + size] = data[first * row_bytes : first * row_bytes + size]
        parts.append(checks[first : first + length])
        position += size
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def are_sound(words: NDArray[np.uint64], checks: NDArray[np.uint64], user_id: int) -> bool:
    """Whether every row of one user passes its check."""
    expected = np.uint64((CHECK + user_id) & _WORD_MASK)
    return bool((row_sums(words) + checks == expected).all())


def user_states(
    batch: RecordBatch, user_ids: NDArray[np.int64], rules: ReadRules, now_s: int
) -> NDArray[np.uint8]:
    """`UserState` of each user, as far as the index tells."""
    state = np.zeros(len(user_ids), np.uint8)
    state[(batch.flags & Flag.EVICTED) != 0] = UserState.EVICTED
    state[batch.absent] = UserState.ABSENT
    if rules.ttl_s is not None:
        state[batch.written_s + rules.ttl_s < now_s] = UserState.ABSENT
    state[batch.damaged] = UserState.DAMAGED
    if not rules.owns_all:
        state[~rules.owned[user_bucket(user_ids)]] = UserState.ELSEWHERE
    return state


def state_gives_rows(state: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which users' stored rows may be given."""
    return (state == UserState.FOUND) | (state == UserState.EVICTED)


def rows_before(mapped: MappedRows, starts: list[int], counts: list[int], before_ms: int) -> int:
    """How many rows of one user's extents are older than a time."""
    times = mapped.times
    low, high = 0, len(starts)  # the first extent whose first row is not older
    while low < high:
        middle = (low + high) // 2
        if times[starts[middle]] < before_ms:
            low = middle + 1
        else:
            high = middle
    if not low:
        return 0
    last = low - 1
    inside = times[starts[last] : starts[last] + counts[last]]
    return sum(counts[:last]) + int(np.searchsorted(inside, before_ms))


def _checked(
    rows: NDArray[np.void],
    checks: NDArray[np.uint64],
    counts: NDArray[np.int64],
    user_ids: NDArray[np.int64],
    state: NDArray[np.uint8],
) -> Gathered:
    """Leave out rows that fail their check."""
    if not len(rows):
        return Gathered(rows, counts, state)
    words = rows.view(np.uint64).reshape(len(rows), -1)
    salt = np.repeat(user_ids.view(np.uint64) + np.uint64(CHECK), counts)
    sound = row_sums(words) + checks == salt
    if sound.all():
        return Gathered(rows, counts, state)
    owner = np.repeat(np.arange(len(user_ids)), counts)
    state = state.copy()
    state[owner[~sound]] = UserState.DAMAGED
    kept = np.bincount(owner[sound], minlength=len(user_ids)).astype(np.int64)
    return Gathered(rows[sound], kept, state)
