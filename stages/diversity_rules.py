"""Settings of the diversity rules, checked when they are written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages.diversity import ByScore, Diversity, MarginalRelevance, WindowCaps

Window = Annotated[int, Field(ge=2, le=1000)]
Cap = Annotated[int, Field(ge=1, le=1000)]
Penalty = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


class DiversitySettings(BaseModel, ABC):
    """What the rules have in common; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @abstractmethod
    def rule(self) -> Diversity:
        """The rule that these settings describe."""


class ByScoreSettings(DiversitySettings):
    """``{kind: by_score}``: no rule."""

    kind: Literal["by_score"] = "by_score"

    def rule(self) -> Diversity:
        """See `DiversitySettings.rule`."""
        return ByScore()


class WindowCapsSettings(DiversitySettings):
    """``{kind: window_caps, window: 10, max_per_author: 1, max_per_tag: 4}``."""

    kind: Literal["window_caps"]
    window: Window = 10
    max_per_author: Cap | None = None
    max_per_tag: Cap | None = None

    @model_validator(mode="after")
    def _can_bind(self) -> WindowCapsSettings:
        caps = [cap for cap in (self.max_per_author, self.max_per_tag) if cap is not None]
        if not caps or max(caps) >= self.window:
            raise ValueError(
                "diversity by window_caps needs max_per_author or max_per_tag, and each below its "
                f"window, got {self.max_per_author} and {self.max_per_tag} with a window of "
                f"{self.window}; lower the caps or widen the window"
            )
        return self

    def rule(self) -> Diversity:
        """See `DiversitySettings.rule`."""
        return WindowCaps(self.window, self.max_per_author, self.max_per_tag)


class MarginalRelevanceSettings(DiversitySettings):
    """``{kind: marginal_relevance, window: 10, author_penalty: 0.3, tag_penalty: 0.1}``."""

    kind: Literal["marginal_relevance"]
    window: Window = 10
    author_penalty: Penalty = 0.3
    tag_penalty: Penalty = 0.1

    @model_validator(mode="after")
    def _penalises(self) -> MarginalRelevanceSettings:
        if not (self.author_penalty or self.tag_penalty):
            raise ValueError(
                "diversity by marginal_relevance needs an author_penalty or a tag_penalty above 0, "
                "got neither; raise one, or choose kind by_score"
            )
        return self

    def rule(self) -> Diversity:
        """See `DiversitySettings.rule`."""
        return MarginalRelevance(self.window, self.author_penalty, self.tag_penalty)


DiversityRule = Annotated[
    ByScoreSettings | WindowCapsSettings | MarginalRelevanceSettings, Field(discriminator="kind")
]
"""One rule, chosen by its ``kind``."""
