"""What can be changed while a stage serves (Serve's ``user_config``), checked before it is used."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from marm.events import TASKS

ItemId = Annotated[int, Field(ge=0, le=2**63 - 1)]
MAX_BLOCKED_ITEMS = 100_000


class StageKnobs(BaseModel):
    """Settings of every stage; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_version: Annotated[int, Field(ge=1)] | None = None
    """Serve exactly this version; None follows the registry's pin, or else the newest version."""


class RetrievalKnobs(StageKnobs):
    """Live settings of retrieval."""

    filter_seen: bool = True
    """Leave out the items of the rows that were read."""
    blocked_item_ids: tuple[ItemId, ...] = Field(default=(), max_length=MAX_BLOCKED_ITEMS)
    """Items that are never returned."""


class CascadingKnobs(StageKnobs):
    """Live settings of cascading."""


class RankingKnobs(StageKnobs):
    """Live settings of ranking."""

    fusion: dict[str, float] = {"long_view": 1.0, "like": 0.5, "watch_time": 0.02}
    """Weight of every task in the final score; tasks that a model has not learned count zero."""

    @field_validator("fusion")
    @classmethod
    def _known_tasks(cls, fusion: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(fusion) - set(TASKS))
        if unknown or not all(math.isfinite(weight) for weight in fusion.values()):
            raise ValueError(
                f"fusion must map tasks of {TASKS} to finite weights, got {fusion}; "
                "remove what is not listed"
            )
        return fusion
