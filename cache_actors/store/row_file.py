"""The row file of a namespace: rows of fixed size, mapped, next to a file of their checks.

Which places hold rows, and whose, is known by the index alone. A place is written before the index
names it and never while a reader could see it, so readers copy without locks.

A row's check makes its words add up to `CHECK` plus its user's id. Stored are running sums of the
checks of an extent: two of them tell what the checks of any run of rows add up to.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.errors import MemoryFullError, MemoryStoreAbsentError, MemoryStoreError
from cache_actors.store.populate import Populate
from cache_actors.store.records import CHECK, WORD_BYTES
from cache_actors.store.row_merge import expand_runs

_GROWTH_SHARE = 32
_BLOCK_BYTES = 512
_MIN_GROWTH_BYTES, _MAX_GROWTH_BYTES = 1 << 18, 64 << 20


@dataclass(frozen=True)
class PlaceRuns:
    """``E`` runs of places, each within one extent."""

    first: NDArray[np.int64]  # [E]
    length: NDArray[np.int64]  # [E]
    begins: NDArray[np.bool_]  # [E], whether its extent begins with the run

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """All places, run after run."""
        return expand_runs(self.first, self.length)


@dataclass(frozen=True)
class MappedRows:
    """Views of one mapping of the files; places count from 0."""

    capacity: int
    opaque: NDArray[np.void]  # [capacity], rows as bytes: numpy copies fields one by one otherwise
    words: NDArray[np.uint64]  # [capacity, row words]
    checks: NDArray[np.uint64]  # [capacity], of an extent's rows up to this one, added up
    times: NDArray[np.int64]  # [capacity], timestamp_ms
    keys: NDArray[np.uint64]  # [capacity], event_key
    data: memoryview  # the row file, word by word
    sums: memoryview  # `checks`, cheaper to read one by one

    def sums_before(self, runs: PlaceRuns) -> NDArray[np.uint64]:
        """What the checks before each run of an extent add up to, ``[E]``."""
        before = self.checks.take(np.maximum(runs.first - 1, 0))
        return np.where(runs.begins, np.uint64(0), before)

    def sums_of(self, runs: PlaceRuns) -> NDArray[np.uint64]:
        """What the checks of each run add up to, ``[E]``."""
        up_to = self.checks.take(np.maximum(runs.first + runs.length - 1, 0))
        return np.where(runs.length > 0, up_to - self.sums_before(runs), np.uint64(0))

    def checks_of(self, runs: PlaceRuns) -> NDArray[np.uint64]:
        """Each row's own check, run after run."""
        sums = self.checks.take(runs.places)
        own = np.empty_like(sums)
        np.subtract(sums[1:], sums[:-1], out=own[1:])
        full = runs.length > 0
        start = (np.cumsum(runs.length) - runs.length)[full]
        own[start] = sums[start] - self.sums_before(runs)[full]
        return own


class RowFile:
    """Both files. ``mapped`` is replaced as the files grow; a mapping in use stays valid.

    ``places`` counts what the writer reserved; it begins with what the index names.
    """

    def __init__(self, path: Path, stored_dtype: np.dtype, readonly: bool) -> None:
        self.path = path
        self.dtype = stored_dtype
        self.row_bytes = stored_dtype.itemsize
        self.row_words = stored_dtype.itemsize // WORD_BYTES
        self._readonly = readonly
        flags = os.O_RDONLY if readonly else os.O_RDWR | os.O_CREAT
        try:
            self._rows = os.open(path.with_suffix(".rows"), flags, 0o644)
            self._checks = os.open(path.with_suffix(".checks"), flags, 0o644)
        except FileNotFoundError as error:
            raise MemoryStoreAbsentError(
                f"no rows at {path}; start the pool and open the namespace first"
            ) from error
        except OSError as error:
            raise MemoryStoreError(f"row file {path} cannot be opened: {error}") from error
        self.mapped = self._map()
        self.places = 0
        self._populate = Populate()

    @property
    def _widths(self) -> tuple[tuple[int, int], ...]:
        return (self._rows, self.row_bytes), (self._checks, WORD_BYTES)

    @property
    def file_bytes(self) -> int:
        """Bytes that both files take. They look larger: their size doubles, so that a mapping
        lasts, while blocks are reserved bit by bit."""
        return sum(os.fstat(file).st_blocks for file in (self._rows, self._checks)) * _BLOCK_BYTES

    def at_least(self, places: int) -> MappedRows:
        """A mapping that has ``places``, which the index says exist."""
        if places > self.mapped.capacity:
            self.mapped = self._map()
            if places > self.mapped.capacity:
                raise MemoryStoreError(
                    f"row file {self.path} must have {places} rows, has {self.mapped.capacity}; it "
                    "is not the file that belongs to its index. Delete the directory it is in and "
                    "replay the event log"
                )
        return self.mapped

    def keep_reserved(self, at_least: int, chunk_rows: int) -> None:
        """Begin with all places whose blocks an earlier writer reserved, in whole chunks. Without
        them a store at its byte budget would have lost what no row is in."""
        places = -(-at_least // chunk_rows) * chunk_rows
        blocks = [os.fstat(file).st_blocks * _BLOCK_BYTES // width for file, width in self._widths]
        reserved = min(self.mapped.capacity, *blocks) // chunk_rows * chunk_rows
        if reserved > places:
            with contextlib.suppress(OSError):  # the disk is full, and the count was not exact
                for file, width in self._widths:
                    os.posix_fallocate(file, 0, reserved * width)
                places = reserved
        self.places = places

    def growth(self, chunk_rows: int, at_least: int) -> int:
        """Places to add next: a share of the file, in whole chunks, and ``at_least`` so many."""
        share = self.places * self.row_bytes // _GROWTH_SHARE
        target = min(max(share, _MIN_GROWTH_BYTES), _MAX_GROWTH_BYTES) // self.row_bytes
        return -(-max(target, at_least, 1) // chunk_rows) * chunk_rows

    def grow(self, places: int) -> None:
        """Add ``places``. The blocks are reserved now: a write to a mapped file that finds the disk
        full would end the process."""
        end = self.places + places
        try:
            if end > self.mapped.capacity:
                capacity = max(end, 2 * self.mapped.capacity)
                for file, width in self._widths:
                    os.ftruncate(file, capacity * width)
            for file, width in self._widths:
                os.posix_fallocate(file, self.places * width, places * width)
        except OSError as error:
            raise MemoryFullError(
                f"row file {self.path} cannot grow by {places * self.row_bytes} bytes: "
                f"{error.strerror}; nothing of this batch was stored. Free space there, or lower "
                "the byte budget, then save again"
            ) from error
        if end > self.mapped.capacity:
            self.mapped = self._map()
        for part in (self.mapped.words, self.mapped.checks):
            self._populate.ahead(part[self.places : end])
        self.places = end

    def write(self, runs: PlaceRuns, rows: NDArray[np.void], user_ids: NDArray[np.int64]) -> None:
        """Put ``rows`` (stored dtype) of ``user_ids`` into the places of runs, with their checks.
        What an extent has before a run must be there."""
        mapped = self.mapped
        opaque = np.ascontiguousarray(rows).view(mapped.opaque.dtype)
        mapped.opaque[runs.places] = opaque
        own = row_checks(opaque.view(np.uint64).reshape(len(rows), -1), user_ids)
        total = np.append(np.uint64(0), np.cumsum(own))
        start = np.cumsum(runs.length) - runs.length
        offset = mapped.sums_before(runs) - total[start]
        mapped.checks[runs.places] = total[1:] + np.repeat(offset, runs.length)

    def flush(self) -> None:
        """Write both files through to the disk."""
        os.fdatasync(self._rows)
        os.fdatasync(self._checks)

    def close(self) -> None:
        """Close the files; mappings in use stay valid until they are dropped."""
        self._populate.close()
        os.close(self._rows)
        os.close(self._checks)

    def unlink(self) -> None:
        """Delete both files; who has them open keeps reading."""
        self.path.with_suffix(".rows").unlink(missing_ok=True)
        self.path.with_suffix(".checks").unlink(missing_ok=True)
        self.close()

    def unlink_others(self, prefix: str) -> None:
        """Delete files of ``prefix`` that a drop left behind when its process died."""
        for path in self.path.parent.glob(f"{prefix}-*"):
            if path.suffix in (".rows", ".checks") and path.stem != self.path.name:
                path.unlink(missing_ok=True)

    def _map(self) -> MappedRows:
        sizes = os.fstat(self._rows).st_size, os.fstat(self._checks).st_size
        capacity = min(sizes[0] // self.row_bytes, sizes[1] // WORD_BYTES)
        if capacity == 0:
            data, checks = memoryview(b""), np.empty(0, np.uint64)
        else:
            data = memoryview(self._map_file(self._rows, capacity * self.row_bytes))
            check_data = self._map_file(self._checks, capacity * WORD_BYTES)
            checks = np.frombuffer(check_data, np.uint64)
        rows = np.frombuffer(data, self.dtype)
        opaque = rows.view(np.dtype((np.void, self.row_bytes)))
        flat = np.frombuffer(data, np.uint64)
        words = flat.reshape(capacity, -1 if capacity else 1)
        return MappedRows(
            capacity,
            opaque,
            words,
            checks,
            rows["timestamp_ms"],
            rows["event_key"],
            flat.data,
            checks.data,
        )

    def _map_file(self, file: int, size: int) -> mmap.mmap:
        access = mmap.ACCESS_READ if self._readonly else mmap.ACCESS_WRITE
        mapped = mmap.mmap(file, size, access=access)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Larger pages in the kernel's cache: a read of 200 KB took a sixth less time. Systems
            # without them refuse, which is as well.
            with contextlib.suppress(OSError):
                mapped.madvise(mmap.MADV_HUGEPAGE)
        return mapped


def row_checks(words: NDArray[np.uint64], user_ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The check word of each row: with it, a row's words add up to `CHECK` plus its user's id."""
    sums = np.einsum("ij->i", words)  # several times faster than sum(axis=1)
    return np.uint64(CHECK) + user_ids.view(np.uint64) - sums
