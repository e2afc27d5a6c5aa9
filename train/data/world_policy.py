"""What the app of the simulated world shows, and how an exposure changes its user."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from marm.events import TASKS
from train.data.world_config import WorldConfig
from train.data.world_items import WorldItems
from train.data.world_noise import uniforms
from train.data.world_taste import SESSION_GAP_MS, Exposures
from train.data.world_users import NUM_CONTEXTS, UserState, UserTraits

CHOICE_NOISES = 3
"""Uniforms that the choice of one item consumes."""

PACE_NOISES = 5
"""Uniforms that the decision when to go on consumes."""

_HOUR_MS = 3_600_000
_WAKE_HOUR = 6
_NIGHT_OWLS = 0.25
# Chance that the item is chosen by the user's interests, else by popularity, else uniformly.
_BY_INTEREST = np.array([0.55, 0.62, 0.40, 0.70])  # by context id
_BY_POPULARITY = 0.25
_FAVOURITE_CONTEXT = 0.7
_QUIT_BORED = 0.04
_SCROLL_MS = 900


class LoggingPolicy:
    """The recommender whose exposures the log records: it knows interests, and explores."""

    def __init__(self, config: WorldConfig, items: WorldItems, traits: UserTraits) -> None:
        self._config = config
        self._items = items
        self._traits = traits

    def open_sessions(self, user: NDArray[np.int64], keys: NDArray, state: UserState) -> None:
        """Start the sessions of ``user`` (distinct): length, page, and perhaps a new interest."""
        length, page, other, drift, fresh, walk = uniforms(keys, 6)
        mean = self._traits.mean_session_events[user]
        geometric = np.log(length) / np.log1p(-1.0 / np.maximum(mean, 1.001))
        state.session_length[user] = 1 + np.minimum(geometric, 500.0).astype(np.int64)
        favourite = self._traits.favourite_context[user]
        elsewhere = 1 + (other * NUM_CONTEXTS).astype(np.int64)
        state.context_id[user] = np.where(page < _FAVOURITE_CONTEXT, favourite, elsewhere)
        drifting = drift < self._config.drift_per_session
        self._replace_interest(user[drifting], fresh[drifting], state)
        self._walk_weights(user, walk, state)

    def choose(
        self, user: NDArray[np.int64], state: UserState, noise: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Position of the item each user sees next; ``noise`` is ``[CHOICE_NOISES, B]``."""
        kind, slot_draw, item_draw = noise
        edges = np.cumsum(state.weights[user], axis=1)[:, :-1]
        slot = (slot_draw[:, None] > edges).sum(axis=1)
        by_interest = self._items.popular_of_tag(item_draw, state.interests[user, slot])
        by_popularity = self._items.popular(item_draw)
        uniform = (item_draw * self._config.num_items).astype(np.int64)
        personal = _BY_INTEREST[state.context_id[user]]
        return np.where(
            kind < personal,
            by_interest,
            np.where(kind < personal + _BY_POPULARITY, by_popularity, uniform),
        )

    def experience(
        self, shown: Exposures, labels: NDArray[np.float32], state: UserState
    ) -> NDArray[np.int64]:
        """Apply what distinct users did to their state; returns when each watch ends."""
        user, tag = shown.user, self._items.tag[shown.item]
        enjoyed = labels[:, TASKS.index("long_view")] > 0
        state.streak[user] = np.where(state.last_tag[user] == tag, state.streak[user] + 1, 1)
        state.last_tag[user] = tag
        state.wanted_after[user] = np.where(enjoyed, tag, state.wanted_after[user])
        rested = shown.now_ms - state.last_ms[user] > SESSION_GAP_MS
        state.session_position[user] = np.where(rested, 0, state.session_position[user]) + 1
        state.num_events[user] += 1
        state.last_ms[user] = shown.now_ms
        watch_s = np.nan_to_num(labels[:, TASKS.index("watch_time")].astype(np.float64))
        ends_ms = shown.now_ms + 1 + (watch_s * 1_000.0).astype(np.int64)
        state.next_ms[user] = np.maximum(state.next_ms[user], ends_ms)
        return ends_ms

    def schedule(
        self,
        shown: Exposures,
        labels: NDArray[np.float32],
        ends_ms: NDArray[np.int64],
        state: UserState,
        noise: NDArray[np.float64],
    ) -> None:
        """Decide when each user sees the next item; ``noise`` is ``[PACE_NOISES, B]``."""
        quit_draw, scroll, away, night, sleep = noise
        user = shown.user
        enjoyed = labels[:, TASKS.index("long_view")] > 0
        over = state.session_position[user] >= state.session_length[user]
        over |= ~enjoyed & (quit_draw < _QUIT_BORED)
        soon = ends_ms + _SCROLL_MS + (scroll * _SCROLL_MS).astype(np.int64)
        pause = 0.05 - np.log(away) * 0.95  # exponential with a floor, mean 1
        later = ends_ms + (pause * self._traits.mean_break_ms[user]).astype(np.int64)
        asleep = (later // _HOUR_MS % 24 < _WAKE_HOUR) & (night > _NIGHT_OWLS)
        later += np.where(asleep, (_WAKE_HOUR + 2.0 * sleep) * _HOUR_MS, 0.0).astype(np.int64)
        state.next_ms[user] = np.where(over, later, soon)
        state.session_position[user] = np.where(over, 0, state.session_position[user])

    def _replace_interest(
        self, user: NDArray[np.int64], draw: NDArray[np.float64], state: UserState
    ) -> None:
        """The weakest interest gives way to a tag drawn evenly, unless that is one already."""
        tag = (draw * self._config.num_tags).astype(np.int64)
        is_new = (state.interests[user] != tag[:, None]).all(axis=1)
        user, tag = user[is_new], tag[is_new]
        weakest = state.weights[user].argmin(axis=1)
        state.interests[user, weakest] = tag
        weights = state.weights[user]
        weights[np.arange(len(user)), weakest] = 1.0 / self._config.num_interests
        state.weights[user] = weights / weights.sum(axis=1, keepdims=True)

    def _walk_weights(
        self, user: NDArray[np.int64], draw: NDArray[np.float64], state: UserState
    ) -> None:
        """One interest of each user gets up to 25% warmer or cooler."""
        slots = self._config.num_interests
        slot = np.minimum((draw * slots).astype(np.int64), slots - 1)
        step = draw * slots - slot  # what is left of the draw is uniform in [0, 1)
        weights = state.weights[user]
        weights[np.arange(len(user)), slot] *= np.exp(0.5 * step - 0.25)
        weights = np.maximum(weights, 0.05 / slots)
        state.weights[user] = weights / weights.sum(axis=1, keepdims=True)
