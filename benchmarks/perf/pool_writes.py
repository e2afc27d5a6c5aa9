"""Saves through the pool's actor, against pipelined MSETs of the same bytes to Redis."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import redis
from numpy.typing import NDArray

from benchmarks.perf.figures import Figure, Measured, at_least
from benchmarks.perf.stored_rows import RowMaker, as_bytes, user_ids
from benchmarks.perf.timing import Case, ratio_of_medians, time_in_turn
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.lifecycle import start_pool, stop_pool
from marm.memory import Namespace

_ACK_TIMEOUT_S = 120.0

Save = tuple[NDArray[np.int64], NDArray[np.void]]
MsetPipeline = list[dict[bytes, bytes]]


@dataclass(frozen=True)
class PoolWriteSettings:
    """Sizes of the measurement. Users are drawn with probability ~ 1 / rank."""

    depth: int = 4
    dim: int = 64
    num_shards: int = 1
    num_users: int = 20_000
    rows_per_save: int = 1024
    saves_per_round: int = 400
    msets_per_pipeline: int = 4
    rounds: int = 5
    seed: int = 0

    @property
    def namespace(self) -> Namespace:
        """Where the rows go."""
        return Namespace(depth=self.depth, dim=self.dim)


def measure_pool_writes(settings: PoolWriteSettings, redis_url: str, home: Path) -> Measured:
    """One round is a run of saves from the first to the acknowledgement of the last.

    Both sides keep every row that they get and grow from round to round. Redis has one key for
    each row, the layout in which it takes rows fastest, and its commands' contents are prepared
    before the clock starts. Neither side syncs to a disk.
    """
    server = redis.Redis.from_url(redis_url)
    pool = start_pool(home, settings.num_shards)
    try:
        with MemoryClient(pool, settings.namespace) as client:
            pool_stream, redis_stream = _RowStream(settings), _RowStream(settings)
            seconds = time_in_turn(
                {
                    "pool": Case(pool_stream.saves, lambda saves: save_all(client, saves)),
                    "redis": Case(redis_stream.pipelines, lambda part: mset_all(server, part)),
                },
                settings.rounds,
                repeats=1,
            )
            held = client.stats().rows
    finally:
        stop_pool(pool)
        server.flushall()
    if held != pool_stream.num_rows:
        raise AssertionError(f"{pool_stream.num_rows} rows were acknowledged, {held} are held")
    figure = Figure(
        "write_over_redis",
        "rows/s of 1,024-row saves through the actor / of pipelined Redis MSET",
        ratio_of_medians(seconds["redis"], seconds["pool"]),
        at_least(1.0),
    )
    rows_per_round = settings.rows_per_save * settings.saves_per_round
    medians = {
        f"{name}_write_rows_per_s": rows_per_round / float(np.median(taken))
        for name, taken in seconds.items()
    }
    return Measured((figure,), medians)


def save_all(client: MemoryClient, saves: list[Save]) -> None:
    """Send every save, as many at a time as the client allows, and await all."""
    acks = deque(client.save(users, rows) for users, rows in saves)
    while acks:
        acks.popleft().wait(_ACK_TIMEOUT_S)


def mset_all(server: redis.Redis, pipelines: list[MsetPipeline]) -> None:
    """Send every pipeline and read its replies."""
    for msets in pipelines:
        pipeline = server.pipeline(transaction=False)
        for mapping in msets:
            pipeline.mset(mapping)
        pipeline.execute()


class _RowStream:
    """Rows of increasing time of Zipf-distributed users; two streams give the same."""

    def __init__(self, settings: PoolWriteSettings) -> None:
        self.num_rows = 0
        self._settings = settings
        self._rng = np.random.default_rng(settings.seed)
        self._users = user_ids(settings.num_users)
        self._maker = RowMaker(settings.namespace)
        weights = 1 / np.arange(1, settings.num_users + 1)
        self._probabilities = weights / weights.sum()

    def saves(self) -> list[Save]:
        """The next round."""
        return [self._next_save() for _ in range(self._settings.saves_per_round)]

    def pipelines(self) -> list[MsetPipeline]:
        """The next round as commands of Redis."""
        msets = [self._as_mset(*save) for save in self.saves()]
        size = self._settings.msets_per_pipeline
        return [msets[start : start + size] for start in range(0, len(msets), size)]

    def _next_save(self) -> Save:
        size = self._settings.rows_per_save
        users = self._users[self._rng.choice(self._settings.num_users, size, p=self._probabilities)]
        sequence = np.arange(self.num_rows, self.num_rows + size)
        self.num_rows += size
        return users, self._maker.rows(users, sequence)

    def _as_mset(self, users: NDArray[np.int64], rows: NDArray[np.void]) -> dict[bytes, bytes]:
        keys = np.stack([users.view(np.uint64), rows["event_key"]], axis=1)
        values = as_bytes(rows)
        return {key.tobytes(): value.tobytes() for key, value in zip(keys, values, strict=True)}
