"""Configuration of a training run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from marm.config import STAGES, ModelConfig
from marm.error_vectors import state_widths
from marm.memory import Namespace

ERROR_LAYERS = 2
"""Stored layers that hold errors where nothing else is said: one by items, one by transitions."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One streaming run over a log.

    Attributes:
        models: the models to train together, ranking first when it is among them. Without the model
            that writes, the memory is only read (time travel).
        writer: the stage whose model computes the rows. The paper's is ranking (Section 2.3);
            another one has a memory of its own, in which ranking has no part.
        variant: name under which versions are published.
        batch_size: events of one worker in one step.
        dense_learning_rate: of Adam, for the dense halves.
        sparse_learning_rate: of row-wise Adagrad, for the embedding tables.
        error_learning_rate: the same for the vectors of accumulated errors, with gradients summed
            over events (`marm.error_vectors`).
        num_workers: Ray Train workers; each owns a share of the user buckets.
        tables: where the rows of embedding tables are: ``replicated``, all on every worker, or
            ``sharded``, each on one of them (needs the extra `sharded`).
        num_threads: torch threads of a worker.
        device: ``cpu`` (gloo) or ``cuda`` (NCCL).
        precision: ``fp32``, or ``bf16`` for autocast.
        seed: of parameter initialisation.
        evaluation_fraction: share of the log, at its end, whose test-then-train metrics are kept.
        metrics_window: events between two log lines of running metrics.
        checkpoint_every_steps: steps between checkpoints.
        publish_every_steps: steps between published versions; 0 publishes at the end only.
        publish_interval_s: longest time between published versions of a following run that never
            catches up with the log; one that has caught up publishes sooner.
        caught_up_interval_s: shortest time between published versions of a following run that has
            caught up with the log.
        follow_poll_s: how often a following run that has caught up looks for new events.
        keep_versions: published versions to keep.
        max_failures: restarts after lost workers before giving up.
        follow: keep training when the end of the log is reached, as it grows.
        idle_timeout_s: end a following run after this long without new events; None: never.
        max_ahead_s: events further ahead of the clock than this are skipped and counted; None keeps
            all of them.
    """

    models: tuple[ModelConfig, ...] = (ModelConfig(),)
    writer: str = "ranking"
    variant: str = "default"
    batch_size: int = 256
    dense_learning_rate: float = 1e-3
    sparse_learning_rate: float = 0.1
    error_learning_rate: float = 0.2
    num_workers: int = 1
    tables: str = "replicated"
    num_threads: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    seed: int = 0
    evaluation_fraction: float = 0.2
    metrics_window: int = 100_000
    checkpoint_every_steps: int = 2000
    publish_every_steps: int = 0
    publish_interval_s: float = 60.0
    caught_up_interval_s: float = 5.0
    follow_poll_s: float = 0.2
    keep_versions: int = 10
    max_failures: int = 3
    follow: bool = False
    idle_timeout_s: float | None = None
    max_ahead_s: float | None = 86_400.0

    def __post_init__(self) -> None:
        stages = [model.stage for model in self.models]
        if not stages or len(set(stages)) != len(stages):
            raise ValueError(f"models must be of distinct stages of {STAGES}, got {stages}")
        if "ranking" in stages and stages[0] != "ranking":
            raise ValueError(
                f"the ranking model must come first, got {stages}; it feeds the others"
            )
        if len({model.namespace for model in self.models}) > 1:
            raise ValueError("all models of a run must read the same memory namespace")
        self._check_errors()
        self._check_writer(stages)
        for name in ("batch_size", "num_workers", "num_threads", "metrics_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("checkpoint_every_steps", "keep_versions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.publish_every_steps < 0:
            raise ValueError(
                f"publish_every_steps must be at least 0, got {self.publish_every_steps}"
            )
        # Refused now rather than by the registry at the end of the run.
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", self.variant):
            raise ValueError(f"variant must match [a-z0-9][a-z0-9._-]*, got {self.variant!r}")
        rates = "dense_learning_rate", "sparse_learning_rate", "error_learning_rate"
        for name in (*rates, "follow_poll_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("publish_interval_s", "caught_up_interval_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.evaluation_fraction <= 1:
            raise ValueError(
                f"evaluation_fraction must be in [0, 1], got {self.evaluation_fraction}"
            )
        if self.max_ahead_s is not None and not 0 <= self.max_ahead_s < float("inf"):
            raise ValueError(
                f"max_ahead_s must be None or seconds of at least 0, got {self.max_ahead_s}"
            )
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        self._check_tables()
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")

    def _check_errors(self) -> None:
        widths = {model.stage: state_widths(model) for model in self.models if model.depth}
        if len({tuple(of) for of in widths.values()}) > 1:
            raise ValueError(
                "all models of a run read the same rows, so layers of errors must be the same for "
                "all: set the same error_layers, and the feature tag for all or for none; got "
                f"states of the widths {widths}"
            )

    def _check_writer(self, stages: list[str]) -> None:
        if self.writer not in STAGES:
            raise ValueError(f"writer must be one of {STAGES}, got {self.writer!r}")
        if self.writer not in stages:
            return
        if stages[0] != self.writer:
            raise ValueError(
                f"the model that writes must come first, got {stages} and the writer "
                f"{self.writer!r}; the others read its rows of the batch"
            )
        model, namespace = self.models[0], self.models[0].namespace
        if (model.depth, model.attention_dim) != (namespace.depth, namespace.dim):
            raise ValueError(
                f"the {self.writer} model writes the rows it computes: depth and attention_dim "
                f"must equal the namespace's ({namespace.depth}, {namespace.dim}), got "
                f"({model.depth}, {model.attention_dim})"
            )
        if model.stage != "ranking" and (model.error_layers or model.num_user_vectors > 1):
            raise ValueError(
                "a writer other than ranking keeps one output of attention per layer: it needs "
                f"error_layers=0 and num_user_vectors=1, got {model.error_layers} and "
                f"{model.num_user_vectors}"
            )

    def _check_tables(self) -> None:
        if self.tables not in ("replicated", "sharded"):
            raise ValueError(f"tables must be 'replicated' or 'sharded', got {self.tables!r}")
        odd = [model.feature_dim for model in self.models if model.feature_dim % 4]
        if self.tables == "sharded" and odd:
            raise ValueError(
                f"tables 'sharded' need a feature_dim that is a multiple of 4, got {odd[0]}; "
                "change it, or use tables 'replicated'"
            )

    @property
    def num_shards(self) -> int:
        """Workers that the rows of a table are spread over."""
        return self.num_workers if self.tables == "sharded" else 1

    @property
    def namespace(self) -> Namespace:
        """The memory of the run."""
        return self.models[0].namespace

    @property
    def writes_memory(self) -> bool:
        """Whether a model computes rows in this run."""
        return self.models[0].stage == self.writer

    @property
    def history_length(self) -> int:
        """Rows to fetch per user: the longest sequence any model sees."""
        return max(model.history_length for model in self.models)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainConfig:
        """The configuration written by `to_dict`; unknown keys are refused."""
        known = {field.name for field in fields(TrainConfig)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"unknown training settings {unknown}; expected some of {sorted(known)}"
            )
        models = tuple(ModelConfig.from_dict(model) for model in values.get("models", ()))
        config = TrainConfig(**{k: v for k, v in values.items() if k != "models"})
        return replace(config, models=models) if models else config


def with_errors(ranking: ModelConfig, layers: int | None = None) -> ModelConfig:
    """``ranking`` with accumulated prediction errors in its first ``layers`` stored layers
    (`marm.error_memory`), in a memory of another name, as its rows mean something else.

    By default in `ERROR_LAYERS`, or all if there are fewer, where its rows can hold errors; else in
    none.
    """
    if layers is None:
        layers = min(ERROR_LAYERS, ranking.depth)
        layers = 0 if ranking.why_no_errors(layers) else layers
    if not layers:
        return ranking
    namespace = replace(ranking.namespace, family=f"{ranking.namespace.family}_errors{layers}")
    return replace(ranking, error_layers=layers, namespace=namespace)


def three_stages(
    ranking: ModelConfig, cascading_history: int = 20, retrieval_history: int = 200
) -> tuple[ModelConfig, ...]:
    """Models of all stages around one ranking model and its memory (Section 2.3)."""
    cascading = replace(ranking, stage="cascading", history_length=cascading_history)
    retrieval = replace(ranking, stage="retrieval", history_length=retrieval_history)
    return ranking, cascading, retrieval
