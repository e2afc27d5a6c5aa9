"""How the time of a read grows with the users that a shard holds."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.perf.figures import Figure, Measured, at_most
from benchmarks.perf.store_process import FillStore, StoreProcess
from benchmarks.perf.stored_rows import as_bytes, user_ids
from benchmarks.perf.timing import Case, ratio_of_medians, time_in_turn
from cache_actors.store.mapped_shard import MappedShard
from cache_actors.store.namespace_store import NamespaceStore
from marm.memory import Namespace

_ROWS_PER_SAVE = 8192
_ROWS_PER_VISIT = 5  # of a user at a time: one at a time takes minutes to fill a hundred thousand


@dataclass(frozen=True)
class UserGrowthSettings:
    """Sizes of the measurement."""

    depth: int = 2
    dim: int = 32
    few_users: int = 1_000
    many_users: int = 100_000
    rows_per_user: int = 20
    batch_users: int = 256
    rounds: int = 12
    reads_per_round: int = 400
    batches_per_round: int = 20
    seed: int = 0

    @property
    def namespace(self) -> Namespace:
        """Where the rows are."""
        return Namespace(depth=self.depth, dim=self.dim)


def measure_user_growth(
    settings: UserGrowthSettings, writer: StoreProcess, directory: Path
) -> Measured:
    """Reads of a store with many users over the same reads of a store with few."""
    rng = np.random.default_rng(settings.seed)
    singles: dict[str, Case] = {}
    batches: dict[str, Case] = {}
    medians: dict[str, float] = {}
    with ExitStack() as opened:
        for name, num_users in (("few", settings.few_users), ("many", settings.many_users)):
            place = directory / name
            medians[f"fill_{name}_users_rows_per_s"] = writer.fill(
                FillStore(
                    place,
                    settings.namespace,
                    num_users,
                    settings.rows_per_user,
                    _ROWS_PER_SAVE,
                    _ROWS_PER_VISIT,
                )
            )
            shard = MappedShard(place)
            opened.callback(shard.close)
            store, users = shard.open(settings.namespace), user_ids(num_users)
            _read_all(settings, store, users)
            singles[f"read_of_{name}_users"] = _single(settings, store, users, rng)
            batches[f"batch_read_of_{name}_users"] = _batch(settings, store, users, rng)
            batches[f"gather_of_{name}_users"] = _gather(settings, num_users, rng)
        seconds = time_in_turn(singles, settings.rounds, settings.reads_per_round)
        seconds |= time_in_turn(batches, settings.rounds, settings.batches_per_round)
    what = f"shard of {settings.many_users:,} users / shard of {settings.few_users:,}"
    figures = (
        Figure(
            "read_100k_over_1k",
            f"one user's {settings.rows_per_user} rows: {what}",
            ratio_of_medians(seconds["read_of_many_users"], seconds["read_of_few_users"]),
            at_most(1.3),
        ),
        Figure(
            "batch_read_100k_over_1k",
            f"{settings.batch_users} users at once: {what}",
            ratio_of_medians(
                seconds["batch_read_of_many_users"], seconds["batch_read_of_few_users"]
            ),
        ),
        Figure(
            "gather_100k_over_1k",
            "a numpy take of the same rows and users: what processor caches alone do",
            ratio_of_medians(seconds["gather_of_many_users"], seconds["gather_of_few_users"]),
        ),
    )
    medians |= {f"{name}_us": 1e6 * float(np.median(taken)) for name, taken in seconds.items()}
    return Measured(figures, medians)


def _read_all(
    settings: UserGrowthSettings, store: NamespaceStore, users: NDArray[np.int64]
) -> None:
    """Map every page, and see that every user has all rows."""
    for start in range(0, len(users), settings.batch_users):
        found = store.fetch(users[start : start + settings.batch_users], settings.rows_per_user)
        if np.any(found.counts != settings.rows_per_user):
            raise AssertionError("the store gave fewer rows than were saved")


def _single(
    settings: UserGrowthSettings,
    store: NamespaceStore,
    users: NDArray[np.int64],
    rng: np.random.Generator,
) -> Case:
    out = np.empty(settings.rows_per_user, settings.namespace.row_dtype)
    return Case(
        lambda: int(users[rng.integers(len(users))]),
        lambda user: store.fetch_into(user, len(out), out),
    )


def _batch(
    settings: UserGrowthSettings,
    store: NamespaceStore,
    users: NDArray[np.int64],
    rng: np.random.Generator,
) -> Case:
    return Case(
        lambda: users[rng.choice(len(users), settings.batch_users, replace=False)],
        lambda batch: store.fetch(batch, settings.rows_per_user),
    )


def _gather(settings: UserGrowthSettings, num_users: int, rng: np.random.Generator) -> Case:
    """The rows of a batch out of one array of as many rows as the store has."""
    per_user = settings.rows_per_user
    rows = as_bytes(np.ones(num_users * per_user, settings.namespace.row_dtype))

    def places() -> NDArray[np.int64]:
        batch = rng.choice(num_users, settings.batch_users, replace=False)
        return (batch[:, None] * per_user + np.arange(per_user)).ravel()

    return Case(places, rows.take)
