"""Reading a user's rows with a cursor over pages. Buffers returned end with the transaction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cache_actors.store.pages import NEWEST, PREFIX_BYTES, Buffer, PageLayout, key_suffix


def seek_before(cursor: Any, key: bytes) -> bool:
    """Move to the last page whose key sorts before ``key``; false when there is none."""
    found = cursor.set_range(key)
    return bool(cursor.prev() if found else cursor.last())


@dataclass(frozen=True)
class PageReader:
    """Finds rows of one namespace. A user's rows beyond ``max_rows_per_user`` are never seen,
    whether or not their pages still exist."""

    layout: PageLayout
    max_rows_per_user: int | None

    def collect_newest(
        self, cursor: Any, prefix: bytes, n: int, before_ms: int | None, parts: list[Buffer]
    ) -> int:
        """Add a user's newest ``n`` rows before a time to ``parts``, oldest first; how many."""
        wanted = self._visible(cursor, prefix, n, before_ms)
        suffix = NEWEST if before_ms is None else key_suffix(before_ms, 0)
        row_bytes = self.layout.row_bytes
        missing = wanted
        newest_first: list[Buffer] = []
        found = missing > 0 and seek_before(cursor, prefix + suffix)
        while found:
            key, page = cursor.item()
            if key[:PREFIX_BYTES] != prefix:
                break
            end = len(page) // row_bytes
            if before_ms is not None and not newest_first:
                end = self.layout.position(page, (before_ms, 0))
            start = max(0, end - missing)
            newest_first.append(page[start * row_bytes : end * row_bytes])
            missing -= end - start
            if not missing:
                break
            found = cursor.prev()
        newest_first.reverse()
        parts += newest_first
        return wanted - missing

    def user_at(self, cursor: Any, key: bytes) -> tuple[bytes, bytearray] | None:
        """Prefix and visible rows of the first user at or after ``key``, as a copy."""
        if not cursor.set_range(key):
            return None
        prefix = bytes(cursor.key()[:PREFIX_BYTES])
        parts = []
        for page_key, page in cursor.iternext():
            if page_key[:PREFIX_BYTES] != prefix:
                break
            parts.append(page)
        data = bytearray().join(parts)
        if self.max_rows_per_user is not None:
            del data[: -self.max_rows_per_user * self.layout.row_bytes]
        return prefix, data

    def _visible(self, cursor: Any, prefix: bytes, n: int, before_ms: int | None) -> int:
        """How many of ``n`` rows before a time are within the user's row limit."""
        limit = self.max_rows_per_user
        if limit is None:
            return n
        if before_ms is None:
            return min(n, limit)
        newer = 0
        found = seek_before(cursor, prefix + NEWEST)
        while found and newer < limit:
            key, page = cursor.item()
            if key[:PREFIX_BYTES] != prefix:
                break
            older = self.layout.position(page, (before_ms, 0))
            newer += self.layout.count(page) - older
            if older:
                break
            found = cursor.prev()
        return min(n, max(0, limit - newer))
