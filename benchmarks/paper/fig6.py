"""Fig. 6: how many rows the searches of two layers have in common.

    python -m benchmarks.paper.fig6 --data ratings.parquet --depth 4 --seeds 3 --out results

MARM is trained in one pass, on all rows or, with ``--method marm_sim``, with the search already.
Then, for users with long histories, each layer searches the top K of their rows for a sample of
items (Eq. 9), and the Jaccard overlap of what two layers found is the mean over items and users.
"By chance" is what two random choices of K rows would share. The last line is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.paper.datasets import Dataset
from benchmarks.paper.options import Experiment, common_options, program_of, seeded
from benchmarks.paper.plan import parse_method
from benchmarks.paper.plots import plot_matrices
from benchmarks.paper.report import heading, markdown_table, short
from benchmarks.paper.trial import Pass, run_pass
from benchmarks.paper.trial_cache import TrialCache
from cache_actors.atomic_files import replace_text
from marm.config import MEMORY_METHODS
from marm.items import ItemFeatures
from marm.scoring_plan import ScoringPlan
from marm.search import TopRows
from marm.supervised import SupervisedModel
from train.config import TrainConfig
from train.data.seen_items import SeenItems


@dataclass(frozen=True)
class Sample:
    """What is asked of a trained model."""

    top_k: int  # K rows that a layer finds
    users: int
    candidates: int  # items per user


@dataclass(frozen=True)
class Overlap:
    """What one trained model answered."""

    layers: list[list[float]]  # [L+1, L+1], the mean over users and items
    by_chance: float
    users: int


def main(argv: Sequence[str] | None = None) -> None:
    """Train, search, report."""
    parser = common_options("fig6", __doc__)
    parser.add_argument("--method", choices=MEMORY_METHODS, default="marm", help="what is trained")
    parser.add_argument("--depth", type=int, default=4, help="L")
    parser.add_argument("--users", type=int, default=200, help="users to ask, at most")
    parser.add_argument("--candidates", type=int, default=50, help="items asked of each user")
    options = parser.parse_args(argv)
    sample = Sample(options.top_k, options.users, options.candidates)
    method = parse_method(f"{options.method}_l{options.depth}")
    with Experiment(program_of("fig6", options.method), options) as experiment:
        config = experiment.config(method)
        found = [
            _overlap_of_seed(experiment, seeded(config, seed), sample) for seed in experiment.seeds
        ]
        matrix = np.mean([one.layers for one in found], axis=0)
        spread = np.std([one.layers for one in found], axis=0)
        chance = float(np.mean([one.by_chance for one in found]))
        off_diagonal = matrix[~np.eye(len(matrix), dtype=np.bool_)]
        document = experiment.document(
            {
                "method": method.name,
                "overlap": [[short(value) for value in row] for row in matrix.tolist()],
                "overlap_std": [[short(value) for value in row] for row in spread.tolist()],
                "mean_overlap": short(float(off_diagonal.mean())) if len(off_diagonal) else None,
                "by_chance": short(chance),
                "sample": asdict(sample),
                "users": [one.users for one in found],
            }
        )
        page = heading("Fig. 6: overlap of the layers' searches", document)
        page += f"{method.title}, K={sample.top_k}; by chance {chance:.3f}.\n\n" + _table(matrix)
        plot = experiment.out(".png")
        if plot is not None:
            of = f"{experiment.dataset.name}, {method.title}"
            title = f"{of}\nK={sample.top_k}; by chance {chance:.2f}"
            plot_matrices({title: matrix}, plot)
        experiment.finish(document, page)


def _overlap_of_seed(experiment: Experiment, config: TrainConfig, sample: Sample) -> Overlap:
    """From disk, where an earlier run left it, or by a training pass in this process."""
    cache = TrialCache(experiment.scratch / "overlap")
    path = _path(cache.path(experiment.dataset.fingerprint(), config), sample)
    if not path.is_file():
        found = search_overlap(run_pass(experiment.dataset, config), experiment.dataset, sample)
        replace_text(path, json.dumps(asdict(found)))
        print(f"seed {config.seed}: {found.users} users", flush=True)
    return Overlap(**json.loads(path.read_text(encoding="utf-8")))


def _path(trial: Path, sample: Sample) -> Path:
    return trial.with_name(f"{trial.stem}-{sample.top_k}-{sample.users}-{sample.candidates}.json")


def search_overlap(done: Pass, dataset: Dataset, sample: Sample) -> Overlap:
    """Ask a trained model.

    Raises:
        ValueError: when no user has more than K rows.
    """
    learner, config = done.trainer.learners[0], done.trainer.config
    model = learner.model
    assert isinstance(model, SupervisedModel)
    model.eval()
    model.freeze(ScoringPlan(search=TopRows(sample.top_k)))
    rng = np.random.default_rng(0)
    users, items = np.unique(dataset.events.user_id), items_of(dataset)
    now_ms = int(dataset.events.timestamp_ms[-1]) + 1
    matrices: list[NDArray[np.float32]] = []
    chances: list[float] = []
    for user_id in rng.permutation(users).tolist():
        rows = done.memory.fetch(np.array([user_id]), config.history_length)
        if len(rows.rows) <= sample.top_k:
            continue
        candidates = items.take(rng.integers(0, len(items), sample.candidates))
        with torch.inference_mode():
            matrices.append(model.layer_overlap(rows, user_id, candidates, now_ms, 0))
        chances.append(overlap_by_chance(sample.top_k, len(rows.rows)))
        if len(matrices) == sample.users:
            break
    if not matrices:
        raise ValueError(
            f"no user has more than K={sample.top_k} rows to search among; lower --top-k or raise "
            "--history"
        )
    layers = np.mean(matrices, axis=0).astype(np.float64).tolist()
    return Overlap(layers, float(np.mean(chances)), len(matrices))


def overlap_by_chance(top_k: int, num_rows: int) -> float:
    """Jaccard overlap of two random choices of K rows, of the expected number in common."""
    common = top_k * top_k / num_rows
    return common / (2 * top_k - common)


def items_of(dataset: Dataset) -> ItemFeatures:
    """All items of the log, as they were last known."""
    seen = SeenItems(ItemFeatures.empty())
    seen.complete(dataset.events)
    return seen.items()


def _table(matrix: NDArray[np.float64]) -> str:
    layers = [f"layer {layer}" for layer in range(len(matrix))]
    body = [
        [name, *(f"{value:.3f}" for value in row)]
        for name, row in zip(layers, matrix.tolist(), strict=True)
    ]
    return markdown_table(["", *layers], body)


if __name__ == "__main__":
    main()
