"""Brings the rows of a snapshot into a memory, which may be in use, and have other shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cache_actors.transfer.manifest import (
    Manifest,
    SnapshotError,
    SnapshotPart,
    checksum_of,
    read_manifest,
)
from cache_actors.transfer.row_tables import RowTableError, read_row_file
from cache_actors.transfer.snapshot import SnapshotProgress, Watcher
from cache_actors.transfer.storage import Storage, StorageError
from marm.memory import Namespace, UserRows

NUM_READERS = 4
_SHOWN_PROBLEMS = 3


class RestoreTarget(Protocol):
    """What a snapshot is restored into. It is used from one thread."""

    def restore(self, namespace: Namespace, rows: UserRows) -> None:
        """Add rows, where what is stored already wins; acknowledged when it returns."""
        ...

    def forget(self, user_id: int, until_ms: int) -> object:
        """Forget a user up to a time, and keep rows until then from coming back."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was found whole: its manifest, and every part in its full size."""

    storage: Storage
    manifest: Manifest


@dataclass(frozen=True)
class Restored:
    """What a restore brought."""

    namespaces: tuple[str, ...]
    parts: int
    users: int
    rows: int
    num_bytes: int
    forgotten: int


def open_snapshot(source_url: str) -> Snapshot:
    """The snapshot at ``source_url``.

    Raises:
        SnapshotError: when there is none, or not all of it.
    """
    storage = Storage.at(source_url)
    manifest = read_manifest(storage)
    with ThreadPoolExecutor(NUM_READERS, "snapshot-check") as pool:
        sizes = pool.map(storage.num_bytes, [part.path for part in manifest.parts])
        problems = [
            f"{part.path} is missing"
            if size is None
            else f"{part.path} has {size} bytes instead of {part.num_bytes}"
            for part, size in zip(manifest.parts, sizes, strict=True)
            if size != part.num_bytes
        ]
    if problems:
        raise SnapshotError(
            f"{len(problems)} of {len(manifest.parts)} parts of the snapshot at {storage.url} are "
            f"not whole: {_first(problems)}; nothing was restored, take the snapshot again"
        )
    return Snapshot(storage, manifest)


def restore(source_url: str, target: RestoreTarget, progress: Watcher | None = None) -> Restored:
    """`open_snapshot` and `restore_snapshot`."""
    return restore_snapshot(open_snapshot(source_url), target, progress)


def restore_snapshot(
    snapshot: Snapshot, target: RestoreTarget, progress: Watcher | None = None
) -> Restored:
    """Bring all rows of a snapshot into ``target``. It may be repeated, and go on while others
    write: rows that are stored already stay as they are.

    Forgotten users come first, so that none of their rows is shown for a moment.

    Raises:
        SnapshotError: when the content of some parts is damaged. Every other part was restored.
    """
    manifest = snapshot.manifest
    for user_id, until_ms in manifest.forgotten.items():
        target.forget(user_id, until_ms)
    users = rows = num_bytes = 0
    problems: list[str] = []
    for done, (part, content) in enumerate(_contents(snapshot), start=1):
        namespace = manifest.namespace(part.namespace)
        try:
            found = verified_rows(part, namespace, content())
        except (SnapshotError, StorageError, RowTableError) as error:
            problems.append(f"{part.path}: {error}")
            continue
        for chunk in found:
            kept = without_forgotten(chunk, manifest.forgotten)
            if len(kept.rows):
                target.restore(namespace, kept)
            users += int((kept.counts > 0).sum())
            rows += len(kept.rows)
        num_bytes += part.num_bytes
        if progress is not None:
            progress(SnapshotProgress(done, len(manifest.parts), rows, num_bytes))
    if problems:
        raise SnapshotError(
            f"{len(problems)} of {len(manifest.parts)} parts of the snapshot at "
            f"{snapshot.storage.url} could not be read: {_first(problems)}; the other parts were "
            f"restored ({rows} rows). Restore again when they can be read, or compute their rows "
            "from the event log"
        )
    names = tuple(namespace.name for namespace in manifest.namespaces)
    return Restored(
        names, len(manifest.parts), users, rows, num_bytes, forgotten=len(manifest.forgotten)
    )


def without_forgotten(found: UserRows, forgotten: Mapping[int, int]) -> UserRows:
    """The rows that are newer than when their users were forgotten."""
    listed = [index for index, user in enumerate(found.user_ids.tolist()) if user in forgotten]
    if not listed:
        return found
    keep = np.ones(len(found.rows), np.bool_)
    for index in listed:
        run = slice(int(found.offsets[index]), int(found.offsets[index + 1]))
        keep[run] = found.rows["timestamp_ms"][run] > forgotten[int(found.user_ids[index])]
    kept = np.concatenate([[0], np.cumsum(keep)])
    return UserRows(found.user_ids, kept[found.offsets], found.rows[keep])


@dataclass(frozen=True)
class _Content:
    """A part that is being read."""

    future: Future[bytes]

    def __call__(self) -> bytes:
        return self.future.result()


def _contents(snapshot: Snapshot) -> Iterator[tuple[SnapshotPart, _Content]]:
    """All parts, a few of them read ahead."""
    reading: deque[tuple[SnapshotPart, _Content]] = deque()
    with ThreadPoolExecutor(NUM_READERS, "snapshot-read") as pool:
        for part in snapshot.manifest.parts:
            reading.append((part, _Content(pool.submit(snapshot.storage.read, part.path))))
            if len(reading) > NUM_READERS:
                yield reading.popleft()
        yield from reading


def verified_rows(part: SnapshotPart, namespace: Namespace, content: bytes) -> list[UserRows]:
    """The rows of a part, all of them or an error."""
    checksum = checksum_of(content)
    if len(content) != part.num_bytes or checksum != part.checksum:
        raise SnapshotError(
            f"damaged: expected {part.num_bytes} bytes with checksum {part.checksum}, got "
            f"{len(content)} with {checksum}"
        )
    found = list(read_row_file(content, namespace))
    num_rows = sum(len(rows.rows) for rows in found)
    if num_rows != part.rows:
        raise SnapshotError(f"damaged: expected {part.rows} rows, got {num_rows}")
    return found


def _first(problems: list[str]) -> str:
    more = len(problems) - _SHOWN_PROBLEMS
    shown = "; ".join(problems[:_SHOWN_PROBLEMS])
    return f"{shown}; and {more} more" if more > 0 else shown
