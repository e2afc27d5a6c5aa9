"""Users' rows in Redis: the durable tier of a pool."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_actors.tiers.block_swap import BlockSwapper
from cache_actors.tiers.block_trimmer import BlockTrimmer
from cache_actors.tiers.block_writer import CHUNK_USERS, BlockWriter
from cache_actors.tiers.durable_tier import (
    DurableTierUnavailableError,
    TierRead,
    TierStats,
    TierWrite,
)
from cache_actors.tiers.redis_keys import RedisKeys
from cache_actors.tiers.redis_link import (
    KeyCommand,
    RedisLink,
    is_unavailable,
    open_link,
    raise_unavailable,
)
from cache_actors.tiers.redis_node import Command, Foreign
from cache_actors.tiers.redis_server_check import RedisTierError
from cache_actors.tiers.redis_url import RedisUrl, parse_redis_url
from cache_actors.tiers.tier_counts import TierCounts
from cache_actors.tiers.tombstones import as_until, not_forgotten
from cache_actors.tiers.user_block import DamagedBlockError, decode_block
from cache_actors.tiers.user_index import UserIndex
from marm.memory import Namespace, UserRows

logger = logging.getLogger(__name__)


class RedisTier:
    """See `DurableTier`. Safe for many threads; every process connects for itself."""

    def __init__(
        self,
        url: RedisUrl,
        pool_name: str,
        max_rows_per_user: int | None = None,
        ttl_s: float | None = None,
    ) -> None:
        """A tier that connects when it is first used. ``max_rows_per_user`` and ``ttl_s`` are
        those of the pool's stores: what they would drop isn't kept here either."""
        self.url = url
        self._keys = RedisKeys(pool_name)
        self._link: RedisLink = open_link(url)
        self._counts = TierCounts()
        self._index = UserIndex(self._link, self._keys)
        swapper = BlockSwapper(self._link, self._keys, ttl_s)
        self._trimmer = BlockTrimmer(self._link, self._keys, swapper)
        self._writer = BlockWriter(self._link, self._keys, swapper, self._counts, max_rows_per_user)

    @staticmethod
    def connect(
        url: str,
        pool_name: str,
        max_rows_per_user: int | None = None,
        ttl_s: float | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> RedisTier:
        """The tier at ``url``. A Redis that is down is no error: it is used once it is back.

        Raises:
            RedisUrlError: the URL is invalid.
            RedisTierError: what answers is not a Redis, or not one that can be used.
        """
        tier = RedisTier(parse_redis_url(url, environ), pool_name, max_rows_per_user, ttl_s)
        try:
            tier.check()
        except DurableTierUnavailableError as error:
            logger.warning("the durable tier is down, going on without it: %s", error)
        except BaseException:
            tier.close()
            raise
        return tier

    def check(self) -> str:
        """What answers at the URL, for people; raises if nothing does or it is no Redis."""
        facts = self._link.facts()
        for server in facts:
            policy = server.get("maxmemory_policy", "noeviction")
            if server.get("maxmemory") and policy != "noeviction":
                logger.warning(
                    "the Redis at %s drops rows when it is full (maxmemory-policy %s); set it to "
                    "noeviction, so that it refuses new ones instead",
                    self.url,
                    policy,
                )
        versions = sorted({str(server.get("redis_version", "?")) for server in facts})
        servers = "1 server" if len(facts) == 1 else f"{len(facts)} servers"
        return f"Redis {', '.join(versions)} at {self.url}, {servers}"

    def try_put(self, namespace: Namespace, rows: UserRows) -> TierWrite:
        """See `DurableTier.try_put`."""
        if rows.rows.dtype != namespace.row_dtype:
            raise ValueError(
                f"rows to put must have the row_dtype of {namespace.name}: {namespace.row_dtype}, "
                f"got {rows.rows.dtype}"
            )
        described = json.dumps(asdict(namespace))
        answers = self._link.run(
            [self._about(self._keys.namespaces, "HSETNX", namespace.name, described)]
        )
        if is_unavailable(answers[0]):
            self._counts.add(errors=1)
            return TierWrite(np.zeros(len(rows.user_ids), np.bool_), 0)
        return self._writer.add(namespace, rows)

    def put(self, namespace: Namespace, rows: UserRows) -> TierWrite:
        """See `DurableTier.put`."""
        write = self.try_put(namespace, rows)
        if not write.saved.all():
            raise DurableTierUnavailableError(
                f"{int((~write.saved).sum())} of {len(write.saved)} users could not be stored in "
                f"{self.url}; put them again when it is back (next try in "
                f"{self._link.wait_s():.1f} s)"
            )
        return write

    def read(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> TierRead:
        """See `DurableTier.read`."""
        user_ids = np.ascontiguousarray(user_ids, np.int64)
        damaged = np.zeros(len(user_ids), np.bool_)
        unavailable = np.zeros(len(user_ids), np.bool_)
        parts: list[NDArray[np.void]] = []
        offsets = np.zeros(len(user_ids) + 1, np.int64)
        read_bytes = forgotten_rows = 0
        for index, (value, tombstone) in enumerate(self._values(namespace, user_ids)):
            offsets[index + 1] = offsets[index]
            if is_unavailable(value) or is_unavailable(tombstone):
                unavailable[index] = True
                continue
            if value is None:
                continue
            if value is Foreign.VALUE:
                damaged[index] = True
                continue
            read_bytes += len(value)
            try:
                rows = decode_block(namespace, int(user_ids[index]), value)
            except DamagedBlockError as error:
                logger.warning("dropped a block in Redis: %s", error)
                damaged[index] = True
                self._trimmer.drop(namespace, int(user_ids[index]), value, tombstone)
                continue
            kept = not_forgotten(rows, as_until(tombstone))
            forgotten_rows += len(rows) - len(kept)
            offsets[index + 1] += len(kept)
            parts.append(kept)
        packed = np.concatenate(parts) if parts else np.empty(0, namespace.row_dtype)
        hits = int(np.count_nonzero(np.diff(offsets)))
        self._counts.add(
            hits=hits,
            misses=len(user_ids) - hits - int(unavailable.sum()),
            read_users=hits,
            read_bytes=read_bytes,
            damaged_blocks=int(damaged.sum()),
            forgotten_rows=forgotten_rows,
            errors=int(unavailable.any()),
        )
        return TierRead(UserRows(user_ids, offsets, packed), damaged, unavailable)

    def get(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> UserRows:
        """See `DurableTier.get`."""
        found = self.read(namespace, user_ids)
        if found.unavailable.any():
            raise DurableTierUnavailableError(
                f"{int(found.unavailable.sum())} of {len(user_ids)} users can't be read from "
                f"{self.url} now (next try in {self._link.wait_s():.1f} s)"
            )
        return found.rows

    def delete(self, user_ids: NDArray[np.int64]) -> int:
        """See `DurableTier.delete`."""
        user_ids = np.ascontiguousarray(user_ids, np.int64)
        removed = 0
        for namespace in self.namespaces():
            keys = self._keys.blocks(namespace.name, user_ids)
            indices = self._keys.indices_of(namespace.name, user_ids)
            blocks = self._run([self._about(key, "UNLINK") for key in keys])
            members = zip(indices, user_ids.tolist(), strict=True)
            self._run([self._about(key, "ZREM", user_id) for key, user_id in members])
            removed += sum(blocks)
        return removed

    def drop(self, namespace: Namespace, buckets: Sequence[int]) -> int:
        """See `DurableTier.drop`."""
        removed = 0
        for user_ids in self.scan(namespace, buckets):
            keys = self._keys.blocks(namespace.name, user_ids)
            removed += sum(self._run([self._about(key, "UNLINK") for key in keys]))
        indices = [self._keys.users(namespace.name, bucket) for bucket in buckets]
        self._run([self._about(key, "UNLINK") for key in indices])
        return removed

    def forget(self, user_id: int, until_ms: int) -> int:
        """See `DurableTier.forget`. The refusal is stored first: no put can slip in between."""
        tombstone = self._keys.tombstone(user_id)
        (stored,) = self._run([self._about(tombstone, "GET")])
        until_ms = max(until_ms, as_until(stored) or until_ms)
        self._run(
            [
                self._about(tombstone, "SET", until_ms),
                self._about(self._keys.forgotten, "HSET", user_id, until_ms),
            ]
        )
        removed = 0
        for namespace in self.namespaces():
            removed += self._trimmer.trim(namespace, user_id, until_ms)
        return removed

    def forgotten(self) -> dict[int, int]:
        """See `DurableTier.forgotten`."""
        (stored,) = self._run([self._about(self._keys.forgotten, "HGETALL")])
        return {int(user_id): int(until_ms) for user_id, until_ms in stored.items()}

    def namespaces(self) -> list[Namespace]:
        """See `DurableTier.namespaces`."""
        (stored,) = self._run([self._about(self._keys.namespaces, "HGETALL")])
        return [Namespace(**json.loads(stored[name])) for name in sorted(stored)]

    def scan(self, namespace: Namespace, buckets: Sequence[int]) -> Iterator[NDArray[np.int64]]:
        """See `DurableTier.scan`."""
        return self._index.newest_first(namespace.name, buckets)

    def identity(self) -> str:
        """See `DurableTier.identity`: the runs of all servers that hold data.

        One that was started again may have lost its last writes, or everything, and a replica that
        took over may never have had them.
        """
        servers = self._link.facts("server")
        return ",".join(sorted(str(server.get("run_id", "?")) for server in servers))

    def synced_identity(self, store_id: str) -> str | None:
        """See `DurableTier.synced_identity`."""
        (stored,) = self._run([self._about(self._keys.synced, "HGET", store_id)])
        return None if stored is None else stored.decode()

    def set_synced(self, store_id: str, identity: str) -> None:
        """See `DurableTier.set_synced`."""
        self._run([self._about(self._keys.synced, "HSET", store_id, identity)])

    def stats(self) -> TierStats:
        """See `DurableTier.stats`."""
        return self._counts.stats(self._link.available())

    def close(self) -> None:
        """See `DurableTier.close`."""
        self._link.close()

    def _values(
        self, namespace: Namespace, user_ids: NDArray[np.int64]
    ) -> Iterator[tuple[Any, Any]]:
        """Answers for block and tombstone of every user. Two commands, where one for both would
        do: a cluster refuses commands on several keys of a slot while it moves the slot."""
        keys = self._keys.blocks(namespace.name, user_ids)
        tombstones = [self._keys.tombstone(user_id) for user_id in user_ids.tolist()]
        for start in range(0, len(keys), CHUNK_USERS):
            part = slice(start, start + CHUNK_USERS)
            answers = self._link.run(
                [
                    self._about(key, "GET")
                    for pair in zip(keys[part], tombstones[part], strict=True)
                    for key in pair
                ]
            )
            yield from zip(answers[::2], answers[1::2], strict=True)

    def _about(self, key: str, name: str, *words: str | bytes | int) -> KeyCommand:
        command: Command = (name, key, *words)
        return KeyCommand(key, command)

    def _run(self, commands: Sequence[KeyCommand]) -> list[Any]:
        """All answers, or an error."""
        answers = self._link.run(commands)
        try:
            raise_unavailable(answers)
        except DurableTierUnavailableError:
            self._counts.add(errors=1)
            raise
        for command, answer in zip(commands, answers, strict=True):
            if answer is Foreign.VALUE:
                raise RedisTierError(
                    f"{command.key} in {self.url} holds a value that this pool did not write; "
                    "delete it, or give the pool a db of its own"
                )
        return answers
