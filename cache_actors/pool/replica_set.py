"""Which replicas of a shard have every acknowledged row: a record in the pool's directory.

Each change is a new numbered file that only one process can create, so that of several replicas
that want to change the record at once one succeeds and the others learn of it. The first replica
of the record leads: it takes the saves and forwards them to the others.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from cache_actors.atomic_files import claim_file, pending_path

READER_LEASE_S = 1.0
"""How long a reader may rely on a record that it read."""

_KEPT_VERSIONS = 16


@dataclass(frozen=True)
class Member:
    """A replica whose store has every acknowledged row. The generation tells that store from an
    empty one that may have taken its place since."""

    replica: int
    generation: str


@dataclass(frozen=True)
class ReplicaSet:
    """The members at one time; the first one leads. Empty before the first replica has started."""

    version: int = 0
    members: tuple[Member, ...] = ()

    @property
    def leader(self) -> int | None:
        """The replica that takes saves."""
        return self.members[0].replica if self.members else None

    @property
    def replicas(self) -> tuple[int, ...]:
        """The replicas that may serve reads, the leader first."""
        return tuple(member.replica for member in self.members)

    def generation_of(self, replica: int) -> str | None:
        """The store by which ``replica`` is a member; None if it is not one."""
        return next((m.generation for m in self.members if m.replica == replica), None)

    def without(self, replica: int) -> tuple[Member, ...]:
        """The members but one."""
        return tuple(member for member in self.members if member.replica != replica)


class ReplicaRecord:
    """The record of one shard. Safe to use from several threads and processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen = ReplicaSet()
        self._seen_until = -1.0

    def current(self) -> ReplicaSet:
        """The record as it is now."""
        while True:
            looked = time.monotonic()
            newest = max(self._directory.glob("v*.json"), default=None)
            found = self._seen
            if newest is not None and int(newest.stem[1:]) != found.version:
                try:
                    found = _parse(newest)
                except FileNotFoundError:  # tidied away since: there are newer ones
                    continue
            self._seen, self._seen_until = found, looked + READER_LEASE_S
            return found

    def recent(self) -> ReplicaSet:
        """The record as it was at most `READER_LEASE_S` ago."""
        return self._seen if time.monotonic() < self._seen_until else self.current()

    def change(self, expected: ReplicaSet, members: tuple[Member, ...]) -> bool:
        """Let ``members`` follow ``expected``; false if the record has changed meanwhile."""
        if not members:
            raise ValueError("a shard needs at least one member, got none")
        if self.current().version != expected.version:
            return False
        self._directory.mkdir(parents=True, exist_ok=True)
        pending = pending_path(self._directory)
        content = [[member.replica, member.generation] for member in members]
        try:
            pending.write_text(json.dumps({"members": content}), encoding="utf-8")
            if not claim_file(pending, self._path(expected.version + 1)):
                return False
        finally:
            pending.unlink(missing_ok=True)
        for version in range(expected.version - _KEPT_VERSIONS, 0, -1):
            try:
                self._path(version).unlink()
            except FileNotFoundError:
                break
        self.current()
        return True

    def _path(self, version: int) -> Path:
        return self._directory / f"v{version:012d}.json"


def _parse(path: Path) -> ReplicaSet:
    content = json.loads(path.read_text(encoding="utf-8"))
    members = tuple(Member(int(replica), str(gen)) for replica, gen in content["members"])
    return ReplicaSet(int(path.stem[1:]), members)
