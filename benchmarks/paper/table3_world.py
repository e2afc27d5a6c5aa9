"""Users of the simulated world live on, answered by the stages of two arms.

Who comes when, how long each looks and what everybody thinks of every item depend on the seed and
the world alone, so that two lives of a user differ by what he is shown.

Shape legend: U users of the world, B users of a round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper.table3_models import CONTEXT_ID
from marm.events import TASKS, WATCH_TIME, EventBatch
from stages.fusion import best_first
from train.data.world import World

_HOUR_MS = 3_600_000
_WATCH_MS = 30_000  # between the items of an answer
_LONG_VIEW, _WATCH_TIME = TASKS.index("long_view"), TASKS.index(WATCH_TIME)

SIGNALS = ("requests", "items", "long_views", "watch_s", "expected_long_views")


class StageModels(Protocol):
    """Models of all stages; `benchmarks.paper.table3_models.LiveModels` for one."""

    def find(self, user_id: int, now_ms: int, limit: int) -> NDArray[np.int64]:
        """Ids of the best ``limit`` items of all, best first."""
        ...

    def preselect(
        self, user_id: int, item_ids: NDArray[np.int64], now_ms: int
    ) -> NDArray[np.float32]:
        """A score of each item."""
        ...

    def rank(self, user_id: int, item_ids: NDArray[np.int64], now_ms: int) -> NDArray[np.float32]:
        """A better score of each item, for fewer of them."""
        ...


@dataclass(frozen=True)
class Traffic:
    """How often users come, how much each stage lets through, and how long users look."""

    rounds: int = 6
    hours_between: int = 7
    active_share: float = 0.6  # of the users, in each round
    retrieved: int = 200
    preselected: int = 50
    shown: int = 6
    go_on: float = 0.75  # chance to look at the next item, too
    go_on_enjoyed: float = 0.95  # the same after a long view

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if not 1 <= self.shown <= self.preselected <= self.retrieved:
            raise ValueError(
                "stages must let fewer and fewer items through, got "
                f"retrieved={self.retrieved}, preselected={self.preselected}, shown={self.shown}"
            )


@dataclass(frozen=True)
class Arm:
    """Whose model answers at each stage."""

    retrieval: StageModels
    cascading: StageModels
    ranking: StageModels

    def answer(self, user_id: int, now_ms: int, traffic: Traffic) -> NDArray[np.int64]:
        """Ids of the items that the user is shown, best first."""
        items = self.retrieval.find(user_id, now_ms, traffic.retrieved)
        scores = self.cascading.preselect(user_id, items, now_ms)
        items = items[best_first(scores, traffic.preselected)]
        scores = self.ranking.rank(user_id, items, now_ms)
        return items[best_first(scores, traffic.shown)]


Lives = dict[str, NDArray[np.float64]]
"""What every user did, ``[U]`` by the names of `SIGNALS`. Expected long views are the sum of the
true chances of the items he looked at, without the luck of the single view."""


def live(
    world: World,
    arms: tuple[Arm, Arm],
    treated_U: NDArray[np.bool_],
    traffic: Traffic,
    seed: int,
    learn: Callable[[EventBatch], None],
) -> Lives:
    """Let the users of ``world`` live on from now.

    Args:
        world: moved on; give a copy to keep it.
        arms: what answers users outside the treatment, and those in it.
        treated_U: who is in the treatment.
        traffic: how much happens.
        seed: of who comes when and looks how long.
        learn: gets what all users did in a round before the next one begins.
    """
    if treated_U.shape != (world.config.num_users,):
        raise ValueError(
            f"every one of {world.config.num_users} users needs an arm, got {treated_U.shape}"
        )
    if world.config.num_items < traffic.shown:
        raise ValueError(
            f"{traffic.shown} items are shown, but the world has {world.config.num_items}; raise "
            "num_items"
        )
    rng = np.random.default_rng([seed, 3])
    lives = {name: np.zeros(len(treated_U)) for name in SIGNALS}
    start_ms = world.now_ms + _HOUR_MS
    for turn in range(traffic.rounds):
        now_ms = start_ms + turn * traffic.hours_between * _HOUR_MS
        users = 1 + np.flatnonzero(rng.random(len(treated_U)) < traffic.active_share)
        patience = rng.random((traffic.shown, len(treated_U)))[:, users - 1]
        if not len(users):
            continue
        items = np.stack(
            [
                arms[int(treated_U[user - 1])].answer(user, now_ms, traffic)
                for user in users.tolist()
            ]
        )
        lives["requests"][users - 1] += 1
        events = _watch(world, users, items, patience, now_ms, traffic, lives)
        if turn + 1 < traffic.rounds:
            learn(events)
    return lives


def _watch(
    world: World,
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    patience: NDArray[np.float64],
    now_ms: int,
    traffic: Traffic,
    lives: Lives,
) -> EventBatch:
    """Users look at their ``items`` ([B, shown]) from the top until they have enough."""
    watching = np.ones(len(users), np.bool_)
    batches = []
    for place in range(items.shape[1]):
        user, time_ms = users[watching], now_ms + 1_000 + place * _WATCH_MS
        if not len(user):
            break
        shown = user, items[watching, place], CONTEXT_ID, time_ms
        expected, labels = world.reveal(*shown), world.respond(*shown)
        batches.append(world.accept(*shown, labels))
        enjoyed = labels[:, _LONG_VIEW] > 0
        lives["items"][user - 1] += 1
        lives["long_views"][user - 1] += enjoyed
        lives["watch_s"][user - 1] += labels[:, _WATCH_TIME]
        lives["expected_long_views"][user - 1] += expected[:, _LONG_VIEW]
        chance = np.where(enjoyed, traffic.go_on_enjoyed, traffic.go_on)
        watching[watching] = patience[place, watching] < chance
    return EventBatch.concat(batches)
