"""Ablations: what each choice of the default configuration is worth.

    python -m benchmarks.paper.ablations --data ratings.parquet --seeds 3 --out results

Every variation changes one thing about the method (``--method``), and is compared with it user by
user. ``--window tuning`` evaluates what comes just before the test window: choose settings there.
The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.paper.datasets import TASK
from benchmarks.paper.options import Experiment, trial_options
from benchmarks.paper.plan import parse_method
from benchmarks.paper.plots import plot_methods
from benchmarks.paper.report import heading, method_rows, methods_table, rows_to_dict
from benchmarks.paper.techniques import by_technique
from marm.config import InterestConfig
from train.config import TrainConfig

DEFAULT = "default"


@dataclass(frozen=True)
class Variation:
    """One change to a configuration."""

    name: str
    what: str
    apply: Callable[[TrainConfig], TrainConfig]


def model(**changes: Any) -> Callable[[TrainConfig], TrainConfig]:
    """Other fields of the model."""
    return lambda config: replace(config, models=(replace(config.models[0], **changes),))


def memory(**changes: Any) -> Callable[[TrainConfig], TrainConfig]:
    """Other fields of the memory's namespace."""
    return lambda config: model(namespace=replace(config.namespace, **changes))(config)


def training(**changes: Any) -> Callable[[TrainConfig], TrainConfig]:
    """Other fields of the training loop."""
    return lambda config: replace(config, **changes)


def dense_rate(factor: float) -> Callable[[TrainConfig], TrainConfig]:
    """Another learning rate of the dense halves."""
    return lambda config: training(dense_learning_rate=factor * config.dense_learning_rate)(config)


def sparse_rate(factor: float) -> Callable[[TrainConfig], TrainConfig]:
    """Another learning rate of the embedding tables."""
    return lambda config: training(sparse_learning_rate=factor * config.sparse_learning_rate)(
        config
    )


def depth(layers: int) -> Callable[[TrainConfig], TrainConfig]:
    """Another L, of model and memory; all of it keeps errors where some of it does."""

    def change(config: TrainConfig) -> TrainConfig:
        errors = layers if config.models[0].error_layers else 0
        namespace = replace(config.namespace, depth=layers)
        return model(depth=layers, error_layers=errors, namespace=namespace)(config)

    return change


def without_memory(config: TrainConfig) -> TrainConfig:
    """As many layers over raw rows: stacked target attention, nothing cached."""
    layers = config.models[0].depth
    interests = (InterestConfig(method="stca", layers=layers),)
    changed = {"depth": 0, "error_layers": 0, "namespace": replace(config.namespace, depth=0)}
    return model(interests=interests, **changed)(config)


def without_feature(name: str) -> Callable[[TrainConfig], TrainConfig]:
    """Without one feature of items."""

    def change(config: TrainConfig) -> TrainConfig:
        features = tuple(one for one in config.models[0].features if one != name)
        return model(features=features)(config)

    return change


def technique(name: str, what: str) -> Variation:
    """Another way to train (`benchmarks.paper.techniques`)."""
    return Variation(name, what, by_technique(name))


VARIATIONS = (
    Variation("depth_0", "L=0: no memory", depth(0)),
    Variation("depth_1", "L=1", depth(1)),
    Variation("depth_4", "L=4", depth(4)),
    Variation("raw_keys", "the same layers over raw rows, no memory (STCA)", without_memory),
    Variation("no_errors", "outputs of attention in all layers", model(error_layers=0)),
    Variation("errors", "prediction errors in the first stored layer", model(error_layers=1)),
    Variation("two_errors", "and in the second, by transitions", model(error_layers=2)),
    Variation("labels_alone", "no loss of a user's order", model(pairwise_weight=0.0)),
    Variation("order_thrice", "three times that loss", model(pairwise_weight=3.0)),
    Variation("no_recency", "attention does not know how old rows are", model(recency=())),
    Variation("distance_only", "recency by distance in events only", model(recency=("distance",))),
    Variation("distance_and_gap", "recency by events and time", model(recency=("distance", "gap"))),
    Variation("no_tag", "items without tag", without_feature("tag")),
    Variation("one_head", "one attention head", model(num_heads=1)),
    Variation("four_heads", "four attention heads", model(num_heads=4)),
    Variation("positives_only", "only long views enter the sequence", memory(sequence=TASK)),
    Variation("rows_float32", "rows kept in float32", memory(dtype="float32")),
    Variation("rows_int8", "rows kept in int8", memory(dtype="int8")),
    Variation("batch_64", "batches of 64 events", training(batch_size=64)),
    Variation("batch_1024", "batches of 1,024 events", training(batch_size=1024)),
    Variation("dense_lr_third", "a third of the dense learning rate", dense_rate(1 / 3)),
    Variation("dense_lr_triple", "three times the dense learning rate", dense_rate(3)),
    Variation("sparse_lr_third", "a third of the sparse learning rate", sparse_rate(1 / 3)),
    Variation("sparse_lr_triple", "three times the sparse learning rate", sparse_rate(3)),
    technique("upper_lr_third", "a third of the dense rate for attention over cached vectors"),
    technique("upper_lr_triple", "three times the dense rate for attention over cached vectors"),
    technique("zero_upper", "layers over cached vectors begin as the identity"),
    technique("vectors_alone", "layers over cached vectors see no live item and no feedback"),
    technique("warm_up", "the dense rate rises over the first 100 steps"),
    technique("clipping", "dense gradients of a norm of at most 1"),
    technique("averaged_writer", "a moving average of the weights writes the rows"),
    technique("cut_batch_gradient", "no gradient through cached vectors of the batch"),
    technique("no_feedback", "live features of rows do not say what became of them"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the default and its variations, and report."""
    names = ",".join(one.name for one in VARIATIONS)
    parser = trial_options("ablations", __doc__)
    parser.add_argument("--method", default="marm_e_l2", help="what is varied")
    parser.add_argument("--variations", default=names, help="some of them, with commas between")
    options = parser.parse_args(argv)
    chosen = choose(options.variations)
    with Experiment("ablations", options) as experiment:
        base = experiment.config(parse_method(options.method))
        changed, refused = vary(base, chosen)
        # The data may leave nothing to vary: a log without gaps has its distances only already.
        same = [name for name, config in changed.items() if config == base]
        configs = {DEFAULT: base} | {n: config for n, config in changed.items() if n not in same}
        results = experiment.run_seeds(configs)
        titles = {DEFAULT: f"{DEFAULT}: {options.method}"}
        titles |= {one.name: f"{one.name}: {one.what}" for one in chosen}
        rows = method_rows(results, titles, experiment.window, [DEFAULT])
        document = experiment.document(
            {
                "method": options.method,
                "variations": rows_to_dict(rows),
                "same_as_default": same,
                "refused": refused,
            }
        )
        left_out = "".join(f"\nLeft out: {name}, as {why}\n" for name, why in refused.items())
        page = heading("Ablations", document) + methods_table(rows, [DEFAULT]) + left_out
        plot = experiment.out(".png")
        if plot is not None:
            plot_methods(rows, experiment.floor["gauc"], experiment.dataset.name, plot)
        experiment.finish(document, page)


def vary(
    base: TrainConfig, chosen: Sequence[Variation]
) -> tuple[dict[str, TrainConfig], dict[str, str]]:
    """The configurations of variations by name, and why there is none for the others: not every
    method allows every change."""
    changed, refused = {}, {}
    for one in chosen:
        try:
            changed[one.name] = one.apply(base)
        except ValueError as error:
            refused[one.name] = str(error)
            print(f"{one.name}: left out, as {error}", flush=True)
    return changed, refused


def choose(names: str) -> list[Variation]:
    """Variations by name.

    Raises:
        ValueError: for a name that is none.
    """
    known = {one.name: one for one in VARIATIONS}
    wanted = [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(
            f"no variation is called {', '.join(unknown)}; they are {', '.join(known)}"
        )
    return [known[name] for name in wanted]


if __name__ == "__main__":
    main()
