"""Finding and copying rows: from index records to packed rows of a batch of users.

Two ways lead to the same rows. `gather_batch` works on columns of all users at once;
`find_one` and `copy_sound_runs` on plain integers, which is faster for a single user. Both copy
inside the read transaction, and check every row they copied.
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
from cache_actors.store.row_file import MappedRows, PlaceRuns, RowFile, row_checks
from cache_actors.store.rules import ReadRules
from marm.addressing import user_bucket

_WORD_MASK = (1 << 64) - 1


Run = tuple[int, int, int]
"""Where an extent begins, the first place wanted of it, and the end of what is wanted."""


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
            extents_of = start[mine].tolist(), count[mine].tolist()
            try:
                end[index] = rows_before(mapped, *extents_of, bound, int(user_ids[index]))
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
    runs = PlaceRuns(start + low, length, low == 0)
    counts = np.where(state_gives_rows(state), end - begin, 0)
    rows = mapped.opaque.take(runs.places)
    if _are_all_sound(rows, counts, user_ids, mapped, runs):
        return Gathered(rows, counts, state)
    return _only_sound(rows, counts, user_ids, mapped, runs, state)


def find_one(
    words: tuple[int, ...],
    user_id: int,
    n: int,
    before_ms: int | None,
    file: RowFile,
    limit: int | None,
) -> tuple[list[Run], int]:
    """Where a user's newest ``n`` rows before a time are, in runs, newest first; and how many rows
    that is. ``words`` are the user's record. May raise `DamagedBorderError`."""
    newer = 0
    if before_ms is not None and signed(words[1]) >= before_ms:
        starts = [word >> START_SHIFT for word in words[HEAD_WORDS:]]
        counts = [word & COUNT_MASK for word in words[HEAD_WORDS:]]
        mapped = file.at_least(max(map(int.__add__, starts, counts), default=0))
        newer = sum(counts) - rows_before(mapped, starts, counts, before_ms, user_id)
    wanted = n if limit is None else min(n, max(0, limit - newer))
    runs: list[Run] = []
    missing = wanted
    for word in words[: HEAD_WORDS - 1 : -1]:
        start, count = word >> START_SHIFT, word & COUNT_MASK
        if newer:
            hidden = min(newer, count)
            newer -= hidden
            count -= hidden
        end = start + count
        if count >= missing:
            if missing:
                runs.append((start, end - missing, end))
            return runs, wanted
        if count:
            runs.append((start, start, end))
            missing -= count
    return runs, wanted - missing


def copy_sound_runs(runs: list[Run], file: RowFile, out: NDArray[np.uint64], user_id: int) -> bool:
    """Copy the rows of one user's runs, newest first, into the words ``out``, oldest first; whether
    they pass their checks. Taken together they are as likely to miss damage as one row's check is,
    and cheaper than row by row."""
    mapped, target = file.mapped, out.data
    source, sums = mapped.data, mapped.sums
    row_words = file.row_words
    end_word, checks = len(out), 0
    for extent, first, end in runs:
        if end > mapped.capacity:
            mapped = file.at_least(end)
            source, sums = mapped.data, mapped.sums
        start_word = end_word - (end - first) * row_words
        target[start_word:end_word] = source[first * row_words : end * row_words]
        checks += sums[end - 1]
        if first > extent:
            checks -= sums[first - 1]
        end_word = start_word
    total = int(np.add.reduce(out)) + checks
    return (total - len(out) // row_words * (CHECK + user_id)) & _WORD_MASK == 0


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
    border, begins = starts[low : low + 1], [True] * len(starts[low : low + 1])
    older = 0
    if low:
        last = low - 1
        inside = times[starts[last] : starts[last] + counts[last]]
        split = int(np.searchsorted(inside, before_ms))
        older = sum(counts[:last]) + split
        if split < counts[last]:
            border, begins = [starts[last] + split], [split == 0]
        border.append(starts[last] + split - 1)
        begins.append(split == 1)
    one = np.ones(len(border), np.int64)
    rows = PlaceRuns(np.array(border, np.int64), one, np.array(begins, np.bool_))
    expected = row_checks(mapped.words[border], np.array([user_id], np.int64))
    if (mapped.checks_of(rows) != expected).any():
        raise DamagedBorderError
    return older


def _are_all_sound(
    rows: NDArray[np.void],
    counts: NDArray[np.int64],
    user_ids: NDArray[np.int64],
    mapped: MappedRows,
    runs: PlaceRuns,
) -> bool:
    """Whether the rows of every user pass their checks, taken together. ``runs`` are where they
    came from."""
    if not len(rows):
        return True
    full = counts > 0
    starts = np.cumsum(counts[full]) - counts[full]
    sums = np.add.reduceat(rows.view(np.uint64), starts * (rows.dtype.itemsize // WORD_BYTES))
    first_run = np.searchsorted(np.cumsum(runs.length), starts, side="right")
    sums += np.add.reduceat(mapped.sums_of(runs), first_run)
    salt = user_ids[full].view(np.uint64) + np.uint64(CHECK)
    return bool((sums == salt * counts[full].view(np.uint64)).all())


def _only_sound(
    rows: NDArray[np.void],
    counts: NDArray[np.int64],
    user_ids: NDArray[np.int64],
    mapped: MappedRows,
    runs: PlaceRuns,
    state: NDArray[np.uint8],
) -> Gathered:
    """Leave out rows that fail their check."""
    words = rows.view(np.uint64).reshape(len(rows), -1)
    sound = row_checks(words, np.repeat(user_ids, counts)) == mapped.checks_of(runs)
    owner = np.repeat(np.arange(len(user_ids)), counts)
    state = state.copy()
    state[owner[~sound]] = UserState.DAMAGED
    kept = np.bincount(owner[sound], minlength=len(user_ids)).astype(np.int64)
    return Gathered(rows[sound], kept, state)
