"""One replica of a shard: what it stores, to whom it passes changes on, and what it may answer.

Nothing here knows Ray: other replicas are reached through `Peer`. A change is applied to the
replica's own store first, then to the other members of the shard, then to whoever is copying the
buckets it concerns; only then it is acknowledged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache_actors.pool.changes import BucketsCleared, BucketsOwned, Change, RowsSaved
from cache_actors.pool.errors import HandoverLostError, MemoryUnavailable, NotLeaderError
from cache_actors.pool.handover import CopyProgress, Handover, Recall, Send
from cache_actors.pool.replica_set import READER_LEASE_S, Member, ReplicaRecord, ReplicaSet
from cache_actors.store.errors import MemoryStoreError
from cache_actors.store.namespace_writer import BucketMovedError
from cache_actors.store.shard_store import ShardStore
from marm.addressing import NUM_BUCKETS
from marm.memory import Namespace, UserRows

logger = logging.getLogger(__name__)

PEER_TIMEOUT_S = 20.0


class Peer(Protocol):
    """Another replica, of this shard or of another one."""

    def receive(self, change: Change, *, as_member: bool) -> None:
        """Have the peer make a change: as a member of this shard, or as a shard of its own."""
        ...

    def rows_of(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> UserRows:
        """All rows that the peer has of users."""
        ...


Connect = Callable[[int, int], Peer]
"""The peer at a shard and replica number."""


@dataclass(frozen=True)
class _Joining:
    replica: int
    handover: Handover


class ShardCore:
    """The changes of one replica, in one order. Safe to use from several threads."""

    def __init__(
        self,
        shard: int,
        replica: int,
        store: ShardStore,
        record_of: Callable[[int], ReplicaRecord],
        connect: Connect,
        recall: Recall,
    ) -> None:
        self.shard = shard
        self.replica = replica
        self.store = store
        self.record = record_of(shard)
        self._record_of = record_of
        self._connect = connect
        self._recall = recall
        self._handovers: dict[int, Handover] = {}
        self._joining: dict[int, _Joining] = {}
        self._num_handovers = 0
        self._changing = threading.RLock()
        self._known = self.record.current()
        self._quiet_until = 0.0
        if self._known.version > 1:  # the last change may have been made a moment ago
            self._quiet_until = time.monotonic() + READER_LEASE_S

    @property
    def is_member(self) -> bool:
        """Whether this replica has every acknowledged row."""
        return self.record.recent().generation_of(self.replica) == self.store.generation

    @property
    def leads(self) -> bool:
        """Whether this replica takes the saves."""
        return self.is_member and self.record.recent().leader == self.replica

    def check_member(self) -> None:
        """Refuse to answer for what may be missing here."""
        if not self.is_member:
            raise NotLeaderError(
                f"replica {self.replica} of memory shard {self.shard} is catching up; ask another"
            )

    def save(
        self, namespace: Namespace, user_ids: NDArray[np.int64], rows: NDArray[np.void]
    ) -> None:
        """Upsert rows; when this returns they are acknowledged. `BucketMovedError` if some belong
        to another shard: nothing is stored then."""
        with self._changing:
            self.commit(RowsSaved(namespace, user_ids, rows))

    def commit(self, change: Change) -> None:
        """Make a change here and everywhere it has to be."""
        with self._changing:
            self._check_leads()
            self._outlast_readers()
            change.apply(self.store)
            self._forward_to_members(change)
            self._forward_to_handovers(change)

    def receive(self, change: Change, *, as_member: bool) -> None:
        """Make a change that a peer made. A member that leads refuses those of a former leader."""
        if not as_member:
            self.commit(change)
            return
        with self._changing:
            if self.record.recent().leader == self.replica:
                raise NotLeaderError(f"replica {self.replica} leads memory shard {self.shard}")
            change.apply(self.store)

    def repair(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> None:
        """Drop rows of users that failed their check, and bring back what another member has; else
        they are left to the durable tier or the log."""
        dropped = self.store.repair(namespace, user_ids)
        if not dropped:
            return
        for other in self.record.recent().replicas:
            if other != self.replica:
                rows = self._connect(self.shard, other).rows_of(namespace, user_ids)
                self.store.restore(namespace, rows)

    def step_down(self, now: ReplicaSet) -> None:
        """Be no member any more: another store took the place of the one that was. No change is
        taken while somebody may still read that one."""
        with self._changing:
            if self.record.change(now, now.without(self.replica)):
                time.sleep(READER_LEASE_S)

    def begin_move(self, buckets: Sequence[int], shard: int) -> int:
        """Start to copy buckets to another shard; the number is for the other calls."""
        moved = np.array(buckets, np.int64)
        with self._changing:
            self._check_leads()
            if not self.store.owned()[moved].all():
                raise BucketMovedError(
                    f"memory shard {self.shard} does not own all of buckets {list(buckets)}"
                )
            leader = self._record_of(shard).current().leader
            if leader is None:
                raise HandoverLostError(f"memory shard {shard} has no replica that runs")
            peer = self._connect(shard, leader)
            peer.receive(BucketsCleared(moved), as_member=False)
            # It may own the buckets at once: as long as this shard does too, nobody asks it.
            peer.receive(BucketsOwned(moved, owned=True), as_member=False)
            for number, other in list(self._handovers.items()):
                if np.isin(moved, other.buckets).any() and number not in self._joining:
                    del self._handovers[number]

            def send(change: Change) -> None:
                peer.receive(change, as_member=False)

            return self._begin(self._handover_of(moved, send))

    def finish_move(self, number: int) -> None:
        """Let go of copied buckets, which makes the other shard their only owner."""
        with self._changing:
            handover = self._copied(number)
            self.commit(BucketsOwned(handover.buckets, owned=False))
            del self._handovers[number]

    def clear_moved(self, buckets: Sequence[int]) -> None:
        """Remove what is left of buckets that this shard should not own."""
        self.commit(BucketsCleared(np.array(buckets, np.int64)))

    def begin_join(self, replica: int) -> int:
        """Start to bring another replica of this shard up to date."""
        with self._changing:
            self._check_leads()
            for number, joining in list(self._joining.items()):
                if joining.replica == replica:
                    del self._handovers[number], self._joining[number]
            peer = self._connect(self.shard, replica)
            owned = self.store.owned()
            peer.receive(BucketsCleared(np.flatnonzero(~owned)), as_member=True)
            peer.receive(BucketsOwned(np.flatnonzero(owned), owned=True), as_member=True)

            def send(change: Change) -> None:
                peer.receive(change, as_member=True)

            everything = np.arange(NUM_BUCKETS)
            handover = self._handover_of(everything, send)
            number = self._begin(handover)
            self._joining[number] = _Joining(replica, handover)
            return number

    def finish_join(self, number: int, generation: str) -> None:
        """Count the replica among the members from now on."""
        with self._changing:
            self._copied(number)
            member = Member(self._joining[number].replica, generation)
            now = self.record.current()
            if not self.record.change(now, (*now.without(member.replica), member)):
                raise HandoverLostError("the members changed while a replica joined; join again")
            del self._handovers[number], self._joining[number]

    def copy_next(self, number: int) -> CopyProgress:
        """The next step of a copy, between two saves."""
        with self._changing:
            handover = self._handover(number)
            try:
                return handover.copy_next()
            except (MemoryUnavailable, MemoryStoreError, OSError) as error:
                self._abandon(number, error)
                raise HandoverLostError(f"a copy of buckets was broken off: {error}") from error

    def _handover_of(self, buckets: NDArray[np.int64], send: Send) -> Handover:
        return Handover(self.store, buckets, send, self.repair, self._recall)

    def _begin(self, handover: Handover) -> int:
        self._num_handovers += 1
        self._handovers[self._num_handovers] = handover
        return self._num_handovers

    def _handover(self, number: int) -> Handover:
        self._check_leads()
        handover = self._handovers.get(number)
        if handover is None:
            raise HandoverLostError(
                f"memory shard {self.shard} knows no copy {number}: its target failed, or the "
                "shard was restarted; begin again"
            )
        return handover

    def _copied(self, number: int) -> Handover:
        handover = self._handover(number)
        if not handover.is_done:
            raise HandoverLostError(f"copy {number} is not finished; go on with copy_next")
        return handover

    def _abandon(self, number: int, error: Exception) -> None:
        logger.warning("memory shard %d broke a copy of buckets off: %s", self.shard, error)
        self._handovers.pop(number, None)
        self._joining.pop(number, None)

    def _check_leads(self) -> None:
        if not self.leads:
            raise NotLeaderError(
                f"replica {self.replica} of memory shard {self.shard} does not lead it; look up "
                "its members again"
            )

    def _outlast_readers(self) -> None:
        """Return when nobody reads a store that was a member's before, and is no longer. Changes
        don't reach it, so none may be acknowledged while somebody still relies on it."""
        now = self.record.recent()
        if now.version != self._known.version:
            led = self._known.leader == self.replica and self._known.version + 1 == now.version
            gone = set(self._known.members) - set(now.members)
            if now.version > 1 and (gone or not led):  # what it missed may have dropped members
                self._quiet_until = time.monotonic() + READER_LEASE_S
            self._known = now
        left_s = self._quiet_until - time.monotonic()
        if left_s > 0:
            time.sleep(left_s)
            self._check_leads()

    def _forward_to_members(self, change: Change) -> None:
        """A member that does not take the change is one no longer, before it is acknowledged."""
        for other in self.record.recent().replicas:
            if other == self.replica:
                continue
            try:
                self._connect(self.shard, other).receive(change, as_member=True)
            except NotLeaderError:
                raise
            except (MemoryUnavailable, MemoryStoreError, OSError) as error:
                logger.warning("replica %d of memory shard %d is out: %s", other, self.shard, error)
                self._remove_member(other)

    def _remove_member(self, replica: int) -> None:
        now = self.record.current()
        if replica not in now.replicas:
            return
        if now.leader != self.replica or not self.record.change(now, now.without(replica)):
            raise NotLeaderError(f"the members of memory shard {self.shard} changed; try again")
        self._outlast_readers()

    def _forward_to_handovers(self, change: Change) -> None:
        for number, handover in list(self._handovers.items()):
            try:
                if number in self._joining:
                    handover.send(change)
                else:
                    handover.forward(change)
            except (MemoryUnavailable, MemoryStoreError, OSError) as error:
                self._abandon(number, error)


def take_lead(core: ShardCore, now: ReplicaSet) -> None:
    """Let a member lead whose leader is gone, and is one no longer. Its first change waits until
    nobody reads the former leader's store."""
    generation = now.generation_of(core.replica)
    assert now.leader is not None
    if generation != core.store.generation or now.leader == core.replica:
        return
    mine = Member(core.replica, generation)
    others = tuple(m for m in now.without(now.leader) if m.replica != core.replica)
    core.record.change(now, (mine, *others))
