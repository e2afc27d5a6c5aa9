"""Configurations of trials that train by another learner than the plain one."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass, fields

from benchmarks.paper.phases import PhaseClock, TimedLearner
from train.collective import SingleWorker
from train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TechniqueConfig(TrainConfig):
    """A run whose learner is ``technique``, the ``module:name`` of a `TimedLearner`.

    By name, so that other trials do not depend on its code (`benchmarks.paper.trial_cache`).
    """

    technique: str


def trained_by(config: TrainConfig, kind: type[TimedLearner]) -> TechniqueConfig:
    """The same run with another learner."""
    given = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    return TechniqueConfig(**given, technique=f"{kind.__module__}:{kind.__name__}")


def build_learner(config: TrainConfig, clock: PhaseClock) -> TimedLearner:
    """The learner of the only model of a configuration."""
    kind = TimedLearner
    if isinstance(config, TechniqueConfig):
        kind = pkgutil.resolve_name(config.technique)
    return kind(config.models[0], config, SingleWorker(), clock)


def modules_of(config: TrainConfig) -> set[str]:
    """Where the learner is, unless it is the plain one."""
    return {config.technique.split(":")[0]} if isinstance(config, TechniqueConfig) else set()
