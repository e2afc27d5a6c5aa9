"""How an arm scores (ranking and cascading): precision, and the rows that are searched."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.strict import Strict
from marm.scoring_plan import ScoringPlan
from marm.search import RowSearch, SameCategory, TopRows

SCORING_FIELDS = ("precision", "search_top_k", "search_category")


class ScoringArgs(Strict):
    """Settings of a variant. Weights and memory are the same whatever they say."""

    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """``bf16`` is refused where the device is no faster with it (CPUs without AMX); ``auto``
    takes it elsewhere. Scores equal those of training within 1e-4 in fp32 only."""
    search_top_k: Annotated[int, Field(ge=1)] | None = None
    """Attend to the K best rows of every layer (Eq. 9); None attends to what the model attended to
    in training: all rows, or the best of its own search."""
    search_category: Literal["tag", "author", "tag_or_author"] | None = None
    """Take the newest K rows of the candidate's category instead of the best K."""

    @model_validator(mode="after")
    def _category_of_how_many(self) -> ScoringArgs:
        if self.search_category is not None and self.search_top_k is None:
            raise ValueError(
                f"search_category {self.search_category!r} needs search_top_k, the number of rows "
                "to find; set it"
            )
        return self

    def scoring_plan(self) -> ScoringPlan:
        """The plan that these settings stand for."""
        search: RowSearch | None = None
        if self.search_top_k is not None:
            search = TopRows(self.search_top_k)
            if self.search_category is not None:
                search = SameCategory(self.search_category, self.search_top_k)
        return ScoringPlan(self.precision, search)
