"""Adding rows to users' blocks in Redis, without losing what is there.

A shard may know only the newer part of a user, whose older rows it evicted or never loaded after a
node was lost. So rows are added to a block, never put in its place, unless its header alone shows
that the shard has all of it: a put then reads a few bytes per user and no block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.row_merge import upsert_runs
from cache_actors.tiers.block_swap import BlockSwapper, Swap
from cache_actors.tiers.durable_tier import TierWrite
from cache_actors.tiers.redis_keys import RedisKeys
from cache_actors.tiers.redis_link import KeyCommand, RedisLink, is_unavailable
from cache_actors.tiers.redis_node import Foreign
from cache_actors.tiers.tier_counts import TierCounts
from cache_actors.tiers.tombstones import as_until, not_forgotten
from cache_actors.tiers.user_block import (
    HEADER_BYTES,
    BlockHeader,
    DamagedBlockError,
    decode_block,
    encode_block,
)
from marm.memory import Namespace, UserRows

CHUNK_BYTES = 4 << 20
CHUNK_USERS = 128
MAX_BLOCK_BYTES = 512 << 20
"""What Redis takes as one value."""

_MOST_TRIES = 8


@dataclass
class _Draft:
    """One user of a put: the rows to add, what was found, and what to put in its place."""

    index: int
    user_id: int
    key: str
    rows: NDArray[np.void]
    header: bytes = b""
    tombstone: bytes = b""
    block: bytes = b""

    @property
    def is_stored(self) -> bool:
        """Whether the very block is there already: a header has the checksum of all of it."""
        return self.header == self.block[:HEADER_BYTES]


@dataclass(frozen=True)
class BlockWriter:
    """Writes the blocks of one pool."""

    link: RedisLink
    keys: RedisKeys
    swapper: BlockSwapper
    counts: TierCounts
    max_rows_per_user: int | None

    def add(self, namespace: Namespace, rows: UserRows) -> TierWrite:
        """Add ``rows`` to their users' blocks. Users whose server does not answer are left out."""
        saved = np.zeros(len(rows.user_ids), np.bool_)
        sent_bytes = 0
        for drafts in self._chunks(namespace, rows):
            for _ in range(_MOST_TRIES):
                ready = self._merge(namespace, self._look(namespace, drafts, saved))
                drafts, sent = self._write(namespace, ready, saved)
                sent_bytes += sent
                if not drafts:
                    break
        self.counts.add(
            written_users=int(saved.sum()),
            written_bytes=sent_bytes,
            errors=int(not saved.all()),
        )
        return TierWrite(saved, sent_bytes)

    def _chunks(self, namespace: Namespace, rows: UserRows) -> Iterator[list[_Draft]]:
        """The users of a put, so many at a time that a pipeline stays small."""
        row_bytes = namespace.stored_dtype.itemsize
        keys = self.keys.blocks(namespace.name, rows.user_ids)
        chunk: list[_Draft] = []
        size = 0
        for index, (user_id, key) in enumerate(zip(rows.user_ids.tolist(), keys, strict=True)):
            own = rows.of(index)
            own_bytes = len(own) * row_bytes
            if own_bytes + HEADER_BYTES > MAX_BLOCK_BYTES:
                raise ValueError(
                    f"the rows of user {user_id} take {own_bytes} bytes and Redis takes values of "
                    f"{MAX_BLOCK_BYTES}; set max_rows_per_user"
                )
            if chunk and (size + own_bytes > CHUNK_BYTES or len(chunk) == CHUNK_USERS):
                yield chunk
                chunk, size = [], 0
            chunk.append(_Draft(index, user_id, key, own))
            size += own_bytes
        if chunk:
            yield chunk

    def _look(
        self, namespace: Namespace, drafts: list[_Draft], saved: NDArray[np.bool_]
    ) -> list[_Draft]:
        """Find out what is stored of each user; those that have something to store."""
        commands: list[KeyCommand] = []
        for draft in drafts:
            tombstone = self.keys.tombstone(draft.user_id)
            words = ("GETRANGE", draft.key, 0, HEADER_BYTES - 1)
            commands += [
                KeyCommand(draft.key, words),
                KeyCommand(tombstone, ("GET", tombstone)),
            ]
        found = self.link.run(commands)
        known: list[_Draft] = []
        for draft, header, tombstone in zip(drafts, found[::2], found[1::2], strict=True):
            if is_unavailable(header) or is_unavailable(tombstone):
                continue
            draft.rows = not_forgotten(draft.rows, as_until(tombstone))
            if not len(draft.rows):
                saved[draft.index] = True
                continue
            if header is Foreign.VALUE:
                self.counts.add(damaged_blocks=1)
                if is_unavailable(self.link.run([KeyCommand(draft.key, ("UNLINK", draft.key))])[0]):
                    continue
                header = b""
            draft.header, draft.tombstone = header, tombstone or b""
            draft.block = encode_block(namespace, draft.user_id, draft.rows)
            known.append(draft)
        return known

    def _merge(self, namespace: Namespace, drafts: list[_Draft]) -> list[_Draft]:
        """Make each draft's block hold what is stored too; those of them that can be written."""
        ready: list[_Draft] = []
        others: list[_Draft] = []
        for draft in drafts:
            (ready if self._may_replace(namespace, draft) else others).append(draft)
        stored = self.link.run([KeyCommand(draft.key, ("GET", draft.key)) for draft in others])
        merging: list[_Draft] = []
        old: list[NDArray[np.void]] = []
        for draft, value in zip(others, stored, strict=True):
            if is_unavailable(value) or value is Foreign.VALUE:
                continue
            value = value or b""
            draft.header = value[:HEADER_BYTES]
            rows = self._rows_in(namespace, draft.user_id, value)
            merging.append(draft)
            old.append(not_forgotten(rows, as_until(draft.tombstone)))
        for draft, rows in zip(
            merging, _merged(old, [draft.rows for draft in merging]), strict=True
        ):
            if self.max_rows_per_user is not None:
                rows = rows[-self.max_rows_per_user :]
            draft.block = encode_block(namespace, draft.user_id, rows)
        return ready + merging

    def _may_replace(self, namespace: Namespace, draft: _Draft) -> bool:
        """Whether nothing is lost if the draft takes the place of what is stored."""
        if not draft.header or draft.is_stored:
            return True
        try:
            header = BlockHeader.unpack(draft.header, namespace, draft.user_id)
        except DamagedBlockError:
            return False  # read it, so that it is counted where rows are decoded
        return header.is_covered_by(draft.rows)

    def _rows_in(self, namespace: Namespace, user_id: int, value: bytes) -> NDArray[np.void]:
        if value:
            try:
                return decode_block(namespace, user_id, value)
            except DamagedBlockError:
                self.counts.add(damaged_blocks=1)
        return np.empty(0, namespace.row_dtype)

    def _write(
        self, namespace: Namespace, drafts: list[_Draft], saved: NDArray[np.bool_]
    ) -> tuple[list[_Draft], int]:
        """Swap the blocks in, and note the users in the index; drafts that met another block than
        they had looked at, and bytes sent."""
        users = np.array([draft.user_id for draft in drafts], np.int64)
        entries: list[KeyCommand] = []
        for draft, key in zip(drafts, self.keys.indices_of(namespace.name, users), strict=True):
            newest_ms = int(draft.rows["timestamp_ms"][-1])
            entries.append(KeyCommand(key, ("ZADD", key, "GT", newest_ms, draft.user_id)))
        changed = [draft for draft in drafts if not draft.is_stored]
        swaps = [Swap(d.user_id, d.key, d.header, d.tombstone, d.block) for d in changed]
        outcomes, noted = self.swapper.run(swaps, entries)
        outcome_of = dict(zip([draft.index for draft in changed], outcomes, strict=True))
        again: list[_Draft] = []
        for draft, entry in zip(drafts, noted, strict=True):
            outcome = outcome_of.get(draft.index, True)
            if outcome is False:
                again.append(draft)
            elif outcome is True and not is_unavailable(entry):
                saved[draft.index] = True
        return again, sum(len(draft.block) for draft in changed)


def _merged(old: list[NDArray[np.void]], new: list[NDArray[np.void]]) -> list[NDArray[np.void]]:
    """Each user's ``old`` rows after an upsert of the ``new`` ones."""
    if not new:
        return []
    users = np.arange(len(new))
    runs = upsert_runs(
        len(new),
        np.concatenate(old),
        np.repeat(users, [len(rows) for rows in old]),
        np.concatenate(new),
        np.repeat(users, [len(rows) for rows in new]),
    )
    return np.split(runs.rows, runs.starts[1:-1])
