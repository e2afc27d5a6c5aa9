"""Settings of the fusion formulas, checked when they are written and bound to a model's tasks when
they are used."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from marm.events import TASKS, WATCH_TIME
from stages.fusion import Fusion, PowerProduct, RankFusion, WeightedSum

Number = Annotated[float, Field(allow_inf_nan=False)]

LARGEST_PREDICTION = {task: math.expm1(12.0) if task == WATCH_TIME else 1.0 for task in TASKS}
"""Models answer probabilities, and seconds for watch time up to this many."""

MAX_WEIGHT = 1e9

LARGEST_EXPONENT = 85.0
"""A product beyond exp of this, or below exp of minus this, is no float32."""


class FusionSettings(BaseModel, ABC):
    """What the formulas have in common; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @abstractmethod
    def named_tasks(self) -> tuple[str, ...]:
        """The tasks that the formula weighs."""

    @abstractmethod
    def bind(self, tasks: tuple[str, ...]) -> Fusion:
        """The formula over the columns ``tasks`` of a model.

        Tasks that the model has not learned are left out. A model that learned none of them is
        fused with equal weights; `unlearned` says so.
        """

    def unlearned(self, tasks: tuple[str, ...]) -> str:
        """Why this formula cannot be used for a model of ``tasks``; empty when it can."""
        if set(self.named_tasks()) & set(tasks):
            return ""
        return (
            f"fusion names none of the model's tasks {list(tasks)}, so all of them count equally; "
            "weigh at least one of them"
        )


class WeighedTasks(FusionSettings):
    """A formula with one weight per task."""

    weights: dict[str, float]

    @field_validator("weights")
    @classmethod
    def _usable(cls, weights: dict[str, float]) -> dict[str, float]:
        return checked_weights(weights)

    def named_tasks(self) -> tuple[str, ...]:
        """See `FusionSettings.named_tasks`."""
        return weighed(self.weights)


class WeightedSumSettings(WeighedTasks):
    """``{kind: weighted_sum, weights: {long_view: 1.0}}``, or the weights alone."""

    kind: Literal["weighted_sum"] = "weighted_sum"

    def bind(self, tasks: tuple[str, ...]) -> Fusion:
        """See `FusionSettings.bind`."""
        return WeightedSum(np.array(weight_of(tasks, self.weights), np.float32))


class Power(BaseModel):
    """The factor ``(alpha + p) ^ beta`` of one task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beta: Annotated[Number, Field(ge=-20, le=20)]
    alpha: Annotated[Number, Field(ge=1e-6, le=1e6)] = 1.0


class PowerProductSettings(FusionSettings):
    """``{kind: power_product, powers: {long_view: {beta: 2.0}, watch_time: {beta: 0.3}}}``."""

    kind: Literal["power_product"]
    powers: dict[str, Power]

    @model_validator(mode="after")
    def _within_range(self) -> PowerProductSettings:
        checked_weights({task: power.beta for task, power in self.powers.items()})
        exponent = sum(_widest_exponent(task, power) for task, power in self.powers.items())
        if exponent > LARGEST_EXPONENT:
            raise ValueError(
                f"the product may reach exp({exponent:.0f}), which no score can hold (limit "
                f"exp({LARGEST_EXPONENT:.0f})); scale all betas down by the same factor, which "
                "changes no order"
            )
        return self

    def named_tasks(self) -> tuple[str, ...]:
        """See `FusionSettings.named_tasks`."""
        return weighed({task: power.beta for task, power in self.powers.items()})

    def bind(self, tasks: tuple[str, ...]) -> Fusion:
        """See `FusionSettings.bind`."""
        betas = {task: power.beta for task, power in self.powers.items()}
        alpha = [self.powers[task].alpha if task in self.powers else 1.0 for task in tasks]
        return PowerProduct(np.array(alpha), np.array(weight_of(tasks, betas)))


class RankFusionSettings(WeighedTasks):
    """``{kind: rank, weights: {long_view: 1.0, like: 0.5}, smoothing: 60}``."""

    kind: Literal["rank"]
    smoothing: Annotated[Number, Field(ge=0, le=1e6)] = 60.0
    """The larger, the less the very first places of a task stand out."""

    def bind(self, tasks: tuple[str, ...]) -> Fusion:
        """See `FusionSettings.bind`."""
        return RankFusion(np.array(weight_of(tasks, self.weights)), self.smoothing)


FusionRule = Annotated[
    WeightedSumSettings | PowerProductSettings | RankFusionSettings, Field(discriminator="kind")
]
"""One formula, chosen by its ``kind``."""


def with_kind(settings: Any) -> Any:
    """``{task: weight}``, the short way to write a weighted sum, in its full form."""
    if isinstance(settings, Mapping) and "kind" not in settings:
        return {"kind": "weighted_sum", "weights": settings}
    return settings


def checked_weights(weights: dict[str, float]) -> dict[str, float]:
    """``weights`` if they name tasks, are finite and not all zero; else a ValueError."""
    unknown = sorted(set(weights) - set(TASKS))
    if unknown or not all(abs(weight) <= MAX_WEIGHT for weight in weights.values()):
        raise ValueError(
            f"fusion must map tasks of {TASKS} to weights of at most {MAX_WEIGHT:g}, got "
            f"{weights}; remove what is not listed, or name another formula by its 'kind'"
        )
    if not any(weights.values()):
        raise ValueError(
            f"fusion must weigh at least one task, got {weights}; give one a weight other than 0"
        )
    return weights


def weighed(weights: Mapping[str, float]) -> tuple[str, ...]:
    """Tasks with a weight other than zero."""
    return tuple(task for task, weight in weights.items() if weight)


def weight_of(tasks: Iterable[str], weights: Mapping[str, float]) -> list[float]:
    """The weight of each of a model's tasks; all 1 where none of them has one."""
    found = [weights.get(task, 0.0) for task in tasks]
    return found if any(found) else [1.0] * len(found)


def _widest_exponent(task: str, power: Power) -> float:
    """The largest size of this task's part of the logarithm of the product."""
    largest = max(abs(math.log(power.alpha)), math.log(power.alpha + LARGEST_PREDICTION[task]))
    return abs(power.beta) * largest
