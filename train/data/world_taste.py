"""How a user of the simulated world takes an item: the odds, and the feedback they lead to.

One latent satisfaction ``v = logit + logistic noise`` drives watch time: the item is watched long
when ``v > 0`` and counts as clicked when ``v > CLICK_LATENT``. The other feedback needs a click.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.events import TASKS
from train.data.world_config import WorldConfig
from train.data.world_items import WorldItems
from train.data.world_noise import signs, unit_normals
from train.data.world_users import NO_TAG, UserState, UserTraits

LONG_VIEW_S = 18.0
"""A watch of the whole item, or of this many seconds, is a long view."""

CLICK_LATENT = -0.9
WATCH_SPREAD = 0.6
MAX_LOOPS = 2.0
SESSION_GAP_MS = 1_800_000
FEEDBACK_NOISES = 5
"""Uniforms that one exposure's feedback consumes."""

_BASE_LOGIT = -1.1
_CONTEXT_LOGIT = np.array([0.0, 0.1, -0.25, 0.2])
_REACTIONS = ("like", "comment", "forward", "follow")
_REACTION_LOGIT = np.array([-2.4, -4.2, -4.3, -4.4])
_REACTION_TASTE = np.array([0.5, 0.4, 0.5, 0.3])
_REACTION_TRAIT = np.array([0.9, 0.9, 0.8, 0.5])
_MAX_STREAK = 3
_FULL_FATIGUE = 25.0
_QUANTILES = np.log((np.arange(32) + 0.5) / (31.5 - np.arange(32)))  # of the logistic noise


@dataclass(frozen=True)
class Exposures:
    """``B`` items shown: who (0-based), what (position), where and when."""

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    context_id: NDArray[np.int64]
    now_ms: NDArray[np.int64]


class Taste:
    """The response model: pure functions of traits, state and items."""

    def __init__(self, config: WorldConfig, items: WorldItems, traits: UserTraits) -> None:
        self._config = config
        self._items = items
        self._traits = traits

    def logits(self, shown: Exposures, state: UserState) -> NDArray[np.float64]:
        """Log-odds of a long view, ``[B]``."""
        config, items, traits = self._config, self._items, self._traits
        user, tag = shown.user, items.tag[shown.item]
        logit = _BASE_LOGIT + traits.long_view_bias[user] + _CONTEXT_LOGIT[shown.context_id]
        logit += config.quality_strength * items.quality[shown.item]
        logit += config.author_strength * unit_normals(
            traits.author_keys[user], items.author_id[shown.item]
        )
        logit += config.interest_strength * self._interest(user, tag, state)
        logit += config.induction_strength * self.habit(user, state.wanted_after[user], tag)
        position = np.where(
            shown.now_ms - state.last_ms[user] > SESSION_GAP_MS, 0, state.session_position[user]
        )
        streak = np.where(state.last_tag[user] == tag, state.streak[user], 0)
        tired = np.minimum(position / _FULL_FATIGUE, 1.0)
        bored = np.minimum(streak / _MAX_STREAK, 1.0)
        return logit - config.fatigue_strength * (tired + bored)

    def habit(
        self, user: NDArray[np.int64], after: NDArray[np.int64], tag: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Whether this user wants ``tag`` (+1) or not (-1) right after enjoying ``after``.

        The signs are independent for each (user, after, tag), so they average out over either tag
        and over users: only what this user did the last time ``after`` was enjoyed tells them.
        """
        pair = after * self._config.num_tags + tag
        wish = signs(self._traits.habit_keys[user], np.maximum(pair, 0))
        return np.where(after == NO_TAG, 0.0, wish)

    def probabilities(self, shown: Exposures, logit: NDArray[np.float64]) -> NDArray[np.float32]:
        """Chance of each feedback, and expected watch seconds, as ``[B, len(TASKS)]``."""
        expected = np.empty((len(logit), len(TASKS)), np.float32)
        expected[:, TASKS.index("click")] = _sigmoid(logit - CLICK_LATENT)
        expected[:, TASKS.index("long_view")] = _sigmoid(logit)
        reaction = _sigmoid(self._reaction_logits(shown, logit)) * _sigmoid(logit - CLICK_LATENT)
        expected[:, [TASKS.index(task) for task in _REACTIONS]] = reaction.T
        total = np.zeros(len(logit))
        for noise in _QUANTILES:
            total += self._watch_s(shown, logit + noise)
        expected[:, TASKS.index("watch_time")] = total / len(_QUANTILES)
        return expected

    def feedback(
        self, shown: Exposures, logit: NDArray[np.float64], noise: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Feedback drawn with ``noise``, ``[FEEDBACK_NOISES, B]``, as ``[B, len(TASKS)]``."""
        latent = logit + np.log(noise[0] / (1.0 - noise[0]))
        clicked = latent > CLICK_LATENT
        labels = np.empty((len(logit), len(TASKS)), np.float32)
        labels[:, TASKS.index("click")] = clicked
        labels[:, TASKS.index("long_view")] = latent > 0
        reacted = (noise[1:] < _sigmoid(self._reaction_logits(shown, logit))) & clicked
        labels[:, [TASKS.index(task) for task in _REACTIONS]] = reacted.T
        labels[:, TASKS.index("watch_time")] = self._watch_s(shown, latent)
        return labels

    def _interest(
        self, user: NDArray[np.int64], tag: NDArray[np.int64], state: UserState
    ) -> NDArray[np.float64]:
        """-1 for a tag outside the user's interests, 0.2 to 1.6 inside, by its weight."""
        match = state.interests[user] == tag[:, None]
        share = (state.weights[user] * match).sum(axis=1)
        warmth = np.minimum(0.2 + 0.7 * share * self._config.num_interests, 1.6)
        return np.where(match.any(axis=1), warmth, -1.0)

    def _reaction_logits(self, shown: Exposures, logit: NDArray[np.float64]) -> NDArray[np.float64]:
        return (
            _REACTION_LOGIT[:, None]
            + _REACTION_TASTE[:, None] * logit
            + _REACTION_TRAIT[:, None] * self._traits.generosity[:, shown.user]
        )

    def _watch_s(self, shown: Exposures, latent: NDArray[np.float64]) -> NDArray[np.float64]:
        duration_s = self._items.duration_ms[shown.item] / 1_000.0
        watched = np.minimum(duration_s, LONG_VIEW_S) * np.exp(WATCH_SPREAD * latent)
        return np.clip(watched, 0.2, MAX_LOOPS * duration_s)


def _sigmoid(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-logit))
