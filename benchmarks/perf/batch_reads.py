"""A training fetch: a batch of users' newest rows, against a gather of the same rows in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.perf.figures import Figure, Measured, at_most
from benchmarks.perf.store_process import FillStore, StoreProcess
from benchmarks.perf.stored_rows import RowMaker, as_bytes, user_ids
from benchmarks.perf.timing import Case, ratio_of_medians, time_in_turn
from cache_actors.store.mapped_shard import MappedShard
from marm.memory import Namespace


@dataclass(frozen=True)
class BatchReadSettings:
    """Sizes of the measurement."""

    depth: int = 2
    dim: int = 32
    num_users: int = 4096
    rows_per_user: int = 200
    batch_users: int = 256
    newest_rows: int = 64
    rounds: int = 12
    reads_per_round: int = 40
    seed: int = 0

    @property
    def namespace(self) -> Namespace:
        """Where the rows are."""
        return Namespace(depth=self.depth, dim=self.dim)


def measure_batch_reads(
    settings: BatchReadSettings, writer: StoreProcess, directory: Path
) -> Measured:
    """Both cases give fresh arrays of whole rows. The gather is told where the rows are."""
    users = user_ids(settings.num_users)
    writer.fill(
        FillStore(directory, settings.namespace, settings.num_users, settings.rows_per_user)
    )
    maker = RowMaker(settings.namespace)
    in_process = as_bytes(maker.users_rows(users, settings.rows_per_user).ravel())
    rng = np.random.default_rng(settings.seed)

    def draw_batch() -> NDArray[np.int64]:
        return rng.choice(settings.num_users, settings.batch_users, replace=False)

    def places(batch: NDArray[np.int64]) -> NDArray[np.int64]:
        newest = np.arange(settings.rows_per_user - settings.newest_rows, settings.rows_per_user)
        return (batch[:, None] * settings.rows_per_user + newest).ravel()

    shard = MappedShard(directory)
    try:
        store = shard.open(settings.namespace)
        for start in range(0, settings.num_users, settings.batch_users):  # maps every page too
            batch = np.arange(start, min(start + settings.batch_users, settings.num_users))
            found = store.fetch(users[batch], settings.newest_rows)
            if found.rows.tobytes() != in_process.take(places(batch)).tobytes():
                raise AssertionError("the store gave other rows than were saved")
        seconds = time_in_turn(
            {
                "batch_read": Case(
                    lambda: users[draw_batch()],
                    lambda batch: store.fetch(batch, settings.newest_rows),
                ),
                "gather": Case(lambda: places(draw_batch()), in_process.take),
            },
            settings.rounds,
            settings.reads_per_round,
        )
    finally:
        shard.close()
    figure = Figure(
        "batch_read_over_gather",
        "256 users' newest 64 rows of L=2, D=32 / numpy take of the same rows",
        ratio_of_medians(seconds["batch_read"], seconds["gather"]),
        at_most(4.0),
    )
    medians = {f"{name}_p50_ms": 1e3 * float(np.median(taken)) for name, taken in seconds.items()}
    return Measured((figure,), medians)
