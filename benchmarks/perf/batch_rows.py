"""What laying a batch's own events out by user saves in training, and when (`marm.batch_rows`).

    python -m benchmarks.perf.batch_rows --data ratings.parquet --output batch_rows.json

Passes over the first events of a log, with the whole block and by user in turn; what counts is the
CPU time of all threads, so other work on the machine matters little. Batch sizes of a log differ
in how many events a user has in a batch, which decides. The last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from unittest.mock import patch

import numpy as np

from benchmarks.paper.datasets import Dataset, load_dataset
from benchmarks.paper.plan import CommonSettings, parse_method
from benchmarks.paper.trial import run_pass
from benchmarks.perf.figures import Figure, Measured, json_line, print_table, write_result
from benchmarks.perf.timing import Ratio
from marm.batch_rows import WholeBlock


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement."""

    data: str
    events: int = 40_000
    rounds: int = 3
    history: int = 50
    method: str = "marm_l2"
    batch_sizes: tuple[int, ...] = (256, 1024)


@contextmanager
def whole_blocks() -> Iterator[None]:
    """Within it every layer over the memory attends to whole blocks."""
    with patch("marm.attention.batch_rows", lambda block, _: WholeBlock(block)):
        yield


def measure(settings: Settings) -> Measured:
    """CPU time of a pass by user over that with whole blocks, for every batch size."""
    dataset = load_dataset(settings.data, settings.events)
    figures: list[Figure] = []
    medians: dict[str, float] = {}
    for batch_size in settings.batch_sizes:
        pairs_R2 = np.array(
            [_cpu_seconds(dataset, settings, batch_size, seed) for seed in range(settings.rounds)]
        )
        ratio_R = pairs_R2[:, 1] / pairs_R2[:, 0]
        middle = np.median(pairs_R2, axis=0)
        quartiles = np.quantile(ratio_R, [0.25, 0.75])
        figures.append(
            Figure(
                f"by_user_over_whole_{batch_size}",
                f"CPU time of a pass; {events_per_user(dataset, batch_size):.1f} events of a "
                "user's in a batch that has him",
                Ratio(float(middle[1] / middle[0]), *quartiles.tolist()),
            )
        )
        for name, seconds in zip(("whole", "by_user"), middle, strict=True):
            medians[f"{name}_{batch_size}_events_per_cpu_s"] = len(dataset) / float(seconds)
    return Measured(tuple(figures), medians)


def _cpu_seconds(
    dataset: Dataset, settings: Settings, batch_size: int, seed: int
) -> tuple[float, float]:
    common = CommonSettings(history_length=settings.history, batch_size=batch_size)
    config = common.train_config(dataset, parse_method(settings.method), seed)
    with whole_blocks():
        whole = run_pass(dataset, config).cost.cpu_s
    return whole, run_pass(dataset, config).cost.cpu_s


def events_per_user(dataset: Dataset, batch_size: int) -> float:
    """Mean events of a user in the batches that have any of his."""
    user_N = dataset.events.user_id
    batches = [user_N[start : start + batch_size] for start in range(0, len(user_N), batch_size)]
    return len(user_N) / sum(len(np.unique(batch)) for batch in batches)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="as benchmarks.paper takes it")
    parser.add_argument("--output", default=None, help="file for the result, as JSON")
    for name, default in asdict(Settings("")).items():
        if isinstance(default, (int, str)) and name != "data":
            parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 1024])
    options = vars(parser.parse_args(argv))
    output = options.pop("output")
    settings = Settings(**{**options, "batch_sizes": tuple(options["batch_sizes"])})
    started = time.monotonic()
    measured = measure(settings)
    print_table("a batch's own rows by user", [measured])
    line = json_line("batch_rows", [measured], asdict(settings), time.monotonic() - started)
    write_result(line, output)


if __name__ == "__main__":
    main()
