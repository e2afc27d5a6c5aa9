"""Named methods and the settings they share: what the tables compare, under the same conditions.

A name is a method of `marm.interest`, with ``_lN`` for its layers where it has any: ``marm_l2`` is
MARM with L = 2 cached layers, ``marm_l0`` the single target attention of Fig. 2(a), ``hstu_l4``
HSTU* with four blocks, ``marm_sim_l2`` MARM whose layers attend to the top K rows of their own
search (Eq. 9). ``marm_e_l1`` keeps accumulated prediction errors in all of its layers
(`marm.error_memory`). ``din+twin+marm_l1`` is an ensemble (Table 2).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks.paper.datasets import TASK, Dataset
from marm.config import MEMORY_METHODS, METHODS, InterestConfig, ModelConfig
from marm.memory import Namespace
from train.config import TrainConfig

WITH_ERRORS = "marm_e"

LAYERED = (*MEMORY_METHODS, "stca", "hstu", "decoder")
_TITLES = {
    "marm": "MARM",
    "marm_sim": "MARM + SIM",
    "sum_pooling": "Baseline (sum pooling)",
    "din": "DIN",
    "sim_soft": "SIM Soft",
    "sim_hard": "SIM Hard",
    "twin": "TWIN",
    "twin_v2": "TWIN V2",
    "stca": "STCA (no memory)",
    "hstu": "HSTU*",
    "decoder": "Decoder + TA (Fig. 2b)",
}


@dataclass(frozen=True)
class Method:
    """One way to model interest, or several side by side."""

    name: str
    interests: tuple[InterestConfig, ...]
    depth: int = 0  # L, of the memory too
    error_layers: int = 0

    @property
    def title(self) -> str:
        """What a table calls it."""
        titles = [_title(interest, self.depth) for interest in self.interests]
        return " + ".join(titles) + (" with errors" if self.error_layers else "")

    def plus(self, other: Method) -> Method:
        """Both side by side; where both have a method, or a memory, it is as in ``other``."""
        added = {interest.method for interest in other.interests}
        memory = self if added.isdisjoint(MEMORY_METHODS) else other
        if memory is other:
            added.update(MEMORY_METHODS)
        kept = [interest for interest in self.interests if interest.method not in added]
        depth, errors = memory.depth, memory.error_layers
        interests = (*kept, *other.interests)
        names = [_name(one, depth, errors) for one in interests]
        return Method("+".join(names), interests, depth, errors)


@dataclass(frozen=True)
class CommonSettings:
    """What all methods of a comparison share. What is not named here is as `ModelConfig` and
    `TrainConfig` have it by default.

    Attributes:
        history_length: n of Eq. (1).
        dim: d; the width of attention, of embeddings and of stored rows.
        top_k: rows that methods with a search keep.
        batch_size: events of a step.
    """

    history_length: int = 50
    dim: int = 32
    top_k: int = field(default_factory=lambda: InterestConfig().top_k)
    batch_size: int = field(default_factory=lambda: TrainConfig().batch_size)

    def train_config(self, dataset: Dataset, method: Method, seed: int) -> TrainConfig:
        """A method on a data set, as a configuration of the training loop."""
        interests = tuple(replace(one, top_k=self.top_k) for one in method.interests)
        model = ModelConfig(
            namespace=Namespace(depth=method.depth, dim=self.dim, sequence=dataset.sequence),
            depth=method.depth,
            error_layers=method.error_layers,
            history_length=self.history_length,
            attention_dim=self.dim,
            feature_dim=self.dim,
            tasks=(TASK,),
            feedback_signals=dataset.feedback_signals,
            features=dataset.features,
            recency=dataset.recency,
            interests=interests,
        )
        # Nothing is skipped for its time: what a trial finds must not depend on when it runs.
        return TrainConfig(models=(model,), batch_size=self.batch_size, seed=seed, max_ahead_s=None)


def parse_method(name: str) -> Method:
    """The method, or the ensemble, of a name.

    Raises:
        ValueError: when the name says no method.
    """
    parts = [_parse_one(part) for part in name.split("+")]
    method = parts[0]
    for part in parts[1:]:
        method = method.plus(part)
    return method


def parse_methods(names: str | Sequence[str]) -> list[Method]:
    """Several methods, of ``"din,marm_l2"`` or a sequence of names."""
    given = names.split(",") if isinstance(names, str) else list(names)
    methods = [parse_method(name.strip()) for name in given]
    seen = [method.name for method in methods]
    if len(set(seen)) != len(seen):
        raise ValueError(f"every method must be named once, got {', '.join(seen)}")
    return methods


def _parse_one(name: str) -> Method:
    found = re.fullmatch(r"(.+?)(?:_l(\d+))?", name)
    method = found.group(1) if found else ""
    layers = found.group(2) if found else None
    with_errors = method == WITH_ERRORS
    method = "marm" if with_errors else method
    if method not in METHODS:
        raise ValueError(f"no method is called {name!r}; they are {', '.join(METHODS)}")
    if layers is not None and method not in LAYERED:
        raise ValueError(f"{method} has no layers to choose; those of {', '.join(LAYERED)} have")
    interest = InterestConfig(method=method)
    if method in MEMORY_METHODS:
        depth = 2 if layers is None else int(layers)
        errors = depth if with_errors else 0
        return Method(_name(interest, depth, errors), (interest,), depth, errors)
    if layers is not None:
        interest = replace(interest, layers=int(layers))
    return Method(_name(interest, 0), (interest,))


def _name(interest: InterestConfig, depth: int, error_layers: int = 0) -> str:
    if interest.method not in LAYERED:
        return interest.method
    if interest.method in MEMORY_METHODS:
        return f"{WITH_ERRORS if error_layers else interest.method}_l{depth}"
    return f"{interest.method}_l{interest.layers}"


def _title(interest: InterestConfig, depth: int) -> str:
    title = _TITLES[interest.method]
    if interest.method not in LAYERED:
        return title
    return f"{title} (L={depth if interest.method in MEMORY_METHODS else interest.layers})"
