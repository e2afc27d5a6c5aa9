"""Logs to compare methods on, as events in memory, with the part that is evaluated.

`load_dataset` takes what programs get as ``--data``: a Parquet copy of MovieLens or KuaiRand
(`benchmarks.paper.parquet_copies`), a published layout of either, or ``world``, which is simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from benchmarks.paper.parquet_copies import (
    is_kuairand_copy,
    read_kuairand_copy,
    read_movielens_copy,
)
from marm.config import FEATURES, RECENCY
from marm.events import BINARY_TASKS, TASKS, EventBatch
from marm.metrics import auc, gauc
from train.data.ingest_report import IngestError
from train.data.kuairand import open_kuairand
from train.data.movielens import open_movielens
from train.data.seen_items import SeenItems
from train.data.source import Source, stage
from train.data.staged_order import in_order
from train.data.world import World
from train.data.world_config import WorldConfig
from train.floor import running_item_mean

TASK = "long_view"
"""The task of the paper's offline figures (Section 3.1.2)."""

EVALUATED_FRACTION = 0.2
"""Share of a log, at its end, that is evaluated where the log does not say which part is."""

LONG_WORLD = WorldConfig(num_users=300, num_items=4_000, num_events=600_000)
"""2,000 events of every user on average, so histories of 1,000 rows are full when evaluated."""


@dataclass(frozen=True)
class Dataset:
    """A log and how it is modelled. Both windows are streamed and learned; ``test`` is reported,
    ``tuning`` (what comes just before) is for choosing settings."""

    name: str
    events: EventBatch  # in time order
    test: NDArray[np.bool_]  # [N]
    tuning: NDArray[np.bool_]  # [N]
    features: tuple[str, ...]  # `ModelConfig.features`
    feedback_signals: tuple[str, ...]
    recency: tuple[str, ...]
    sequence: str = "all"  # `Namespace.sequence`: which events become history

    def __post_init__(self) -> None:
        count = len(self.events)
        if self.test.shape != (count,) or self.tuning.shape != (count,):
            raise ValueError(
                f"both windows need a flag for each of the {count} events, got shapes "
                f"{self.test.shape} and {self.tuning.shape}"
            )
        if np.any(np.diff(self.events.timestamp_ms) < 0):
            raise ValueError("the events of a data set must be in time order; sort them")

    @property
    def labels(self) -> NDArray[np.float32]:
        """Labels of `TASK`, ``[N]``; NaN where not observed."""
        return self.events.labels[:, TASKS.index(TASK)]

    def window(self, name: str) -> NDArray[np.bool_]:
        """The events of the window ``test`` or ``tuning`` with an observed label, ``[N]``."""
        windows = {"test": self.test, "tuning": self.tuning}
        if name not in windows:
            raise ValueError(f"a window is one of {', '.join(windows)}, got {name!r}")
        return windows[name] & ~np.isnan(self.labels)

    def fingerprint(self) -> str:
        """A digest of everything here: equal data give equal digests in every process."""
        digest = xxhash.xxh3_128()
        for field in fields(EventBatch):
            digest.update(np.ascontiguousarray(getattr(self.events, field.name)).tobytes())
        for flags in (self.test, self.tuning):
            digest.update(np.packbits(flags).tobytes())
        modelled = self.features, self.feedback_signals, self.recency, self.sequence
        digest.update(repr(modelled).encode())
        return digest.hexdigest()

    def first(self, num_events: int) -> Dataset:
        """Only the first events, for a quick look: the last part of them is evaluated."""
        windows = last_part(len(self), num_events)
        return replace(self, events=self.events.take(slice(0, num_events)), **windows)

    def __len__(self) -> int:
        return len(self.events)


def load_dataset(data: str, limit: int | None = None) -> Dataset:
    """The data set that ``--data`` means.

    Args:
        data: a Parquet file; a published ratings.dat, ratings.csv or log_standard*.csv, or a
            directory that holds one; or ``world``, which takes settings of `WorldConfig`, such as
            ``world:num_users=100,num_events=50000``.
        limit: only so many events, from the start; the last part of them is evaluated.

    Raises:
        IngestError: when it can't be read; the message says what is wrong and what to do.
    """
    if data == "world" or data.startswith("world:"):
        dataset = _world(parse_world(data))
    elif data.endswith(".parquet"):
        dataset = _parquet_copy(Path(data).expanduser())
    else:
        dataset = _published(data)
    if not len(dataset):
        raise IngestError(f"{data} holds no usable event; check its columns and time unit")
    return dataset if limit is None or limit >= len(dataset) else dataset.first(limit)


def last_part(available: int, num_events: int) -> dict[str, Any]:
    """The windows ``test`` and ``tuning`` at the end of the first ``num_events`` events."""
    count = min(available, num_events)
    evaluated = round(count * EVALUATED_FRACTION)
    place = np.arange(count)
    test = place >= count - evaluated
    return {"test": test, "tuning": ~test & (place >= count - 2 * evaluated)}


def item_mean_floor(dataset: Dataset, window: str = "test") -> dict[str, float]:
    """AUC and GAUC of a running, smoothed mean label of each item: what every model must beat."""
    observed = ~np.isnan(dataset.labels)
    labels = dataset.labels[observed]
    scores = running_item_mean(dataset.events.item_id[observed], labels)
    kept = dataset.window(window)[observed]
    users = dataset.events.user_id[observed]
    return {
        "auc": auc(labels[kept], scores[kept]),
        "gauc": gauc(users[kept], labels[kept], scores[kept]),
    }


def users_with_both_labels(dataset: Dataset, window: str = "test") -> int:
    """Users whom GAUC (Eq. 10) is over: all that a comparison of two methods has to go by."""
    kept = dataset.window(window) & ~np.isnan(dataset.labels)
    users, positive = dataset.events.user_id[kept], dataset.labels[kept] > 0
    return len(np.intersect1d(users[positive], users[~positive]))


def parse_world(data: str) -> WorldConfig:
    """``world:num_users=100,seed=3`` as settings over `LONG_WORLD`."""
    types = {field.name: type(getattr(LONG_WORLD, field.name)) for field in fields(WorldConfig)}
    settings = {}
    for pair in filter(None, data.partition(":")[2].split(",")):
        name, _, value = pair.partition("=")
        if name not in types:
            raise IngestError(f"a world has no setting {name!r}; it has {', '.join(types)}")
        try:
            settings[name] = types[name](value)
        except ValueError as error:
            kind = types[name].__name__
            raise IngestError(f"{name} of a world is of type {kind}, got {value!r}") from error
    return replace(LONG_WORLD, **settings)


def _world(config: WorldConfig) -> Dataset:
    events = EventBatch.concat(list(World(config).stream()))
    return Dataset(
        f"world-{config.num_users}-users-seed-{config.seed}",
        events,
        **last_part(len(events), len(events)),
        features=FEATURES,
        feedback_signals=BINARY_TASKS,
        recency=RECENCY,
    )


def _parquet_copy(path: Path) -> Dataset:
    if is_kuairand_copy(path):
        events, is_log = read_kuairand_copy(path)
        before = np.flatnonzero(~is_log)
        tuning = np.zeros(len(events), np.bool_)
        tuning[before[len(before) - round(len(before) * EVALUATED_FRACTION) :]] = True
        return _kuairand(path.stem, events, {"test": is_log, "tuning": tuning})
    return _movielens(path.stem, read_movielens_copy(path))


def _published(data: str) -> Dataset:
    if any(Path(path).name.startswith("log_") for path in _files_of(data)):
        events = _events_of(open_kuairand(data))
        return _kuairand(Path(data).stem, events, last_part(len(events), len(events)))
    return _movielens(Path(data).stem, _events_of(open_movielens(data)))


def _files_of(data: str) -> Sequence[Path]:
    path = Path(data).expanduser()
    return sorted(path.rglob("log_standard*.csv")) if path.is_dir() else [path]


def _events_of(source: Source) -> EventBatch:
    staged = [stage(part, source.layout, source.timestamp_unit) for part in source.fragments]
    return SeenItems(source.items).complete(in_order(pa.concat_tables(staged)))


def _movielens(name: str, events: EventBatch) -> Dataset:
    """Without time gaps in every copy: where part of the clock is bracketed between known times,
    the gaps give labels away."""
    return Dataset(
        name,
        events,
        **last_part(len(events), len(events)),
        features=("item", "tag"),
        feedback_signals=(TASK,),
        recency=("distance",),
    )


def _kuairand(name: str, events: EventBatch, windows: dict[str, NDArray[np.bool_]]) -> Dataset:
    """With long views only as history: a user has few events, so a model that sees how many of the
    last ones were liked follows their chance rise and fall, which says the opposite of what comes
    next within the user's own few events, and that is what GAUC looks at."""
    return Dataset(
        name,
        events,
        **windows,
        features=FEATURES,
        feedback_signals=("click", "long_view", "like"),
        recency=RECENCY,
        sequence=TASK,
    )
