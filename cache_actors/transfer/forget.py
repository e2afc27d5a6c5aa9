"""Removes users from a snapshot that was taken before they asked to be forgotten."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cache_actors.transfer.manifest import MANIFEST_NAME, SnapshotPart
from cache_actors.transfer.restore import Snapshot, open_snapshot, verified_rows, without_forgotten
from cache_actors.transfer.row_tables import RowWriter
from cache_actors.transfer.snapshot import write_part
from marm.addressing import user_bucket


@dataclass(frozen=True)
class ForgottenInSnapshot:
    """What was removed."""

    rows: int
    parts_rewritten: int


def forget_in_snapshot(source_url: str, until_ms_of: Mapping[int, int]) -> ForgottenInSnapshot:
    """Remove each user's rows up to their time from the parts of a snapshot, and note the users in
    its manifest, so that a restore keeps them away too.

    New parts are written first, then the manifest, then old parts are removed: the snapshot is
    whole at every moment, and a run that broke off is repeated.
    """
    snapshot = open_snapshot(source_url)
    storage, manifest = snapshot.storage, snapshot.manifest
    buckets = set(user_bucket(np.array(list(until_ms_of), np.int64)).tolist())
    parts: list[SnapshotPart] = []
    replaced: list[SnapshotPart] = []
    removed = 0
    for part in manifest.parts:
        kept = _rewritten(snapshot, part, until_ms_of) if part.bucket in buckets else part
        if kept is not part:
            removed += part.rows - (kept.rows if kept else 0)
            replaced.append(part)
        if kept is not None:
            parts.append(kept)
    noted = dict(manifest.forgotten)
    for user_id, until_ms in until_ms_of.items():
        noted[user_id] = max(until_ms, noted.get(user_id, until_ms))
    changed = replace(manifest, parts=tuple(parts), forgotten=noted)
    storage.write(MANIFEST_NAME, changed.to_json().encode("utf-8"))
    for part in replaced:
        storage.remove(part.path)
    return ForgottenInSnapshot(removed, len(replaced))


def _rewritten(
    snapshot: Snapshot, part: SnapshotPart, until_ms_of: Mapping[int, int]
) -> SnapshotPart | None:
    """The part without forgotten rows: itself if it has none, None if nothing is left."""
    namespace = snapshot.manifest.namespace(part.namespace)
    found = verified_rows(part, namespace, snapshot.storage.read(part.path))
    kept = [without_forgotten(rows, until_ms_of) for rows in found]
    left = sum(len(rows.rows) for rows in kept)
    if left == part.rows:
        return part
    if not left:
        return None
    writer = RowWriter(namespace)
    for rows in kept:
        writer.write(rows)
    name = f"{part.path.rpartition('/')[0]}/bucket-{part.bucket:03d}-{uuid.uuid4().hex}.parquet"
    return write_part(snapshot.storage, name, namespace, part.bucket, writer)
