"""What can be changed while a stage serves (Serve's ``user_config``), checked before it is used."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from stages.diversity_rules import ByScoreSettings, DiversityRule
from stages.fusion_rules import FusionRule, WeightedSumSettings, with_kind
from stages.history import DEFAULT_READ_MS
from stages.item_filters import NO_LISTS, ItemLists

ItemId = Annotated[int, Field(ge=0, le=2**63 - 1)]
MAX_LISTED_ITEMS = 100_000


class StageKnobs(BaseModel):
    """Settings of every stage; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_version: Annotated[int, Field(ge=1)] | None = None
    """Serve exactly this version; None follows the registry's pin, or else the newest version."""

    @cached_property
    def lists(self) -> ItemLists:
        """What may be returned; the same object for as long as these settings."""
        return NO_LISTS


class RetrievalKnobs(StageKnobs):
    """Live settings of retrieval."""

    filter_seen: bool = True
    """Leave out the items of the rows that were read."""
    blocked_item_ids: tuple[ItemId, ...] = Field(default=(), max_length=MAX_LISTED_ITEMS)
    """Items that are never returned."""
    allowed_item_ids: tuple[ItemId, ...] | None = Field(
        default=None, min_length=1, max_length=MAX_LISTED_ITEMS
    )
    """Only these items may be returned; None allows every item."""

    @cached_property
    def lists(self) -> ItemLists:
        """See `StageKnobs.lists`."""
        return ItemLists.of([self.blocked_item_ids], self.allowed_item_ids)


class ScoringKnobs(StageKnobs):
    """Live settings of the stages that score candidates against a user's rows."""

    max_depth: Annotated[int, Field(ge=0)] | None = None
    """Use at most so many cached layers; 0 works from raw rows. None uses the model's."""
    max_history_length: Annotated[int, Field(ge=0)] | None = None
    """Use at most so many of the newest rows; None uses what the model was trained with."""
    memory_read_ms: Annotated[float, Field(gt=0, le=60_000)] = DEFAULT_READ_MS
    """Time for reading rows; never more than half of what is left of the stage's time, and never
    more than the memory client's own limit (`stages.pool_memory`)."""


class CascadingKnobs(ScoringKnobs):
    """Live settings of cascading."""


class RankingKnobs(ScoringKnobs):
    """Live settings of ranking."""

    fusion: FusionRule = WeightedSumSettings(
        weights={"long_view": 1.0, "like": 0.5, "watch_time": 0.02}
    )
    """The formula of the final score. Weights alone, ``{task: weight}``, are a weighted sum. Tasks
    that a model has not learned are left out."""
    diversity: DiversityRule = ByScoreSettings()
    """Which of the scored candidates are shown."""

    @field_validator("fusion", mode="before")
    @classmethod
    def _weights_alone(cls, fusion: Any) -> Any:
        return with_kind(fusion)
