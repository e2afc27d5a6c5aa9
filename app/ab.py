"""Which arm serves a user: a salted hash, so that a user stays on an arm everywhere and always.

Python's own `hash` is salted per process and must not be used here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from stages.request import STAGES, StageName

NUM_AB_BUCKETS = 10_000

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class AbConfig(BaseModel):
    """Weights of the arms per stage; a stage that is not named has all users on its first arm."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    salt: str = "marm"
    retrieval: dict[str, Weight] = {}
    cascading: dict[str, Weight] = {}
    ranking: dict[str, Weight] = {}

    def weights(self, stage: StageName) -> Mapping[str, float]:
        """Weights of one stage's arms."""
        by_name: dict[StageName, dict[str, float]] = {
            "retrieval": self.retrieval,
            "cascading": self.cascading,
            "ranking": self.ranking,
        }
        return by_name[stage]


class IngressKnobs(BaseModel):
    """Live settings of the ingress (Serve's ``user_config``)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ab: AbConfig = AbConfig()


class ArmTable:
    """Arms of every stage by user bucket; stages are salted apart, so arms are independent."""

    def __init__(self, config: AbConfig, variants: Mapping[StageName, tuple[str, ...]]) -> None:
        self._salt = config.salt
        self._arms = {
            stage: _bucket_arms(stage, config.weights(stage), variants[stage]) for stage in STAGES
        }

    def assign(self, user_id: int) -> dict[StageName, str]:
        """The arm of each stage for a user."""
        return {
            stage: arms[ab_bucket(f"{self._salt}:{stage}", user_id)]
            for stage, arms in self._arms.items()
        }


def arm_table(
    user_config: Mapping[str, Any], variants: Mapping[StageName, tuple[str, ...]]
) -> ArmTable:
    """The table of the live settings as written; raises ValueError when they make no sense."""
    return ArmTable(IngressKnobs.model_validate(dict(user_config)).ab, variants)


def ab_bucket(salt: str, user_id: int) -> int:
    """The user's bucket in ``[0, NUM_AB_BUCKETS)`` under a salt; equal in every process."""
    digest = hashlib.blake2b(f"{salt}:{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % NUM_AB_BUCKETS


def _bucket_arms(
    stage: StageName, weights: Mapping[str, float], variants: tuple[str, ...]
) -> list[str]:
    unknown = sorted(set(weights) - set(variants))
    if unknown:
        raise ValueError(
            f"ab.{stage} names the arms {unknown}, but {stage} has {list(variants)}; "
            "add a variant or rename the arm"
        )
    shares: NDArray[np.float64] = np.array([weights.get(name, 0.0) for name in variants])
    if not weights:
        shares = np.array([1.0] + [0.0] * (len(variants) - 1))
    total = math.fsum(shares)
    if total <= 0:
        raise ValueError(
            f"ab.{stage} needs at least one arm with a weight above 0, got {dict(weights)}"
        )
    edges = np.rint(np.cumsum(shares) / total * NUM_AB_BUCKETS).astype(np.int64)
    arm_index = np.searchsorted(edges, np.arange(NUM_AB_BUCKETS), side="right")
    return [variants[index] for index in arm_index.tolist()]
