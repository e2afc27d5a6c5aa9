"""Upserting rows into pages: find what a batch touches, merge all users at once, write back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.page_reads import seek_before
from cache_actors.store.pages import (
    NEWEST,
    PREFIX_BYTES,
    Buffer,
    PageLayout,
    RowId,
    key_prefixes,
    key_suffix,
)
from cache_actors.store.row_merge import upsert_runs


@dataclass(frozen=True)
class Growth:
    """What a batch added, net of what it replaced or dropped."""

    users: int
    rows: int


@dataclass(frozen=True)
class RowBatch:
    """Rows to save, by user: ``run[i]`` is the position in ``prefixes`` of row ``i``'s user.

    ``first`` and ``last`` are the identities of each user's oldest and newest row in the batch.
    """

    rows: NDArray[np.void]
    run: NDArray[np.int64]
    prefixes: list[bytes]
    first: list[RowId]
    last: list[RowId]

    @staticmethod
    def of(user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> RowBatch:
        """The batch of ``rows[i]`` of user ``user_ids[i]``."""
        users, run = np.unique(user_ids, return_inverse=True)
        times, keys = rows["timestamp_ms"], rows["event_key"]
        order = np.lexsort((keys, times, run))
        edges = np.searchsorted(run[order], np.arange(len(users) + 1))
        first, last = order[edges[:-1]], order[edges[1:] - 1]
        return RowBatch(
            rows,
            run,
            key_prefixes(users),
            list(zip(times[first].tolist(), keys[first].tolist(), strict=True)),
            list(zip(times[last].tolist(), keys[last].tolist(), strict=True)),
        )


@dataclass(frozen=True)
class _Region:
    """The pages of a user that a batch touches: their rows are ``head | old | tail``, and the
    rows of the batch fall among ``old``."""

    keys: list[bytes]
    head: Buffer
    old: list[Buffer]
    tail: Buffer
    num_rows: int


@dataclass(frozen=True)
class PageWriter:
    """Writes rows of one namespace."""

    layout: PageLayout
    max_rows_per_user: int | None

    def upsert(self, before: Any, writer: Any, batch: RowBatch) -> Growth:
        """Save ``batch`` with the cursor ``writer``; ``before`` is a cursor over the same state
        that is not changed by the writes, so buffers read with it stay valid."""
        layout = self.layout
        regions = [
            self._region(before, *bounds)
            for bounds in zip(batch.prefixes, batch.first, batch.last, strict=True)
        ]
        old = [part for region in regions for part in region.old]
        old_counts = [layout.count_all(region.old) for region in regions]
        old_run = np.repeat(np.arange(len(regions)), old_counts)
        merged = upsert_runs(layout.row_dtype, len(regions), old, old_run, batch.rows, batch.run)
        edges = (merged.starts * layout.row_bytes).tolist()
        data = merged.rows.view(np.uint8).reshape(-1).data
        rows_added = 0
        for index, region in enumerate(regions):
            middle = data[edges[index] : edges[index + 1]]
            rows_added += self._replace(writer, batch.prefixes[index], region, middle)
        return Growth(sum(not region.keys for region in regions), rows_added)

    def _region(self, cursor: Any, prefix: bytes, first: RowId, last: RowId) -> _Region:
        """The pages of a user into which rows ``first..last`` fall, cut at both ends."""
        layout = self.layout
        if not self._seek_page(cursor, prefix, prefix + key_suffix(*first)):
            return _Region([], b"", [], b"", 0)
        key, page = cursor.item()
        keys, pages = [bytes(key)], [page]
        end = prefix + key_suffix(*last)
        while cursor.next():
            key, page = cursor.item()
            if bytes(key) > end:  # also where the next user begins
                break
            keys.append(bytes(key))
            pages.append(page)
        start_byte = layout.position(pages[0], first) * layout.row_bytes
        after_last = (last[0], last[1] + 1)
        end_byte = layout.position(pages[-1], after_last) * layout.row_bytes
        if len(pages) == 1:
            old = [pages[0][start_byte:end_byte]]
        else:
            old = [pages[0][start_byte:], *pages[1:-1], pages[-1][:end_byte]]
        num_rows = layout.count_all(pages)
        return _Region(keys, pages[0][:start_byte], old, pages[-1][end_byte:], num_rows)

    def _seek_page(self, cursor: Any, prefix: bytes, key: bytes) -> bool:
        """Move to the user's page that holds or would hold the row of ``key``."""
        if cursor.set_range(key):
            if cursor.key() == key:
                return True
            found = cursor.prev()
        else:
            found = cursor.last()
        if found and cursor.key()[:PREFIX_BYTES] == prefix:
            return True
        # The row is older than every stored one: the user's first page, if any, takes it in.
        return bool(cursor.set_range(key)) and cursor.key()[:PREFIX_BYTES] == prefix

    def _replace(self, writer: Any, prefix: bytes, region: _Region, middle: Buffer) -> int:
        """Write a region with ``middle`` in place of its old rows; rows added, net."""
        layout = self.layout
        head, keys, num_rows = region.head, region.keys, region.num_rows
        if layout.count(head) == layout.rows_per_page:  # a full page before an append stays as is
            head, keys, num_rows = b"", keys[1:], num_rows - layout.rows_per_page
        pages = layout.cut(head, middle, region.tail)
        items = [(prefix + key_suffix(*layout.row_id(page, 0)), page) for page in pages]
        if keys:
            kept = {key for key, _ in items}
            for key in keys:
                if key not in kept and writer.set_key(key):
                    writer.delete()
        writer.putmulti(items)
        added = layout.count_all(pages) - num_rows
        if self.max_rows_per_user is not None and len(pages) > len(keys):
            added -= self._drop_oldest(writer, prefix, self.max_rows_per_user)
        return added

    def _drop_oldest(self, writer: Any, prefix: bytes, max_rows: int) -> int:
        """Delete the pages that lie wholly beyond the user's row limit; rows deleted.

        Only whole pages go, and only when a page was added: trimming row by row would rewrite the
        oldest page at every save. `PageReader` hides what is left beyond the limit.
        """
        kept = dropped = 0
        found = seek_before(writer, prefix + NEWEST)
        while found and writer.key()[:PREFIX_BYTES] == prefix:
            count = self.layout.count(writer.value())
            if kept < max_rows:
                kept += count
            else:
                dropped += count
                writer.delete()  # leaves the cursor at the page after it, which is kept
            found = writer.prev()
        return dropped
