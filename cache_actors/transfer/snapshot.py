"""Copies a memory, while it is read and written, to a directory or an object store.

Rows go bucket by bucket into part files that are never written twice, and the manifest is written
last: without it there is no snapshot, whatever else is at the place. Each user's rows are those of
one moment; different users may be of different moments. What is written to a user meanwhile may be
in the snapshot or not, and training that resumes from a checkpoint taken before writes it again.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cache_actors.transfer.manifest import (
    MANIFEST_NAME,
    Manifest,
    SnapshotError,
    SnapshotPart,
    checksum_of,
)
from cache_actors.transfer.row_tables import RowWriter
from cache_actors.transfer.storage import Storage, StorageError
from marm.addressing import NUM_BUCKETS
from marm.memory import Namespace, UserRows

DEFAULT_PART_BYTES = 128 << 20
"""Size at which a part is closed; what is held in memory is a few times as much."""

NUM_WRITERS = 4


class SnapshotSource(Protocol):
    """What a snapshot is taken of. It is used from one thread."""

    def namespaces(self) -> Sequence[Namespace]:
        """Namespaces with rows."""
        ...

    def scan(self, namespace: Namespace, bucket: int) -> Iterator[UserRows]:
        """All users of a bucket, some at a time, each with all rows, of one moment."""
        ...

    def forgotten(self) -> dict[int, int]:
        """Users to be forgotten, with the time in milliseconds up to which."""
        ...


@dataclass(frozen=True)
class SnapshotProgress:
    """How far a snapshot or a restore has got."""

    buckets: int
    of_buckets: int
    rows: int
    num_bytes: int


Watcher = Callable[[SnapshotProgress], None]


def snapshot(
    source: SnapshotSource,
    destination_url: str,
    *,
    shard_of_bucket: Sequence[int] = (),
    max_part_bytes: int = DEFAULT_PART_BYTES,
    progress: Watcher | None = None,
) -> Manifest:
    """Copy every namespace of ``source`` to ``destination_url``; returns what was written.

    Raises:
        SnapshotError: when there is a snapshot already. It is left as it is.
        StorageError: when the place can't be written. What was begun there is removed.
    """
    if max_part_bytes < 1:
        raise ValueError(f"max_part_bytes must be at least 1, got {max_part_bytes}")
    storage = Storage.at(destination_url)
    if storage.num_bytes(MANIFEST_NAME) is not None:
        raise SnapshotError(
            f"{storage.url} holds a snapshot already; give another place, or remove it first"
        )
    snapshot_id, started_ms = uuid.uuid4().hex, _now_ms()
    directory = f"rows-{snapshot_id}"
    storage.write(f"{directory}/begun", b"")  # a place that can't be written shows now
    try:
        namespaces = tuple(source.namespaces())
        parts = _write_parts(source, namespaces, storage, directory, max_part_bytes, progress)
        manifest = Manifest(
            snapshot_id,
            started_ms,
            _now_ms(),
            namespaces,
            parts,
            # Read last: of users forgotten meanwhile, rows may have been copied before.
            forgotten=source.forgotten(),
            shard_of_bucket=tuple(shard_of_bucket),
        )
        storage.write(MANIFEST_NAME, manifest.to_json().encode("utf-8"))
    except BaseException:
        with suppress(StorageError):
            storage.remove(directory)
        raise
    return manifest


def _write_parts(
    source: SnapshotSource,
    namespaces: Sequence[Namespace],
    storage: Storage,
    directory: str,
    max_part_bytes: int,
    progress: Watcher | None,
) -> tuple[SnapshotPart, ...]:
    parts: list[SnapshotPart] = []
    writing: deque[Future[SnapshotPart]] = deque()
    total = len(namespaces) * NUM_BUCKETS
    with ThreadPoolExecutor(NUM_WRITERS, "snapshot-write") as pool:
        for done, (namespace, bucket) in enumerate(
            (namespace, bucket) for namespace in namespaces for bucket in range(NUM_BUCKETS)
        ):
            for index, content in enumerate(_part_files(source, namespace, bucket, max_part_bytes)):
                name = f"{directory}/{namespace.name}/bucket-{bucket:03d}-{index:05d}.parquet"
                writing.append(pool.submit(write_part, storage, name, namespace, bucket, content))
                if len(writing) > NUM_WRITERS:  # a bound on the memory
                    parts.append(writing.popleft().result())
            if progress is not None:
                progress(_progress(done + 1, total, parts))
        parts += [future.result() for future in writing]
    if progress is not None:
        progress(_progress(total, total, parts))
    return tuple(parts)


def _part_files(
    source: SnapshotSource, namespace: Namespace, bucket: int, max_part_bytes: int
) -> Iterator[RowWriter]:
    """A bucket in files, each ready to be closed."""
    writer = RowWriter(namespace)
    for chunk in source.scan(namespace, bucket):
        for users in split_users(chunk, max_part_bytes):
            if writer.rows and writer.num_bytes + users.rows.nbytes > max_part_bytes:
                yield writer
                writer = RowWriter(namespace)
            writer.write(users)
    if writer.rows:
        yield writer


def write_part(
    storage: Storage, name: str, namespace: Namespace, bucket: int, writer: RowWriter
) -> SnapshotPart:
    """Store what was written as one part."""
    content = writer.close()
    storage.write(name, content)
    return SnapshotPart(
        name,
        namespace.name,
        bucket,
        writer.users,
        writer.rows,
        len(content),
        checksum_of(content),
    )


def split_users(found: UserRows, max_bytes: int) -> Iterator[UserRows]:
    """Runs of users whose rows take at most ``max_bytes``, or of one user."""
    start = 0
    row_bytes = found.rows.dtype.itemsize
    while start < len(found.user_ids):
        last_row = found.offsets[start] + max_bytes // row_bytes
        end = max(int(np.searchsorted(found.offsets, last_row, side="right")) - 1, start + 1)
        first, after = found.offsets[start], found.offsets[end]
        offsets = found.offsets[start : end + 1] - first
        yield UserRows(found.user_ids[start:end], offsets, found.rows[first:after])
        start = end


def _progress(buckets: int, of_buckets: int, parts: list[SnapshotPart]) -> SnapshotProgress:
    rows, num_bytes = sum(part.rows for part in parts), sum(part.num_bytes for part in parts)
    return SnapshotProgress(buckets, of_buckets, rows, num_bytes)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
