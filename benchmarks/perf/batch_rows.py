"""What laying a batch's own events out by user saves in training, and when (`marm.batch_rows`).

    python -m benchmarks.perf.batch_rows --data ratings.parquet --output batch_rows.json

Passes over the first events of a log with each layout in turn: the whole block, by user, and what
training chooses batch by batch. What counts is the CPU time of all threads, so other work on the
machine matters little. The last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from unittest.mock import patch

import numpy as np
from torch import Tensor

from benchmarks.paper.datasets import Dataset, load_dataset
from benchmarks.paper.plan import CommonSettings, parse_method
from benchmarks.paper.trial import run_pass
from benchmarks.perf.figures import (
    Figure,
    Measured,
    data_name,
    json_line,
    print_table,
    write_result,
)
from benchmarks.perf.timing import Ratio
from marm.batch_rows import BatchRows, BlockByUser, KeySource, WholeBlock, batch_rows

Layout = Callable[[KeySource, Tensor], BatchRows]
LAYOUTS: dict[str, Layout] = {
    "whole": lambda block, user_row_B: WholeBlock(block),
    "by_user": BlockByUser.of,
    "chosen": batch_rows,
}
_READERS = "marm.attention.batch_rows", "marm.interest.stca.batch_rows"
_WARM_UP_EVENTS = 2_048


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement."""

    data: str
    events: int = 40_000
    rounds: int = 3
    history: int = 50
    method: str = "marm_l2"
    batch_sizes: tuple[int, ...] = (256, 512, 1024)


def measure(settings: Settings) -> Measured:
    """CPU time of a pass by layout over that with whole blocks, for every batch size."""
    dataset = load_dataset(settings.data, settings.events)
    warm_up = load_dataset(settings.data, min(settings.events, _WARM_UP_EVENTS))
    figures: list[Figure] = []
    medians: dict[str, float] = {}
    for batch_size in settings.batch_sizes:
        seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        taken: list[bool] = []
        for name in LAYOUTS:
            cpu_seconds(warm_up, settings, batch_size, LAYOUTS[name])
        for turn in range(settings.rounds):
            # Whoever comes first, all come first as often.
            for name in np.roll(list(LAYOUTS), turn):
                noted = taken if name == "chosen" else []
                seconds[name].append(
                    cpu_seconds(dataset, settings, batch_size, noting(LAYOUTS[name], noted), turn)
                )
        for name in ("by_user", "chosen"):
            what = f"CPU time of a pass over that with whole blocks, batches of {batch_size}"
            figures.append(
                Figure(f"{name}_over_whole_{batch_size}", what, ratio(seconds, name, "whole"))
            )
        for name, of_rounds in seconds.items():
            medians[f"{name}_{batch_size}_events_per_cpu_s"] = len(dataset) / float(
                np.median(of_rounds)
            )
        medians[f"chosen_{batch_size}_share_by_user"] = float(np.mean(taken))
        medians[f"events_per_user_{batch_size}"] = events_per_user(dataset, batch_size)
    return Measured(tuple(figures), medians)


def cpu_seconds(
    dataset: Dataset, settings: Settings, batch_size: int, layout: Layout, seed: int = 0
) -> float:
    """CPU seconds of one pass with one layout."""
    common = CommonSettings(history_length=settings.history, batch_size=batch_size)
    config = common.train_config(dataset, parse_method(settings.method), seed)
    with reading_by(layout):
        return run_pass(dataset, config).cost.cpu_s


@contextmanager
def reading_by(layout: Layout) -> Iterator[None]:
    """Within it every attention over a batch's own events takes ``layout``."""
    with patch(_READERS[0], layout), patch(_READERS[1], layout):
        yield


def noting(layout: Layout, taken: list[bool]) -> Layout:
    """The same layout, which notes whether it was by user."""

    def noted(block: KeySource, user_row_B: Tensor) -> BatchRows:
        rows = layout(block, user_row_B)
        taken.append(isinstance(rows, BlockByUser))
        return rows

    return noted


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> Ratio:
    """Of medians over rounds, and the quartiles of the ratio round by round."""
    value = float(np.median(seconds[name]) / np.median(seconds[base]))
    lower, upper = np.quantile(np.divide(seconds[name], seconds[base]), [0.25, 0.75])
    return Ratio(value, float(lower), float(upper))


def events_per_user(dataset: Dataset, batch_size: int) -> float:
    """Mean events of a user in the batches that have any of his."""
    user_N = dataset.events.user_id
    batches = [user_N[start : start + batch_size] for start in range(0, len(user_N), batch_size)]
    return len(user_N) / sum(len(np.unique(batch)) for batch in batches)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="as the programs of benchmarks.paper take it")
    parser.add_argument("--output", default=None, help="file for the result, as JSON")
    for name, default in asdict(Settings("")).items():
        if isinstance(default, int) or name == "method":
            parser.add_argument(f"--{name}", type=type(default), default=default)
    sizes = Settings("").batch_sizes
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(sizes))
    options = vars(parser.parse_args(argv))
    output = options.pop("output")
    settings = Settings(**{**options, "batch_sizes": tuple(options["batch_sizes"])})
    started = time.monotonic()
    measured = measure(settings)
    print_table("a batch's own rows by user", [measured])
    about = {**asdict(settings), "data": data_name(settings.data)}
    write_result(json_line("batch_rows", [measured], about, time.monotonic() - started), output)


if __name__ == "__main__":
    main()
