"""Finding and copying rows: from index records to packed rows of a batch of users.

Two ways lead to the same rows. `gather_batch` works on columns of all users at once;
`find_one` and `copy_runs` on plain integers, which is faster for a single user. Both copy inside
the read transaction, and check every row they copied.
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
    WORD_BYTES,
    Flag,
    RecordBatch,
)
from cache_actors.store.row_file import MappedRows, RowFile, row_checks
from cache_actors.store.row_merge import expand_runs
from cache_actors.store.rules import ReadRules
from marm.addressing import user_bucket

_WORD_MASK = (1 << 64) - 1


class DamagedBorderError(Exception):
    """Which rows are older than a time can't be told."""


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
            runs = start[mine].tolist(), count[mine].tolist()
            try:
                end[index] = rows_before(mapped, *runs, bound, int(user_ids[index]))
            except DamagedBorderError:
                state[index], end[index] = UserState.DAMAGED, 0
    limit = rules.max_rows_per_user
    begin = np.maximum(0, end - n)
    if limit is not None:
        begin = np.minimum(np.maximum(begin, total - limit), end)
    # The wanted rows begin..end of each user, as a part of each extent.
    offset = before_extent - before_user[owner]
    low = np.clip(begin[owner] - offset, 0, count)
    length = np.clip(end[owner] - offset, 0, count) - low
    np.maximum(length, 0, out=length)
    places = expand_runs(start + low, length)
    rows, checks = mapped.opaque.take(places), mapped.checks.take(places)
    counts = np.where(state_gives_rows(state), end - begin, 0)
    return _checked(rows, checks, counts, user_ids, state)


def find_one(
    words: tuple[int, ...],
    user_id: int,
    n: int,
    before_ms: int | None,
    file: RowFile,
    limit: int | None,
) -> tuple[list[tuple[int, int]], int]:
    """Where a user's newest ``n`` rows before a time are: runs (first place, end), newest first;
    and how many rows that is. ``words`` are the user's record. May raise `DamagedBorderError`."""
    newer = 0
    if before_ms is not None and signed(words[1]) >= before_ms:
        starts = [word >> START_SHIFT for word in words[HEAD_WORDS:]]
        counts = [word & COUNT_MASK for word in words[HEAD_WORDS:]]
        mapped = file.at_least(max(map(int.__add__, starts, counts), default=0))
        newer = sum(counts) - rows_before(mapped, starts, counts, before_ms, user_id)
    wanted = n if limit is None else min(n, max(0, limit - newer))
    runs: list[tuple[int, int]] = []
    missing = wanted
    for position in range(len(words) - 1, HEAD_WORDS - 1, -1):
        if not missing:
            break
        word = words[position]
        start, count = word >> START_SHIFT, word & COUNT_MASK
        if newer:
            hidden = min(newer, count)
            newer -= hidden
            count -= hidden
        if count > missing:
            runs.append((start + count - missing, start + count))
            missing = 0
        elif count:
            runs.append((start, start + count))
            missing -= count
    return runs, wanted - missing


def copy_runs(
    runs: list[tuple[int, int]], count: int, file: RowFile, out: memoryview
) -> list[NDArray[np.uint64]]:
    """Copy the ``count`` rows of runs, newest first, into ``out``, oldest first; their check words
    by run."""
    row_bytes = file.row_bytes
    mapped = file.at_least(max(end for _, end in runs)) if runs else file.mapped
    data, checks = mapped.data, mapped.checks
    end_byte = count * row_bytes
    parts = []
    for first, end in runs:
        start_byte = end_byte - (end - first) * row_bytes
        out[start_byte:end_byte] = data[first * row_bytes : end * row_bytes]
        parts.append(checks[first:end])
        end_byte = start_byte
    return parts


def are_sound(out: memoryview, count: int, checks: list[NDArray[np.uint64]], user_id: int) -> bool:
    """Whether the ``count`` rows of one user pass their checks, taken together: as likely to miss
    damage as one row's check is, and cheaper than row by row."""
    if not count:
        return True
    total = int(np.add.reduce(np.frombuffer(out, np.uint64)))
    total += int(np.add.reduce(checks[0] if len(checks) == 1 else np.concatenate(checks)))
    return (total - count * (CHECK + user_id)) & _WORD_MASK == 0


def signed(word: int) -> int:
    """A word of a record as the signed number that was stored in it."""
    return word - (1 << 64) if word >> 63 else word


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


def rows_before(
    mapped: MappedRows, starts: list[int], counts: list[int], before_ms: int, user_id: int
) -> int:
    """How many rows of one user's extents are older than a time.

    A damaged time may mislead the search, but not unseen: of rows that are in order, only the right
    two neighbours are older and not older.

    Raises:
        DamagedBorderError: one of these neighbours is damaged.
    """
    times = mapped.times
    low, high = 0, len(starts)  # the first extent whose first row is not older
    while low < high:
        middle = (low + high) // 2
        if times[starts[middle]] < before_ms:
            low = middle + 1
        else:
            high = middle
    border = starts[low : low + 1]
    older = 0
    if low:
        last = low - 1
        inside = times[starts[last] : starts[last] + counts[last]]
        split = int(np.searchsorted(inside, before_ms))
        older = sum(counts[:last]) + split
        border.append(starts[last] + split - 1)
        if split < counts[last]:
            border[0:-1] = [starts[last] + split]
    expected = row_checks(mapped.words[border], np.array([user_id], np.int64))
    if (mapped.checks[border] != expected).any():
        raise DamagedBorderError
    return older


def _checked(
    rows: NDArray[np.void],
    checks: NDArray[np.uint64],
    counts: NDArray[np.int64],
    user_ids: NDArray[np.int64],
    state: NDArray[np.uint8],
) -> Gathered:
    """Leave out rows that fail their check."""
    if _are_all_sound(rows, checks, counts, user_ids):
        return Gathered(rows, counts, state)
    words = rows.view(np.uint64).reshape(len(rows), -1)
    sound = row_checks(words, np.repeat(user_ids, counts)) == checks
    owner = np.repeat(np.arange(len(user_ids)), counts)
    state = state.copy()
    state[owner[~sound]] = UserState.DAMAGED
    kept = np.bincount(owner[sound], minlength=len(user_ids)).astype(np.int64)
    return Gathered(rows[sound], kept, state)


def _are_all_sound(
    rows: NDArray[np.void],
    checks: NDArray[np.uint64],
    counts: NDArray[np.int64],
    user_ids: NDArray[np.int64],
) -> bool:
    """Whether the rows of every user pass their checks, taken together."""
    full = counts > 0
    if not full.any():
        return True
    starts = (np.cumsum(counts) - counts)[full]
    words_per_row = rows.dtype.itemsize // WORD_BYTES
    sums = np.add.reduceat(rows.view(np.uint64), starts * words_per_row)
    sums += np.add.reduceat(checks, starts)
    salt = user_ids[full].view(np.uint64) + np.uint64(CHECK)
    return bool((sums == salt * counts[full].view(np.uint64)).all())
