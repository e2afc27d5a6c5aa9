"""Size and signal strengths of the simulated world."""

from __future__ import annotations

from dataclasses import dataclass, fields

START_MS = 1_735_689_600_000
"""Midnight, 2025-01-01 UTC: when the first users of a world wake up by default."""


@dataclass(frozen=True)
class WorldConfig:
    """What a world is made of. Two worlds of equal configuration produce identical events.

    The strengths are logits: how far each cause moves the odds of a long view. Set one to zero to
    remove that cause, for example ``induction_strength=0`` for a world in which depth is useless.
    """

    num_users: int = 2_000
    num_items: int = 4_000
    num_events: int = 200_000
    seed: int = 0
    num_tags: int = 24
    num_interests: int = 4  # tags a user cares for at a time
    start_ms: int = START_MS
    session_events: float = 12.0  # mean length of a session
    sessions_per_day: float = 3.0
    drift_per_session: float = 0.04  # chance that an interest is replaced by another
    quality_strength: float = 0.7
    interest_strength: float = 0.9
    author_strength: float = 0.5
    induction_strength: float = 1.1
    fatigue_strength: float = 0.6

    def __post_init__(self) -> None:
        minimum = {"num_users": 1, "num_items": 1, "num_events": 0, "seed": 0, "start_ms": 0}
        for field in fields(self):
            value = getattr(self, field.name)
            least = minimum.get(field.name, 0)
            if not value >= least or value == float("inf"):
                raise ValueError(f"{field.name} must be a number >= {least}, got {value}")
        if self.num_tags < 2 or not 1 <= self.num_interests < self.num_tags:
            raise ValueError(
                "a world needs num_tags >= 2 and 1 <= num_interests < num_tags, "
                f"got num_tags={self.num_tags}, num_interests={self.num_interests}"
            )
        if self.num_tags > 1_000:
            raise ValueError(f"num_tags must be at most 1000, got {self.num_tags}")
        if self.num_items < self.num_tags:
            raise ValueError(
                f"every tag needs an item: num_items={self.num_items} is below "
                f"num_tags={self.num_tags}; raise num_items or lower num_tags"
            )
        if self.session_events < 1 or not 0 < self.sessions_per_day <= 24:
            raise ValueError(
                "a world needs session_events >= 1 and 0 < sessions_per_day <= 24, got "
                f"session_events={self.session_events}, sessions_per_day={self.sessions_per_day}"
            )
        if self.drift_per_session > 1:
            raise ValueError(f"drift_per_session is a chance, got {self.drift_per_session}")
