"""Taking rows out of users' blocks in Redis: those forgotten, and those damaged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_actors.tiers.block_swap import BlockSwapper, Swap
from cache_actors.tiers.durable_tier import DurableTierUnavailableError
from cache_actors.tiers.redis_keys import RedisKeys
from cache_actors.tiers.redis_link import KeyCommand, RedisLink, raise_unavailable
from cache_actors.tiers.redis_node import Foreign
from cache_actors.tiers.tombstones import not_forgotten
from cache_actors.tiers.user_block import (
    HEADER_BYTES,
    DamagedBlockError,
    decode_block,
    encode_block,
)
from marm.memory import Namespace

_MOST_TRIES = 8


@dataclass(frozen=True)
class BlockTrimmer:
    """Shortens and removes blocks of one pool."""

    link: RedisLink
    keys: RedisKeys
    swapper: BlockSwapper

    def trim(self, namespace: Namespace, user_id: int, until_ms: int) -> int:
        """Remove a user's rows up to a time; how many there were. A damaged block is removed."""
        (key,) = self.keys.blocks(namespace.name, np.array([user_id]))
        for _ in range(_MOST_TRIES):
            value, tombstone = self._get(key, user_id)
            if value is None:
                return 0
            rows = _rows_in(namespace, user_id, value)
            kept = not_forgotten(rows, until_ms)
            if len(rows) and len(kept) == len(rows):
                return 0
            block = encode_block(namespace, user_id, kept) if len(kept) else b""
            swap = Swap(user_id, key, value[:HEADER_BYTES], tombstone or b"", block)
            (outcome,), _ = self.swapper.run([swap], [])
            raise_unavailable([outcome])
            if outcome is True:
                if not block:
                    self._leave_index(namespace, user_id)
                return len(rows) - len(kept)
        raise DurableTierUnavailableError(f"user {user_id} is being written all the time")

    def drop(
        self, namespace: Namespace, user_id: int, damaged: bytes, tombstone: bytes | None
    ) -> None:
        """Remove a damaged block, if it is still the one there, so that the next put sends all:
        its header may be intact. Not doing it is no harm: the block is checked at every read."""
        (key,) = self.keys.blocks(namespace.name, np.array([user_id]))
        header = damaged[:HEADER_BYTES]
        self.swapper.run([Swap(user_id, key, header, tombstone or b"", b"")], [])

    def _leave_index(self, namespace: Namespace, user_id: int) -> None:
        (key,) = self.keys.indices_of(namespace.name, np.array([user_id]))
        raise_unavailable(self.link.run([KeyCommand(key, ("ZREM", key, user_id))]))

    def _get(self, key: str, user_id: int) -> tuple[bytes | None, bytes | None]:
        """A user's block and tombstone. A value of another type is removed: it can't be rows."""
        tombstone = self.keys.tombstone(user_id)
        answers = self.link.run([KeyCommand(name, ("GET", name)) for name in (key, tombstone)])
        raise_unavailable(answers)
        if answers[0] is Foreign.VALUE:
            raise_unavailable(self.link.run([KeyCommand(key, ("UNLINK", key))]))
            answers[0] = None
        return answers[0], answers[1]


def _rows_in(namespace: Namespace, user_id: int, value: bytes) -> NDArray[np.void]:
    try:
        return decode_block(namespace, user_id, value)
    except DamagedBlockError:
        return np.empty(0, namespace.row_dtype)
