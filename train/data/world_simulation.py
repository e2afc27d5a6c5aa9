"""All users of the simulated world side by side, moved through time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.data.world_config import WorldConfig
from train.data.world_items import WorldItems, build_items
from train.data.world_noise import derive, uniforms
from train.data.world_policy import CHOICE_NOISES, PACE_NOISES, LoggingPolicy
from train.data.world_taste import FEEDBACK_NOISES, Exposures, Taste
from train.data.world_users import UserState, UserTraits, build_state, build_traits

WINDOW_EVENTS = 65_536
"""Events simulated at a time, on average; bounds memory, changes nothing else."""

_SESSION_DRAW = np.int64(1) << 40  # draws of a session never meet draws of an event


@dataclass(frozen=True)
class Lived:
    """Exposures that happened, with their labels and the true log-odds of a long view."""

    shown: Exposures
    labels: NDArray[np.float32]  # [B, len(TASKS)]
    logit: NDArray[np.float64]  # [B]

    def take(self, index: NDArray | slice) -> Lived:
        """Those at ``index``, in that order."""
        shown = Exposures(
            self.shown.user[index],
            self.shown.item[index],
            self.shown.context_id[index],
            self.shown.now_ms[index],
        )
        return Lived(shown, self.labels[index], self.logit[index])


class Simulation:
    """The mechanics of a world: items, users and the clock.

    Users don't influence each other and all randomness is keyed by user and event, so they are
    simulated many at a time, one event of each per step, and sorted into time order afterwards.
    """

    def __init__(self, config: WorldConfig) -> None:
        self._config = config
        self.items: WorldItems = build_items(config)
        self.traits: UserTraits = build_traits(config)
        self.state: UserState = build_state(config, self.traits)
        self.taste = Taste(config, self.items, self.traits)
        self.policy = LoggingPolicy(config, self.items, self.traits)
        self.clock_ms = config.start_ms

    def advance(self, at_most: int) -> Lived:
        """Let all users live for a while: at most ``at_most`` exposures, in time order. If more
        would have happened, time stops at the last of them."""
        rate_per_ms = float((self.traits.mean_session_events / self.traits.mean_break_ms).sum())
        end_ms = self.clock_ms + max(1_000, int(min(WINDOW_EVENTS, at_most + 64) / rate_per_ms))
        before = self.state.copy()
        lived = self._live_until(end_ms, self._config.num_users)
        if len(lived.logit) >= at_most:
            # Live through the window again, only up to the last exposure that is wanted.
            end_ms = int(lived.shown.now_ms[at_most - 1])
            last_user = int(lived.shown.user[at_most - 1])
            self.state = before
            lived = self._live_until(end_ms, last_user)
        self.clock_ms = end_ms
        return lived

    def _live_until(self, last_ms: int, last_user: int) -> Lived:
        """All exposures up to and with (``last_ms``, ``last_user``), in that order."""
        user = np.arange(self._config.num_users)
        steps = [self._step(user[:0])]
        while True:
            next_ms = self.state.next_ms[user]
            user = user[(next_ms < last_ms) | ((next_ms == last_ms) & (user <= last_user))]
            if not len(user):
                break
            steps.append(self._step(user))
        shown = Exposures(
            *(
                np.concatenate([getattr(step.shown, name) for step in steps])
                for name in ("user", "item", "context_id", "now_ms")
            )
        )
        lived = Lived(
            shown,
            np.concatenate([step.labels for step in steps]),
            np.concatenate([step.logit for step in steps]),
        )
        return lived.take(np.lexsort((shown.user, shown.now_ms)))

    def _step(self, user: NDArray[np.int64]) -> Lived:
        """The next exposure of each of ``user`` (distinct)."""
        state, keys = self.state, self.traits.event_keys
        opening = user[state.session_position[user] == 0]
        session_keys = derive(keys[opening], state.num_events[opening] + _SESSION_DRAW)
        self.policy.open_sessions(opening, session_keys, state)
        noise = uniforms(
            derive(keys[user], state.num_events[user]),
            CHOICE_NOISES + FEEDBACK_NOISES + PACE_NOISES,
        )
        choice, feedback, pace = np.split(noise, [CHOICE_NOISES, CHOICE_NOISES + FEEDBACK_NOISES])
        item = self.policy.choose(user, state, choice)
        shown = Exposures(user, item, state.context_id[user], state.next_ms[user])
        logit = self.taste.logits(shown, state)
        labels = self.taste.feedback(shown, logit, feedback)
        ends_ms = self.policy.experience(shown, labels, state)
        self.policy.schedule(shown, labels, ends_ms, state, pace)
        return Lived(shown, labels, logit)
