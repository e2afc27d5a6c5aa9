"""Does it pay to compute the ranking requests of a replica one after the other?

    python -m benchmarks.perf.score_turns

A number of clients ask one frozen ranking model without pause, as the threads of a replica do.
``beside``: every request computes at once, beside the others. ``in_turn``: one at a time, as
`stages.turns` has it. Both ways take turns, round after round. Per size of a request: requests per
second, the median time of one, and the CPU time of one, which others on the machine disturb least.
The last line is JSON, with ratios to ``beside``.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass

import numpy as np
import torch

from marm.config import ModelConfig
from marm.items import ItemFeatures
from marm.memory import Namespace, UserRows
from marm.ranker import Ranker
from marm.scoring_plan import ScoringPlan
from stages.turns import Turns

MINUTE_MS = 60_000.0
WAYS = ("beside", "in_turn")


@dataclass(frozen=True)
class Size:
    """How large a request is: n rows, M candidates, of a model with D and L."""

    rows: int
    candidates: int
    dim: int
    depth: int

    @property
    def name(self) -> str:
        return f"n{self.rows}_m{self.candidates}_d{self.dim}_l{self.depth}"


SIZES = (Size(50, 20, 32, 2), Size(200, 100, 64, 2), Size(1000, 200, 128, 4))


@dataclass(frozen=True)
class Request:
    """What a client asks."""

    rows: UserRows
    user_id: int
    candidates: ItemFeatures


@dataclass(frozen=True)
class Figures:
    """One way at one size."""

    requests_per_s: float
    median_ms: float
    cpu_ms: float


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    measured = {size.name: measure(size, options) for size in SIZES[: options.sizes]}
    print(f"{'request':<22} {'way':<10} {'req/s':>8} {'median ms':>10} {'cpu ms':>8}")
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for name, ways in measured.items():
        beside = asdict(ways["beside"])
        ratios[name] = {
            way: {key: round(value / beside[key], 3) for key, value in asdict(found).items()}
            for way, found in ways.items()
        }
        for way, found in ways.items():
            rate, median, cpu = found.requests_per_s, found.median_ms, found.cpu_ms
            print(f"{name:<22} {way:<10} {rate:8.1f} {median:10.2f} {cpu:8.2f}")
    setup = {"clients": options.clients, "threads": options.threads, "rounds": options.rounds}
    print(json.dumps({"score_turns": ratios} | setup))


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=4, help="requests at the same time")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-s", type=float, default=1.0, help="length of a way's turn")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="only the first ones")
    return parser.parse_args(argv)


def measure(size: Size, options: argparse.Namespace) -> dict[str, Figures]:
    """All ways in turn; the medians of the rounds."""
    model, requests = build(size), [request_of(user, size) for user in range(options.clients)]
    replica_turns = Turns()
    turns: dict[str, list[Figures]] = {way: [] for way in WAYS}
    for turn in range(-1, options.rounds):
        for way in WAYS:
            found = drive(answer_by(way, model, replica_turns), requests, options)
            if turn >= 0:
                turns[way].append(found)
    return {
        way: Figures(*(float(x) for x in np.median([astuple(f) for f in found], axis=0)))
        for way, found in turns.items()
    }


def build(size: Size) -> Ranker:
    torch.manual_seed(0)
    namespace = Namespace(depth=size.depth, dim=size.dim)
    model = Ranker(
        ModelConfig(
            namespace=namespace,
            depth=size.depth,
            history_length=size.rows,
            attention_dim=size.dim,
            feature_dim=size.dim,
            num_heads=4,
        )
    )
    model.requires_grad_(False).eval()
    model.freeze(ScoringPlan())
    return model


def request_of(user_id: int, size: Size) -> Request:
    random = np.random.default_rng(user_id)
    rows = np.zeros(size.rows, Namespace(depth=size.depth, dim=size.dim).row_dtype)
    rows["item_id"] = random.integers(1, 10_000, size.rows)
    rows["timestamp_ms"] = 1000 * np.arange(1, size.rows + 1)
    rows["written_step"] = 1
    rows["memory"] = random.normal(size=rows["memory"].shape)
    packed = UserRows(np.array([user_id]), np.array([0, size.rows]), rows)
    ids = random.integers(1, 10_000, size.candidates)
    items = ItemFeatures(ids, ids % 50, ids % 9, ids)
    return Request(packed, user_id, items)


def answer_by(way: str, model: Ranker, turns: Turns) -> Callable[[Request], object]:
    def score(request: Request) -> object:
        return model.score(request.rows, request.user_id, request.candidates, 10**8, 0)

    def score_in_turn(request: Request) -> object:
        with turns.turn(time.time() * 1000 + MINUTE_MS):
            return score(request)

    return {"beside": score, "in_turn": score_in_turn}[way]


def drive(
    answer: Callable[[Request], object],
    requests: list[Request],
    options: argparse.Namespace,
) -> Figures:
    """One client per request, each asking its own again and again."""
    taken_s: list[float] = []
    began_s, began_cpu_s = time.perf_counter(), time.process_time()

    def client(request: Request) -> None:
        asked_s = began_s
        while asked_s < began_s + options.round_s:
            asked_s = time.perf_counter()
            answer(request)
            taken_s.append(time.perf_counter() - asked_s)

    threads = [threading.Thread(target=client, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cpu_s = time.process_time() - began_cpu_s
    return Figures(
        len(taken_s) / (time.perf_counter() - began_s),
        float(np.median(taken_s)) * 1e3,
        cpu_s / len(taken_s) * 1e3,
    )


if __name__ == "__main__":
    main()
