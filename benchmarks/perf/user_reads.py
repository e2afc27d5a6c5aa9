"""One user's newest rows, as ranking reads them, against a bare copy and against Redis.

The store is read from its mapping while its writer, another process, appends. All cases read a
random user of the same many, so that their bytes are equally likely to be in a processor cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import redis

from benchmarks.perf.figures import Figure, Measured, at_most
from benchmarks.perf.footprint import row_store_footprint
from benchmarks.perf.redis_process import RedisProcess
from benchmarks.perf.store_process import Append, FillStore, StoreProcess
from benchmarks.perf.stored_rows import RowMaker, as_bytes, user_ids
from benchmarks.perf.timing import Case, Ratio, Seconds, ratio_of_medians, spread, time_in_turn
from cache_actors.store.mapped_shard import MappedShard
from cache_actors.store.namespace_store import NamespaceStore
from marm.memory import Namespace

_MSET_KEYS = 1024


@dataclass(frozen=True)
class UserReadSettings:
    """Sizes of the measurement."""

    depth: int = 4
    dim: int = 128
    num_users: int = 512
    rows_per_user: int = 200
    rounds: int = 12
    reads_per_round: int = 300
    appended_rows_per_save: int = 64
    saves_per_s: float = 20.0
    seed: int = 0

    @property
    def namespace(self) -> Namespace:
        """Where the rows are."""
        return Namespace(depth=self.depth, dim=self.dim)


def measure_user_reads(
    settings: UserReadSettings, writer: StoreProcess, server: RedisProcess, directory: Path
) -> list[Measured]:
    """Times of reads, and the bytes that the store takes before anything is appended."""
    rows_per_s = writer.fill(
        FillStore(directory, settings.namespace, settings.num_users, settings.rows_per_user)
    )
    payload_bytes = (
        settings.num_users
        * settings.rows_per_user
        * np.dtype((settings.namespace.memory_dtype, (settings.depth, settings.dim))).itemsize
    )
    footprint = row_store_footprint(directory, payload_bytes)
    tcp = redis.Redis.from_url(server.tcp_url)
    unix = redis.Redis.from_url(server.unix_url)
    readers = _Readers(settings, tcp, unix)
    redis_bytes = readers.load_redis()
    shard = MappedShard(directory)
    append = Append(
        directory, settings.appended_rows_per_save, settings.saves_per_s, settings.seed + 1
    )
    try:
        store = shard.open(settings.namespace)
        readers.check(store)
        with writer.appending(append) as appended:
            seconds = time_in_turn(readers.cases(store), settings.rounds, settings.reads_per_round)
    finally:
        shard.close()
        tcp.flushall()
    medians = {
        "store_fill_rows_per_s": rows_per_s,
        "appended_rows_per_s_meanwhile": appended[0].rows_per_s,
        "append_save_p50_ms": appended[0].save_p50_ms,
        "redis_key_bytes_over_payload": redis_bytes.keys_bytes / payload_bytes,
        "redis_block_bytes_over_payload": redis_bytes.blocks_bytes / payload_bytes,
    }
    return [_figures(seconds, medians), footprint]


@dataclass(frozen=True)
class _RedisBytes:
    blocks_bytes: int
    keys_bytes: int


class _Readers:
    """The same rows in this process, in Redis as blocks and in Redis as the paper's keys."""

    def __init__(self, settings: UserReadSettings, tcp: redis.Redis, unix: redis.Redis) -> None:
        self._settings = settings
        self._tcp, self._unix = tcp, unix
        self._rng = np.random.default_rng(settings.seed)
        self._users = user_ids(settings.num_users)
        maker = RowMaker(settings.namespace)
        self._sources = maker.users_rows(self._users, settings.rows_per_user)
        self._opaque = as_bytes(self._sources)
        self._out = np.empty(settings.rows_per_user, settings.namespace.row_dtype)
        self._opaque_out = as_bytes(self._out)
        self._keys = [self._layer_keys(user) for user in range(settings.num_users)]

    def load_redis(self) -> _RedisBytes:
        """Blocks and keys of all users; the bytes that each took of the server's memory."""
        empty = self._used_bytes()
        for user in range(self._settings.num_users):
            self._tcp.set(self._block_key(user), self._opaque[user].tobytes())
        blocks = self._used_bytes()
        pipeline = self._tcp.pipeline(transaction=False)
        for user, keys in enumerate(self._keys):
            layers = self._sources[user]["memory"].reshape(len(keys), -1)
            for start in range(0, len(keys), _MSET_KEYS):
                part = slice(start, start + _MSET_KEYS)
                values = (vector.tobytes() for vector in layers[part])
                pipeline.mset(dict(zip(keys[part], values, strict=True)))
            pipeline.execute()
        return _RedisBytes(blocks - empty, self._used_bytes() - blocks)

    def check(self, store: NamespaceStore) -> None:
        """Every way reads the same rows. Reads all users once, which also maps all pages."""
        for user, identifier in enumerate(self._users.tolist()):
            count = store.fetch_into(identifier, len(self._out), self._out)
            expected = self._opaque[user].tobytes()
            if count != len(self._out) or self._opaque_out.tobytes() != expected:
                raise AssertionError(f"the store gave other rows of user {identifier}")
            if self._tcp.get(self._block_key(user)) != expected:
                raise AssertionError(f"Redis gave another block of user {identifier}")
        values = [value for value in self._tcp.mget(self._keys[0]) if isinstance(value, bytes)]
        if b"".join(values) != self._sources[0]["memory"].tobytes():
            raise AssertionError("Redis gave other values of the layers of a user")

    def cases(self, store: NamespaceStore) -> dict[str, Case]:
        """What is timed; the argument is the number of a user, or what stands for it."""
        num_rows, out = len(self._out), self._out
        opaque, opaque_out = self._opaque, self._opaque_out
        identifiers, block_keys = self._users.tolist(), list(map(self._block_key, self._all()))
        return {
            "read": Case(
                self._draw(identifiers.__getitem__),
                lambda user: store.fetch_into(user, num_rows, out),
            ),
            "memcpy": Case(
                self._draw(opaque.__getitem__), lambda rows: np.copyto(opaque_out, rows)
            ),
            "redis_get": Case(self._draw(block_keys.__getitem__), self._tcp.get),
            "redis_mget": Case(self._draw(self._keys.__getitem__), self._tcp.mget),
            "redis_get_unix": Case(self._draw(block_keys.__getitem__), self._unix.get),
            "redis_mget_unix": Case(self._draw(self._keys.__getitem__), self._unix.mget),
        }

    def _draw(self, argument_of: Callable[[int], object]) -> Callable[[], object]:
        return lambda: argument_of(int(self._rng.integers(self._settings.num_users)))

    def _all(self) -> range:
        return range(self._settings.num_users)

    def _used_bytes(self) -> int:
        return int(self._tcp.info("memory")["used_memory"])

    def _block_key(self, user: int) -> bytes:
        return b"block:%d" % self._users[user]

    def _layer_keys(self, user: int) -> list[bytes]:
        """The paper's layout: one key for each user, item and layer."""
        prefix = int(self._users[user])
        items = self._sources[user]["item_id"].tolist()
        return [
            b"%d:%d:%d:%d" % (prefix, place, item, layer)
            for place, item in enumerate(items)
            for layer in range(self._settings.depth)
        ]


def _figures(seconds: dict[str, Seconds], medians: dict[str, float]) -> Measured:
    read = seconds["read"]
    figures = (
        Figure(
            "read_over_memcpy",
            "one user's newest 200 rows into a caller's array / memcpy of the same bytes",
            ratio_of_medians(read, seconds["memcpy"]),
            at_most(3.0),
        ),
        Figure(
            "read_over_redis_get",
            "the same read / Redis GET of the same block",
            ratio_of_medians(read, seconds["redis_get"]),
            at_most(0.25),
        ),
        Figure(
            "read_over_redis_mget",
            "the same read / Redis MGET of its 800 (item, layer) keys",
            ratio_of_medians(read, seconds["redis_mget"]),
            at_most(0.06),
        ),
        Figure(
            "read_p99_over_p50",
            "p99 of the read / its p50, while a writer appends",
            _tail(read),
            at_most(5.0),
        ),
        Figure(
            "memcpy_p99_over_p50",
            "the same of the memcpy: what this machine's other work alone does",
            _tail(seconds["memcpy"]),
        ),
    )
    times = {f"{name}_p50_us": 1e6 * float(np.median(taken)) for name, taken in seconds.items()}
    times |= {
        f"{name}_p99_us": 1e6 * float(np.quantile(taken, 0.99)) for name, taken in seconds.items()
    }
    return Measured(figures, times | medians)


def _tail(seconds: Seconds) -> Ratio:
    """p99 over p50 of all times, with the spread of the same over the rounds."""
    high, middle = np.quantile(seconds, [0.99, 0.5], axis=1)
    return spread(float(np.quantile(seconds, 0.99) / np.median(seconds)), high / middle)
