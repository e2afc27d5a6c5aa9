"""How the time of a read grows with the rows that are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.perf.figures import Figure, Measured, Target, at_most
from benchmarks.perf.store_process import FillStore, StoreProcess
from benchmarks.perf.stored_rows import RowMaker, as_bytes, user_ids
from benchmarks.perf.timing import Case, Seconds, spread, time_in_turn
from cache_actors.store.mapped_shard import MappedShard
from cache_actors.store.namespace_store import NamespaceStore
from marm.memory import Namespace


@dataclass(frozen=True)
class RowGrowthSettings:
    """Sizes of the measurement."""

    depth: int = 4
    dim: int = 128
    num_users: int = 32
    fewest_rows: int = 50
    doublings: int = 7
    rounds: int = 8
    reads_per_round: int = 40
    seed: int = 0

    @property
    def namespace(self) -> Namespace:
        """Where the rows are."""
        return Namespace(depth=self.depth, dim=self.dim)

    @property
    def row_counts(self) -> list[int]:
        """The numbers of rows that are read."""
        return [self.fewest_rows << doubling for doubling in range(self.doublings + 1)]


def measure_row_growth(
    settings: RowGrowthSettings, writer: StoreProcess, directory: Path
) -> Measured:
    """The slope of log(time) over log(rows), of the store and of a bare copy of the same rows."""
    users, row_counts = user_ids(settings.num_users), settings.row_counts
    most = row_counts[-1]
    writer.fill(FillStore(directory, settings.namespace, settings.num_users, most))
    sources = as_bytes(RowMaker(settings.namespace).users_rows(users, most))
    shard = MappedShard(directory)
    try:
        store = shard.open(settings.namespace)
        seconds = time_in_turn(
            _cases(settings, store, users, sources), settings.rounds, settings.reads_per_round
        )
    finally:
        shard.close()
    figures = (
        _exponent("read_exponent", "read", row_counts, seconds, at_most(1.1)),
        _exponent("memcpy_exponent", "memcpy", row_counts, seconds, None),
    )
    medians = {f"{name}_us": 1e6 * float(np.median(taken)) for name, taken in seconds.items()}
    return Measured(figures, medians)


def _cases(
    settings: RowGrowthSettings,
    store: NamespaceStore,
    users: NDArray[np.int64],
    sources: NDArray[np.void],
) -> dict[str, Case]:
    """A read and a copy of every number of rows, each of a random user. The rows are checked."""
    rng = np.random.default_rng(settings.seed)
    out = np.empty(settings.row_counts[-1], settings.namespace.row_dtype)
    opaque_out = as_bytes(out)
    for user, identifier in enumerate(users.tolist()):
        count = store.fetch_into(identifier, len(out), out)
        if count != len(out) or opaque_out.tobytes() != sources[user].tobytes():
            raise AssertionError(f"the store gave other rows of user {identifier}")

    def read(num_rows: int) -> Case:
        place = out[:num_rows]
        return Case(
            lambda: int(users[rng.integers(len(users))]),
            lambda user: store.fetch_into(user, num_rows, place),
        )

    def copy(num_rows: int) -> Case:
        place = opaque_out[:num_rows]
        return Case(
            lambda: sources[rng.integers(len(users)), -num_rows:],
            lambda rows: np.copyto(place, rows),
        )

    reads = {f"read_{n}_rows": read(n) for n in settings.row_counts}
    return reads | {f"memcpy_{n}_rows": copy(n) for n in settings.row_counts}


def _exponent(
    key: str, case: str, row_counts: list[int], seconds: dict[str, Seconds], target: Target | None
) -> Figure:
    taken = np.stack([seconds[f"{case}_{n}_rows"] for n in row_counts])  # [n, rounds, repeats]
    log_rows = np.log(row_counts)

    def slope(medians: NDArray[np.float64]) -> float:
        return float(np.polyfit(log_rows, np.log(medians), 1)[0])

    by_round = np.array([slope(of_round) for of_round in np.median(taken, axis=2).T])
    return Figure(
        key,
        f"slope of log(time of a {case}) over log(rows), 50 to 6,400 rows",
        spread(slope(np.median(taken, axis=(1, 2))), by_round),
        target,
    )
