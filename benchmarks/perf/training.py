"""What streaming training costs: a step, its feed, several workers, and against FuxiCTR's DIN.

    python -m benchmarks.perf.training --data ratings.parquet \\
        --output benchmarks/results/training.json

Starts a Ray of its own for the feed and the workers, prints a table and then one JSON line.
``--data`` is what `benchmarks.paper.datasets.load_dataset` takes; feed and FuxiCTR see its events,
the other parts make their own. FuxiCTR is installed by pip in a virtual environment of its own
(``--fuxictr-venv``), once. Whatever is compared in one process takes turns, round by round; ratios
are of medians. A missed target is printed, not raised: this measures, it does not judge.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.paper.datasets import Dataset, load_dataset
from benchmarks.perf.figures import (
    Measured,
    data_name,
    json_line,
    print_table,
    write_result,
)
from benchmarks.perf.memory import own_ray
from benchmarks.perf.training_cost.cost import CostSettings, measure_cost
from benchmarks.perf.training_cost.feed import (
    DEFAULT_FEED,
    LONG_FEED,
    FeedSettings,
    longest_users,
    measure_feed,
)
from benchmarks.perf.training_cost.fuxictr import FuxictrSettings, measure_fuxictr
from benchmarks.perf.training_cost.workers import WorkerSettings, measure_workers

PARTS = ("cost", "feed", "workers", "fuxictr")
_WORLD, _QUICK_WORLD = "world", "world:num_users=30,num_items=100,num_events=4000"


@dataclass(frozen=True)
class Settings:
    """Sizes of every part; ``long_feed_events`` are those of the users with most events."""

    cost: CostSettings = field(default_factory=CostSettings)
    feed: FeedSettings = DEFAULT_FEED
    long_feed: FeedSettings = LONG_FEED
    long_feed_events: int = 100_000
    workers: WorkerSettings = field(default_factory=WorkerSettings)
    fuxictr: FuxictrSettings = field(default_factory=FuxictrSettings)

    @staticmethod
    def quick() -> Settings:
        """Sizes that show that everything runs; their figures mean nothing."""
        return Settings(
            CostSettings.quick(),
            replace(DEFAULT_FEED, batch_size=16, events_per_slice=64, slices=2),
            FeedSettings(LONG_FEED.key, 60, 16, 4, 16, events_per_slice=64, slices=2),
            2_000,
            WorkerSettings.quick(),
            FuxictrSettings(history_length=10, dim=8, learning_rates=(1e-3,)),
        )

    def seeded(self, seeds: Sequence[int]) -> Settings:
        """The same sizes with other seeds; FuxiCTR and our DIN run with each of them."""
        return replace(
            self,
            cost=replace(self.cost, seed=seeds[0]),
            workers=replace(self.workers, seed=seeds[0]),
            fuxictr=replace(self.fuxictr, seeds=tuple(seeds)),
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result where that was asked for."""
    options = parse_options(argv)
    settings = (Settings.quick() if options.quick else Settings()).seeded(range(options.seeds))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="marm-training-") as scratch:
        measured = measure(settings, options, Path(scratch))
    print_table("training", measured)
    about = {
        **asdict(settings),
        "parts": options.only,
        "data": data_name(options.data),
        "limit": options.limit,
        "torch": torch.__version__,
    }
    line = json_line("training", measured, about, time.monotonic() - started)
    write_result(line, options.output)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=None, help="log for feed and fuxictr; default: a world")
    parser.add_argument("--limit", type=int, default=None, help="only its first so many events")
    parser.add_argument(
        "--only",
        type=_parts,
        default=None,
        help=f"some of {','.join(PARTS)}; by default all, or what needs no installation if --quick",
    )
    parser.add_argument(
        "--fuxictr-venv",
        type=Path,
        default=Path("~/.cache/fuxictr"),
        help="virtual environment of FuxiCTR, made where missing",
    )
    parser.add_argument("--seeds", type=_positive, default=1, help="of both DINs: 0, 1, ...")
    parser.add_argument("--output", default=None, help="file for the result, as JSON")
    parser.add_argument("--scratch", default=None, help="directory for stores, on a local disk")
    parser.add_argument("--quick", action="store_true", help="try that it runs; no real figures")
    options = parser.parse_args(argv)
    if options.only is None:
        options.only = [part for part in PARTS if part != "fuxictr" or not options.quick]
    if options.data is None:
        options.data = _QUICK_WORLD if options.quick else _WORLD
    return options


def measure(settings: Settings, options: argparse.Namespace, scratch: Path) -> list[Measured]:
    """The parts that were asked for, in their order; each beside as little as possible."""
    dataset: Dataset | None = None
    if {"feed", "fuxictr"} & set(options.only):
        dataset = load_dataset(options.data, options.limit)
    parts: dict[str, Callable[[], list[Measured]]] = {"cost": partial(measure_cost, settings.cost)}
    if dataset is not None:
        parts["feed"] = partial(_measure_feeds, settings, dataset, scratch)
    parts["workers"] = partial(_measure_workers, settings, scratch)
    if dataset is not None:
        venv = options.fuxictr_venv.expanduser().absolute()
        parts["fuxictr"] = lambda: [measure_fuxictr(dataset, settings.fuxictr, venv, scratch)]
    measured: list[Measured] = []
    for name, part in parts.items():
        if name in options.only:
            print(f"measuring {name}", flush=True)
            measured += part()
    return measured


def _measure_feeds(settings: Settings, dataset: Dataset, scratch: Path) -> list[Measured]:
    longest = longest_users(dataset, settings.long_feed_events)
    with own_ray():
        return [
            measure_feed(dataset, settings.feed, scratch / "feed"),
            measure_feed(longest, settings.long_feed, scratch / "long-feed"),
        ]


def _measure_workers(settings: Settings, scratch: Path) -> list[Measured]:
    with own_ray():
        return [measure_workers(settings.workers, scratch / "workers")]


def _parts(text: str) -> list[str]:
    names = text.split(",")
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; they are {', '.join(PARTS)}")
    return names


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
