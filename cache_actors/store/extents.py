"""Which places of a row file are free: a buddy allocator, kept in memory.

Nothing of it is stored. The index names every place that is used, so the writer computes the free
ones when it opens a store, and no crash can leave the two in disagreement.

A freed place may still be read by a transaction that began before. It rests until every such
reader is gone, the rule by which LMDB reuses its own pages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.records import extent_class, extent_start, pack_extent

MAX_CLASS, _MIN_TOP_CLASS = 7, 1
MIN_CLASS = 1
_TARGET_CHUNK_BYTES = 48 << 10


def top_class(row_bytes: int) -> int:
    """The largest size class: chunks of at most 48 KB and 128 rows, of 2 rows at least."""
    fitting = _TARGET_CHUNK_BYTES // row_bytes
    return max(_MIN_TOP_CLASS, min(MAX_CLASS, fitting.bit_length() - 1))


def class_for(rows: int) -> int:
    """The smallest class with room for ``rows``."""
    return max(MIN_CLASS, (rows - 1).bit_length())


def extent_counts(
    rows: NDArray[np.int64], chunk: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How the rows of users are cut into extents: rows of each extent, user after user, and how
    many extents each user gets. What is left of whole chunks becomes one extent, or two where that
    saves much: a long history that comes at once would leave half a chunk empty else."""
    full, rest = rows // chunk, rows % chunk
    power = np.where(rest > 0, 1 << np.maximum(np.frexp(rest)[1].astype(np.int64) - 1, 0), 0)
    is_split = (full > 0) & (power >= chunk // 2) & (rest > power) & (rest - power <= power // 2)
    num_extents = full + (rest > 0) + is_split
    counts = np.full(int(num_extents.sum()), chunk)
    end = np.cumsum(num_extents) - 1
    has_rest = rest > 0
    counts[end[has_rest]] = np.where(is_split, rest - power, rest)[has_rest]
    counts[end[is_split] - 1] = power[is_split]
    return counts, num_extents


class ExtentAllocator:
    """Places of one row file. Used by the one writer only.

    What is taken or released between `begin` and `commit` is undone by `abort`.
    """

    def __init__(self, top: int) -> None:
        self.top = top
        self.free_rows = 0
        self.resting_rows = 0
        self._free: list[set[int]] = [set() for _ in range(top + 1)]
        self._resting: deque[tuple[int, list[int]]] = deque()
        self._taken: list[int] = []
        self._released: list[int] = []

    @property
    def chunk_rows(self) -> int:
        """Rows of the largest extent; files grow by multiples of it."""
        return 1 << self.top

    @property
    def room_to_grow(self) -> int:
        """The smallest class for the last rows of a long history."""
        return max(MIN_CLASS, self.top - 2)

    def add_places(self, start: int, end: int) -> None:
        """New places ``start..end``, both multiples of a chunk."""
        self._free[self.top].update(range(start, end, self.chunk_rows))
        self.free_rows += end - start

    def take(self, size_class: int) -> int | None:
        """An extent without rows; None when the file has to grow."""
        for larger in range(size_class, self.top + 1):
            if self._free[larger]:
                start = self._free[larger].pop()
                break
        else:
            return None
        for smaller in range(larger - 1, size_class - 1, -1):
            self._free[smaller].add(start + (1 << smaller))
        self.free_rows -= 1 << size_class
        extent = pack_extent(start, size_class, 0)
        self._taken.append(extent)
        return extent

    def release(self, extent: int) -> None:
        """Give an extent back once the transaction commits."""
        self._released.append(extent)

    def commit(self, transaction_id: int) -> None:
        """The transaction that took and released extents is committed."""
        if self._released:
            self._resting.append((transaction_id, self._released))
            self.resting_rows += sum(1 << extent_class(extent) for extent in self._released)
        self._taken, self._released = [], []

    def abort(self) -> None:
        """Undo what was taken and released since the last commit."""
        for extent in self._taken:
            self._put_back(extent_start(extent), extent_class(extent))
        self._taken, self._released = [], []

    @property
    def unused_rows(self) -> int:
        """Places that hold no rows once the transaction under way commits."""
        released = sum(1 << extent_class(extent) for extent in self._released)
        return self.free_rows + self.resting_rows + released

    @property
    def has_resting(self) -> bool:
        """Whether freed places wait for readers."""
        return bool(self._resting)

    def wake(self, oldest_reader: int | None) -> None:
        """Make places free that no reader can see: those freed by ``oldest_reader`` or before."""
        while self._resting and (oldest_reader is None or self._resting[0][0] <= oldest_reader):
            _, extents = self._resting.popleft()
            for extent in extents:
                self.resting_rows -= 1 << extent_class(extent)
                self._put_back(extent_start(extent), extent_class(extent))

    def rest_all_but(self, used: NDArray[np.int64], capacity: int, transaction_id: int) -> None:
        """Begin with a file of ``capacity`` places of which the extents ``used`` (start, class,
        ...) hold rows. Readers from before may still look at the others."""
        taken = np.zeros(capacity, np.bool_)
        for size_class in range(self.top + 1):
            starts = used[used[:, 1] == size_class, 0]
            places = starts[:, None] + np.arange(1 << size_class)
            taken[places.ravel()] = True
        free = list(_aligned_runs(taken, self.top))
        if free:
            self._resting.append((transaction_id, free))
            self.resting_rows += sum(1 << extent_class(extent) for extent in free)

    def _put_back(self, start: int, size_class: int) -> None:
        self.free_rows += 1 << size_class
        while size_class < self.top:
            buddy = start ^ (1 << size_class)
            if buddy not in self._free[size_class]:
                break
            self._free[size_class].remove(buddy)
            start &= buddy
            size_class += 1
        self._free[size_class].add(start)


def fresh_extents(
    allocator: ExtentAllocator,
    grow: Callable[[int], None],
    counts: Sequence[int],
    needs_more: Sequence[bool],
) -> list[int]:
    """Extents with room for ``counts`` rows each, which they count as theirs. The end of a long
    history will grow soon, so where ``needs_more`` there is room behind. ``grow(places)`` makes the
    file larger or raises."""
    fresh = []
    for count, is_end in zip(counts, needs_more, strict=True):
        size_class = max(class_for(count), allocator.room_to_grow if is_end else 0)
        extent = allocator.take(size_class)
        if extent is None:
            grow(allocator.chunk_rows)
            extent = allocator.take(size_class)
            assert extent is not None
        fresh.append(extent + count)
    return fresh


def _aligned_runs(taken: NDArray[np.bool_], top: int) -> Iterable[int]:
    """The untaken places as the largest aligned extents."""
    chunk = 1 << top
    whole = taken[: len(taken) // chunk * chunk].reshape(-1, chunk)
    empty = ~whole.any(axis=1)
    for start in (np.flatnonzero(empty) * chunk).tolist():
        yield pack_extent(start, top, 0)
    for row in np.flatnonzero(~empty & ~whole.all(axis=1)).tolist():
        yield from _split(whole[row], row * chunk, top)


def _split(taken: NDArray[np.bool_], start: int, size_class: int) -> Iterable[int]:
    if not taken.any():
        yield pack_extent(start, size_class, 0)
    elif size_class and not taken.all():
        half = 1 << (size_class - 1)
        yield from _split(taken[:half], start, size_class - 1)
        yield from _split(taken[half:], start + half, size_class - 1)
