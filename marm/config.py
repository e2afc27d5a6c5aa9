"""Configuration of a model: what is learned, from how much history, how deep and how wide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import inf
from typing import Any

from marm.events import BINARY_TASKS, TASKS
from marm.memory import Namespace

STAGES = ("ranking", "cascading", "retrieval")
FEATURES = ("item", "author", "tag", "duration", "context")

RECENCY = ("distance", "gap")

EVERYTHING = 1 << 40
"""A number of events larger than any history."""

METHODS = (
    "marm",
    "marm_sim",
    "sum_pooling",
    "din",
    "sim_soft",
    "sim_hard",
    "twin",
    "twin_v2",
    "stca",
    "hstu",
    "decoder",
)
"""Methods of modelling interest (`marm.interest`); all but MARM see raw rows only."""

MEMORY_METHODS = ("marm", "marm_sim")
"""MARM, plain and with SIM: what reads and writes cached layers. A model has at most one."""

SEQUENCE_METHODS = ("hstu", "decoder")
"""Those whose rows attend to one another: they need a batch as one sequence per user."""


@dataclass(frozen=True, kw_only=True)
class InterestConfig:
    """One method and what is its own.

    Attributes:
        method: one of `METHODS`. The depth of `MEMORY_METHODS` is the model's, as it is the
            memory's.
        layers: blocks of ``hstu`` and ``decoder``; layers that ``stca`` stacks on its first one.
        top_k: rows that the search of ``sim_soft``, ``sim_hard``, ``twin`` and ``twin_v2`` keeps,
            and that of every layer of ``marm_sim``.
        cluster_size: rows in one cluster of ``twin_v2``, at most.
    """

    method: str = "marm"
    layers: int = 2
    top_k: int = 20
    cluster_size: int = 5

    def __post_init__(self) -> None:
        _one_of("interest method", self.method, METHODS)
        _at_least("interest layers", self.layers, 0)
        _at_least("interest top_k", self.top_k, 1)
        _at_least("interest cluster_size", self.cluster_size, 1)


TABLES = ("hashed", "admitted")


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """The embedding table and what is its own.

    Attributes:
        kind: ``hashed`` has a row for every hash; ``admitted`` has rows for ids that come again.
        admit_after: times an id must be seen before an ``admitted`` table gives it a row.
        keep_events: an id seen within so many events keeps its row of an ``admitted`` table.
    """

    kind: str = "hashed"
    admit_after: int = 3
    keep_events: int = 1_000_000

    def __post_init__(self) -> None:
        _one_of("table kind", self.kind, TABLES)
        _at_least("table admit_after", self.admit_after, 1)
        _at_least("table keep_events", self.keep_events, 1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that determines a model's parameters and its forward pass.

    Attributes:
        stage: ``ranking`` computes rows and has multi-task heads, ``cascading`` reads a short
            sequence, ``retrieval`` queries with the user id.
        namespace: the memory it reads; its depth bounds ``depth`` and its dim is the width of rows.
        depth: L of Eq. (6), cached layers read above layer 0. 0 is single-layer target attention.
        history_length: n of Eq. (1), rows visible to a query.
        attention_dim: D. A ranking model's D must equal the namespace's dim, as it writes the rows.
        feature_dim: F of Eq. (2).
        num_heads: H; divides ``attention_dim``.
        tasks: learned tasks, in the order of the model's outputs.
        feedback_signals: binary signals of a history row that the model sees.
        features: sparse features besides the user id: ``item``, ``author``, ``tag``, ``duration``
            are summed into an item's embedding, ``context`` (page, tab) describes an exposure.
        recency: what biases attention: ``distance`` in events, ``gap`` in time. Leave ``gap`` out
            where the clock of the log is not exact: a model learns the artefacts of a clock.
        num_slots: rows of the embedding table shared by all features.
        table: the kind of that table.
        num_experts: experts of the multi-gate mixture (ranking).
        expert_dim: width of an expert and of the towers.
        output_dim: V, width of user and item vectors (retrieval).
        num_user_vectors: vectors per user, one per interest (retrieval). Each costs a pass of the
            queries through all layers.
        positive_task: the label that makes an event a positive for retrieval and cascading.
        error_layers: so many of the ``depth`` stored layers, the first ones, hold the user's
            accumulated prediction errors (`marm.error_memory`), which cascading reads by a learned
            map (`marm.error_reading`) and retrieval leaves alone; with 0 all hold outputs of
            attention, as the paper has it. Rows of one kind mean nothing to the other: raise the
            namespace's epoch when you change it.
        pairwise_weight: what the order of a user's events counts in the loss beside the labels
            themselves (`marm.pairwise`), in ranking and cascading. More of it ranks better within a
            user (GAUC) and predicts probabilities worse (log loss); 0 learns probabilities alone.
        interests: methods that model interest; the heads read the outputs of all side by side (the
            ensemble of Table 2).
    """

    stage: str = "ranking"
    namespace: Namespace = field(default_factory=Namespace)
    depth: int = 2
    history_length: int = 50
    attention_dim: int = 32
    feature_dim: int = 32
    num_heads: int = 2
    tasks: tuple[str, ...] = TASKS
    feedback_signals: tuple[str, ...] = BINARY_TASKS
    features: tuple[str, ...] = FEATURES
    recency: tuple[str, ...] = RECENCY
    num_slots: int = 1 << 18
    table: TableConfig = field(default_factory=TableConfig)
    num_experts: int = 3
    expert_dim: int = 64
    output_dim: int = 32
    num_user_vectors: int = 1
    positive_task: str = "long_view"
    error_layers: int = 0
    pairwise_weight: float = 1.0
    interests: tuple[InterestConfig, ...] = field(default_factory=lambda: (InterestConfig(),))

    def __post_init__(self) -> None:
        _one_of("stage", self.stage, STAGES)
        _at_least("depth", self.depth, 0)
        self._check_errors()
        for name in (
            "history_length",
            "attention_dim",
            "feature_dim",
            "num_heads",
            "num_slots",
            "num_experts",
            "expert_dim",
            "output_dim",
            "num_user_vectors",
        ):
            _at_least(name, getattr(self, name), 1)
        if not (isinstance(self.pairwise_weight, int | float) and 0 <= self.pairwise_weight < inf):
            raise ValueError(
                f"pairwise_weight must be a number of at least 0, got {self.pairwise_weight!r}"
            )
        _subset("tasks", self.tasks, TASKS)
        _subset("feedback_signals", self.feedback_signals, BINARY_TASKS)
        _subset("features", self.features, FEATURES)
        _subset("recency", self.recency, RECENCY)
        _one_of("positive_task", self.positive_task, BINARY_TASKS)
        methods = [interest.method for interest in self.interests]
        if not methods or len(set(methods)) != len(methods):
            raise ValueError(f"interests must be distinct methods of {METHODS}, got {methods}")
        with_memory = [method for method in methods if method in MEMORY_METHODS]
        if len(with_memory) > 1:
            raise ValueError(f"a model writes one memory, got {with_memory}; leave one of them out")
        if not with_memory and self.depth > 0:
            raise ValueError(
                f"a depth of {self.depth} needs one of {MEMORY_METHODS}, the only methods that "
                f"read cached layers, got {methods}; add one or set the depth (and the "
                "namespace's) to 0"
            )
        if not self.tasks:
            raise ValueError(f"tasks must name at least one of {TASKS}, got none")
        if "item" not in self.features:
            raise ValueError(f"features must include 'item', got {self.features}")
        if self.attention_dim % self.num_heads:
            raise ValueError(
                f"num_heads must divide attention_dim, got {self.num_heads} heads for a width of "
                f"{self.attention_dim}; choose a divisor"
            )
        if self.depth > self.namespace.depth:
            raise ValueError(
                f"depth must be at most the namespace's {self.namespace.depth} stored layers, got "
                f"{self.depth}; lower it or train a namespace that stores more"
            )
        if self.stage == "ranking" and (self.depth, self.attention_dim) != (
            self.namespace.depth,
            self.namespace.dim,
        ):
            raise ValueError(
                "a ranking model writes the rows it computes: depth and attention_dim must equal "
                f"the namespace's ({self.namespace.depth}, {self.namespace.dim}), got "
                f"({self.depth}, {self.attention_dim})"
            )

    @property
    def receptive_field(self) -> int:
        """Events before an event on which its stored row depends, at most."""
        return EVERYTHING if self.error_layers else self.depth * self.history_length

    @property
    def keeps_transitions(self) -> bool:
        """Whether some of the layers of errors are told them by transitions between tags."""
        return self.keeps_errors and self.error_layers > 1 and "tag" in self.features

    @property
    def keeps_errors(self) -> bool:
        """Whether this model accumulates its errors (`marm.error_memory`)."""
        return self.stage == "ranking" and self.error_layers > 0

    @property
    def reads_errors(self) -> bool:
        """Whether this model reads the errors that ranking accumulated (`marm.error_reading`)."""
        return self.stage == "cascading" and self.error_layers > 0

    @property
    def sees_whole_past(self) -> bool:
        """Whether this model needs the newest of all rows before a query, for errors."""
        return self.keeps_errors or self.reads_errors

    @property
    def read_depth(self) -> int:
        """Stored layers that this model reads, from the first on: none where all that there are
        hold errors which it leaves alone."""
        if self.sees_whole_past or self.depth > self.error_layers:
            return self.depth
        return 0

    def _check_errors(self) -> None:
        _at_least("error_layers", self.error_layers, 0)
        reason = self.why_no_errors(self.error_layers)
        if reason:
            raise ValueError(reason)

    def why_no_errors(self, layers: int) -> str:
        """Why ``layers`` of the stored layers cannot hold errors; empty where they can."""
        if not layers:
            return ""
        if self.depth < layers or self.namespace.dim < 8:
            return (
                f"error_layers={layers} needs as many stored layers, of at least 8 "
                f"numbers each, got depth {self.depth} and rows of {self.namespace.dim}; "
                "raise them or lower it"
            )
        if self.positive_task not in self.tasks or self.positive_task not in self.feedback_signals:
            return (
                "error_layers needs positive_task among tasks and feedback_signals, as errors "
                f"are those of its predictions; got {self.positive_task!r}, tasks {self.tasks} and "
                f"feedback_signals {self.feedback_signals}"
            )
        if self.namespace.dtype == "int8":
            return (
                "error_layers needs rows of float16 or float32: sums that grow by little are "
                "lost in int8; choose another dtype or set it to 0"
            )
        return ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ModelConfig:
        """The configuration written by `to_dict`; unknown keys are refused."""
        known = {f.name for f in fields(ModelConfig)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown model settings {unknown}; expected some of {sorted(known)}")
        parsed: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        if isinstance(parsed.get("namespace"), Mapping):
            parsed["namespace"] = Namespace(**parsed["namespace"])
        if isinstance(parsed.get("table"), Mapping):
            parsed["table"] = TableConfig(**parsed["table"])
        if "interests" in parsed:
            parsed["interests"] = tuple(InterestConfig(**one) for one in parsed["interests"])
        return ModelConfig(**parsed)


def _at_least(name: str, value: int, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def _subset(name: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    unknown = [value for value in values if value not in allowed]
    if unknown or len(set(values)) != len(values):
        raise ValueError(f"{name} must be distinct names of {allowed}, got {values}")
