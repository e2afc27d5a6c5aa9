"""Users of the simulated world: fixed traits, and the state that every exposure changes."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from train.data.world_config import WorldConfig
from train.data.world_noise import user_keys

NO_TAG = -1
NUM_CONTEXTS = 3
"""Pages of the app, as context ids 1..3: the main feed, discovery, and a calm second feed."""

_DAY_MS = 86_400_000.0


@dataclass(frozen=True)
class UserTraits:
    """What never changes about ``U`` users."""

    long_view_bias: NDArray[np.float64]
    generosity: NDArray[np.float64]  # [4, U]: for like, comment, forward and follow
    mean_break_ms: NDArray[np.float64]
    mean_session_events: NDArray[np.float64]
    favourite_context: NDArray[np.int64]
    event_keys: NDArray[np.uint64]  # randomness of each user's events
    habit_keys: NDArray[np.uint64]  # which tag the user wants after which
    author_keys: NDArray[np.uint64]  # how much the user cares for each author


@dataclass(frozen=True)
class UserState:
    """What exposures change. Arrays are updated in place; ``copy`` keeps a moment."""

    next_ms: NDArray[np.int64]  # when the user sees the next item
    last_ms: NDArray[np.int64]  # when the user saw the last one
    num_events: NDArray[np.int64]
    session_position: NDArray[np.int64]
    session_length: NDArray[np.int64]
    context_id: NDArray[np.int64]
    wanted_after: NDArray[np.int64]  # tag of the last long view: the context of the habits
    last_tag: NDArray[np.int64]
    streak: NDArray[np.int64]  # exposures in a row of ``last_tag``
    interests: NDArray[np.int64]  # [U, K] tags
    weights: NDArray[np.float64]  # [U, K], sums to 1

    def copy(self) -> UserState:
        """This state as of now."""
        return UserState(*(getattr(self, f.name).copy() for f in fields(self)))


def build_traits(config: WorldConfig) -> UserTraits:
    """Draw the users' traits."""
    rng = np.random.default_rng([config.seed, 2])
    count = config.num_users
    activity = np.exp(0.7 * rng.standard_normal(count) - 0.245)  # mean 1
    session_pace = np.exp(0.3 * rng.standard_normal(count) - 0.045)
    return UserTraits(
        long_view_bias=0.5 * rng.standard_normal(count),
        generosity=rng.standard_normal((4, count)),
        mean_break_ms=_DAY_MS / (config.sessions_per_day * activity),
        mean_session_events=np.maximum(1.0, config.session_events * session_pace),
        favourite_context=rng.integers(1, NUM_CONTEXTS + 1, count),
        event_keys=user_keys(config.seed, 1, count),
        habit_keys=user_keys(config.seed, 2, count),
        author_keys=user_keys(config.seed, 3, count),
    )


def build_state(config: WorldConfig, traits: UserTraits) -> UserState:
    """Every user just before the first session."""
    rng = np.random.default_rng([config.seed, 3])
    count, num_tags, slots = config.num_users, config.num_tags, config.num_interests
    # Gumbel noise on the log shares: slots distinct tags per user, popular tags more often.
    appeal = rng.gumbel(size=(count, num_tags)) - 0.3 * np.log1p(np.arange(num_tags))
    interests = np.argsort(-appeal, axis=1)[:, :slots].astype(np.int64)
    weights = rng.gamma(2.0, size=(count, slots)) + 1e-3
    first_ms = config.start_ms + (rng.random(count) * traits.mean_break_ms).astype(np.int64)

    def filled(value: int) -> NDArray[np.int64]:
        return np.full(count, value, np.int64)

    return UserState(
        next_ms=first_ms,
        last_ms=filled(0),
        num_events=filled(0),
        session_position=filled(0),
        session_length=filled(0),
        context_id=traits.favourite_context.copy(),
        wanted_after=filled(NO_TAG),
        last_tag=filled(NO_TAG),
        streak=filled(0),
        interests=interests,
        weights=weights / weights.sum(axis=1, keepdims=True),
    )
