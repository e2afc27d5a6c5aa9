"""What a snapshot holds: the file that makes a heap of part files a snapshot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from cache_actors.transfer.storage import Storage
from marm.addressing import NUM_BUCKETS
from marm.memory import Namespace

MANIFEST_NAME = "manifest.json"
SNAPSHOT_FORMAT = 1


class SnapshotError(RuntimeError):
    """There is no sound snapshot at a place; the message says what is wrong with it."""


@dataclass(frozen=True)
class SnapshotPart:
    """One file of rows: users of one bucket in one namespace."""

    path: str  # relative to the snapshot
    namespace: str
    bucket: int
    users: int
    rows: int
    num_bytes: int
    checksum: str  # xxh3, 64 bits, of the whole file


@dataclass(frozen=True)
class Manifest:
    """All parts of a snapshot, and what belongs to it beside rows.

    Attributes:
        snapshot_id: names the directory of the parts.
        started_ms: every row acknowledged before is in the snapshot, in this version or a later.
        finished_ms: nothing written later is.
        namespaces: of which rows were taken, also the empty ones.
        forgotten: users to be forgotten, with the time up to which; they must not come back.
        shard_of_bucket: where the buckets were; empty if the source had no shards. Only told: a
            snapshot is restored into any number of shards.
    """

    snapshot_id: str
    started_ms: int
    finished_ms: int
    namespaces: tuple[Namespace, ...]
    parts: tuple[SnapshotPart, ...]
    forgotten: Mapping[int, int]
    shard_of_bucket: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.num_bytes for part in self.parts)

    def namespace(self, name: str) -> Namespace:
        """The namespace called ``name``."""
        return next(found for found in self.namespaces if found.name == name)

    def to_json(self) -> str:
        """The manifest as stored."""
        body = {
            "format": SNAPSHOT_FORMAT,
            **asdict(self),
            "forgotten": {str(user): until for user, until in self.forgotten.items()},
        }
        return json.dumps({**body, "checksum": checksum_of(_canonical(body))}, indent=1)

    @staticmethod
    def from_json(text: str) -> Manifest:
        """The manifest in ``text``; refuses any that is not whole."""
        try:
            body = json.loads(text)
            if body["format"] != SNAPSHOT_FORMAT:
                raise SnapshotError(
                    f"expected a snapshot of format {SNAPSHOT_FORMAT}, got {body['format']!r}; "
                    "restore it with the version that wrote it"
                )
            if body.pop("checksum") != checksum_of(_canonical(body)):
                raise SnapshotError("the manifest is damaged: its checksum does not fit")
            return _parse(body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SnapshotError(f"the manifest is damaged ({error!r})") from error


def read_manifest(storage: Storage) -> Manifest:
    """The manifest of the snapshot at a place."""
    if storage.num_bytes(MANIFEST_NAME) is None:
        raise SnapshotError(
            f"there is no snapshot at {storage.url}: it has no {MANIFEST_NAME}, which is written "
            "last; take the snapshot again, or give the URL of one that is whole"
        )
    try:
        return Manifest.from_json(storage.read(MANIFEST_NAME).decode("utf-8"))
    except (SnapshotError, UnicodeDecodeError) as error:
        raise SnapshotError(f"{storage.url}/{MANIFEST_NAME}: {error}") from error


def checksum_of(content: bytes | memoryview) -> str:
    """Of a whole file."""
    return xxhash.xxh3_64_hexdigest(content)


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True).encode("utf-8")


def _parse(body: dict[str, Any]) -> Manifest:
    namespaces = tuple(Namespace(**fields) for fields in body["namespaces"])
    parts = tuple(SnapshotPart(**fields) for fields in body["parts"])
    names = {namespace.name for namespace in namespaces}
    for part in parts:
        if part.namespace not in names or not 0 <= part.bucket < NUM_BUCKETS:
            raise ValueError(f"part {part.path} is of bucket {part.bucket} of {part.namespace!r}")
        if part.path.startswith("/") or ".." in part.path.split("/"):
            raise ValueError(f"part {part.path!r} is not inside the snapshot")
    return Manifest(
        snapshot_id=str(body["snapshot_id"]),
        started_ms=int(body["started_ms"]),
        finished_ms=int(body["finished_ms"]),
        namespaces=namespaces,
        parts=parts,
        forgotten={int(user): int(until) for user, until in body["forgotten"].items()},
        shard_of_bucket=tuple(int(shard) for shard in body["shard_of_bucket"]),
    )
