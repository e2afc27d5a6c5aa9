"""What ranking computes per request, against a full decoder, naive scoring and a bare GEMM.

    python -m benchmarks.perf.rank_compute --output benchmarks/results/rank_compute.json

All candidates of one user pass through L+1 layers of target attention over his cached rows
(`marm.amortised`). Timed from embedded rows and candidates to the output of the last layer, with as
many threads as cores. What is compared takes turns, round by round; ratios are of medians over all
rounds. A missed target is printed, not raised: this measures, it does not judge.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.perf.figures import (
    Figure,
    Measured,
    Target,
    at_least,
    at_most,
    json_line,
    print_table,
    write_result,
)
from benchmarks.perf.rank_compute_case import RankingCase, Shape
from benchmarks.perf.rank_compute_decoder import FullDecoder
from benchmarks.perf.timing import Case, Ratio, Seconds, ratio_of_medians, spread, time_in_turn
from marm.precision import FullPrecision, build_precision
from marm.search import TopRows

_GEMM_WIDTH = 2048


@dataclass(frozen=True)
class RankComputeSettings:
    """Sizes of the measurement."""

    shape: Shape = field(default_factory=Shape)
    num_rows: tuple[int, ...] = (1_000, 6_000)
    num_candidates: int = 500
    few_candidates: int = 50
    one_by_one_candidates: int = 2
    search_k: int = 100
    growth_rows: tuple[int, ...] = (100, 200, 400, 800, 1_600, 3_200, 6_400)
    rounds: int = 9
    repeats: int = 1
    seed: int = 0
    num_threads: int = field(default_factory=lambda: os.cpu_count() or 1)

    @staticmethod
    def quick() -> RankComputeSettings:
        """Sizes that show that everything runs; their figures mean nothing."""
        return RankComputeSettings(
            Shape(1, 16, 2, 16), (40, 80), 12, 3, 1, 8, (20, 40), rounds=2, num_threads=1
        )


_FULL_SA = {(1_000, 500): 0.48, (6_000, 500): 0.18, (1_000, 50): 0.17, (6_000, 50): 0.06}
_BEST_OVER_FULL_SA = 0.125
_NAIVE = {1_000: 0.0015, 6_000: 0.0003}
_GEMM_FRACTION, _GSU_OVER_DENSE, _EXPONENT = 0.75, 1.3, 1.1


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=None, help="file for the result, as JSON")
    parser.add_argument("--quick", action="store_true", help="try that it runs; no real figures")
    options = parser.parse_args(argv)
    settings = RankComputeSettings.quick() if options.quick else RankComputeSettings()
    started = time.monotonic()
    measured = measure_rank_compute(settings)
    print_table("ranking compute", measured)
    line = json_line("rank_compute", measured, asdict(settings), time.monotonic() - started)
    write_result(line, options.output)


def measure_rank_compute(settings: RankComputeSettings) -> list[Measured]:
    """All figures of the ranking computation; torch's number of threads is put back after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.num_threads)
    try:
        with torch.inference_mode():
            measured = [_measure_length(settings, n) for n in settings.num_rows]
            return [*measured, _measure_growth(settings)]
    finally:
        torch.set_num_threads(threads)


def _measure_length(settings: RankComputeSettings, num_rows: int) -> Measured:
    """Everything that is compared at one history length, in turn."""
    seconds = time_in_turn(_cases(settings, num_rows), settings.rounds, settings.repeats)
    figures = _over_decoders(settings, num_rows, seconds) + _over_others(
        settings, num_rows, seconds
    )
    medians = {
        f"{name}_{num_rows}_ms": 1e3 * float(np.median(taken)) for name, taken in seconds.items()
    }
    return Measured(tuple(figures), medians)


def _over_decoders(
    settings: RankComputeSettings, num_rows: int, seconds: dict[str, Seconds]
) -> list[Figure]:
    """Against attention over the history within the request."""
    many, few = settings.num_candidates, settings.few_candidates
    is_long = num_rows == max(settings.num_rows)
    figures = [
        _ratio(
            f"rank_over_full_sa_{num_rows}",
            seconds["rank"],
            seconds["full_sa"],
            f"{many} candidates over {num_rows} cached rows, over a decoder in the request",
            _target(_FULL_SA, (num_rows, many)),
        ),
        _ratio(
            f"rank_over_full_sa_{num_rows}_few",
            seconds["rank_few"],
            seconds["full_sa_few"],
            f"the same with {few} candidates",
            _target(_FULL_SA, (num_rows, few)),
        ),
        _ratio(
            f"rank_over_lean_sa_{num_rows}",
            seconds["rank"],
            seconds["lean_sa"],
            "over a decoder without the outputs that nobody reads",
        ),
        _ratio(
            f"rank_over_naive_{num_rows}",
            seconds["rank"],
            seconds["naive"] * many,
            f"over a decoder run per candidate: one, taken {many} times",
            _target(_NAIVE, num_rows),
        ),
    ]
    figures.append(
        _ratio(
            "rank_best_over_full_sa" if is_long else f"rank_best_over_full_sa_{num_rows}",
            seconds["rank_best"],
            seconds["full_sa"],
            "at the CPU's best precision, over the decoder in single precision",
            at_most(_BEST_OVER_FULL_SA) if is_long else None,
        )
    )
    return figures


def _over_others(
    settings: RankComputeSettings, num_rows: int, seconds: dict[str, Seconds]
) -> list[Figure]:
    """Against the plain path, with a search, and against a bare GEMM."""
    many, is_long = settings.num_candidates, num_rows == max(settings.num_rows)
    gemm_per_gflop = seconds["gemm"] / (2e-9 * _GEMM_WIDTH**3)
    return [
        _ratio(
            "gsu_over_dense" if is_long else f"gsu_over_dense_{num_rows}",
            seconds["gsu"],
            seconds["rank"],
            f"top {settings.search_k} rows per layer and candidate, over all rows",
            at_most(_GSU_OVER_DENSE) if is_long else None,
        ),
        _ratio(
            f"rank_over_one_by_one_{num_rows}",
            seconds["rank"],
            seconds["one_by_one"] * (many / settings.one_by_one_candidates),
            "over the plain path with cached rows, one candidate at a time: "
            f"{settings.one_by_one_candidates}, scaled to {many}",
        ),
        _ratio(
            f"gemm_fraction_{num_rows}",
            gemm_per_gflop * settings.shape.gflop(num_rows, many),
            seconds["rank"],
            f"useful FLOPs per second over those of a GEMM of {_GEMM_WIDTH}",
            at_least(_GEMM_FRACTION) if num_rows >= 1_000 else None,
        ),
    ]


def _cases(settings: RankComputeSettings, num_rows: int) -> dict[str, Case]:
    """The ways to score, by name."""
    shape, full = settings.shape, FullPrecision()
    case = RankingCase(shape, num_rows, settings.num_candidates, settings.seed)
    history, query = case.history, case.query_MF
    few = query[: settings.few_candidates].clone()
    dense, searching = case.frozen(full), case.frozen(full, TopRows(settings.search_k))
    best = case.frozen(build_precision("auto", torch.device("cpu")))
    decoder = FullDecoder(case.weights, shape.depth + 1)
    lean = FullDecoder(case.weights, shape.depth)
    square = torch.randn(_GEMM_WIDTH, _GEMM_WIDTH)
    product = torch.empty_like(square)
    runs: dict[str, Callable[[], object]] = {
        "rank": lambda: dense.outputs(query, history),
        "full_sa": lambda: decoder.candidates(query, history.live_NF),
        "lean_sa": lambda: lean.candidates(query, history.live_NF),
        "rank_few": lambda: dense.outputs(few, history),
        "full_sa_few": lambda: decoder.candidates(few, history.live_NF),
        "gsu": lambda: searching.outputs(query, history),
        "naive": lambda: decoder.candidates(query[:1], history.live_NF),
        "one_by_one": lambda: case.one_by_one(settings.one_by_one_candidates),
        "rank_best": lambda: best.outputs(query, history),
        "gemm": lambda: torch.mm(square, square, out=product),
    }
    return {name: _timed(run) for name, run in runs.items()}


def _measure_growth(settings: RankComputeSettings) -> Measured:
    """The slope of log(time) over log(rows)."""
    cases = {}
    for num_rows in settings.growth_rows:
        case = RankingCase(settings.shape, num_rows, settings.num_candidates, settings.seed)
        frozen = case.frozen(FullPrecision())
        cases[f"rank_{num_rows}_rows"] = _timed(
            partial(frozen.outputs, case.query_MF, case.history)
        )
    seconds = time_in_turn(cases, settings.rounds, settings.repeats)
    taken = np.stack(list(seconds.values()))  # [n, rounds, repeats]
    log_rows = np.log(settings.growth_rows)

    def slope(times: NDArray[np.float64]) -> float:
        return float(np.polyfit(log_rows, np.log(times), 1)[0])

    by_round = np.array([slope(of_round) for of_round in np.median(taken, axis=2).T])
    figure = Figure(
        "rank_exponent",
        f"slope of log(time) over log(rows), {min(settings.growth_rows)} to "
        f"{max(settings.growth_rows)} rows",
        spread(slope(np.median(taken, axis=(1, 2))), by_round),
        at_most(_EXPONENT),
    )
    medians = {f"{name}_ms": 1e3 * float(np.median(times)) for name, times in seconds.items()}
    return Measured((figure,), medians)


def _timed(run: Callable[[], object]) -> Case:
    return Case(lambda: None, lambda _: run())


def _ratio(
    key: str, numerator: Seconds, denominator: Seconds, what: str, target: Target | None = None
) -> Figure:
    ratio: Ratio = ratio_of_medians(numerator, denominator)
    return Figure(key, what, ratio, target)


def _target(bounds: dict, key: object) -> Target | None:
    return at_most(bounds[key]) if key in bounds else None


if __name__ == "__main__":
    main()
