"""Users of the simulated world, answered by the arms of an experiment.

An arm scores random candidates by the user's true taste and noise; how much taste is in the score
is how good the arm is. What users did becomes events, and what they were shown exposures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_actors.exposure_log.schema import EXPOSURE_SCHEMA, EXPOSURE_STAGES
from marm.events import TASKS, EventBatch
from stages.request import StageName
from train.data.world import World

STAGE: StageName = "ranking"
EXPERIMENT = "taste"

_HOUR_MS = 3_600_000
_WATCH_MS = 30_000  # between the items of an answer
_LONG_VIEW = TASKS.index("long_view")


@dataclass(frozen=True)
class Policy:
    """An arm: the score is ``taste_weight`` times the log-odds of a long view, plus noise."""

    name: str
    taste_weight: float
    latency_ms: float = 20.0


@dataclass(frozen=True)
class Traffic:
    """How often users come, and what they are shown."""

    rounds: int = 8
    hours_between: int = 7
    active_share: float = 0.6  # of the users, in each round
    candidates: int = 20
    shown: int = 6
    go_on: float = 0.85  # chance to look at the next item, too
    degraded_share: float = 0.01


@dataclass(frozen=True)
class Lived:
    """What the logs hold of it."""

    exposures: pa.Table  # in EXPOSURE_SCHEMA
    events: EventBatch


def live(
    world: World, policies: Sequence[Policy], arm: NDArray[np.int64], traffic: Traffic, seed: int
) -> Lived:
    """Let the users of ``world`` live on from now; ``arm`` (``[users]``) is the policy of each.

    Who comes when, what could be shown and all noise depend on ``seed`` only, so two calls differ
    by their arms alone.
    """
    rng = np.random.default_rng(seed)
    answers, events = [], []
    start_ms = world.now_ms + _HOUR_MS
    for turn in range(traffic.rounds):
        now_ms = start_ms + turn * traffic.hours_between * _HOUR_MS
        lived = _one_round(world, policies, arm, traffic, now_ms, rng)
        answers.append(lived.exposures)
        events.append(lived.events)
    return Lived(pa.concat_tables(answers), EventBatch.concat(events))


def _one_round(
    world: World,
    policies: Sequence[Policy],
    arm: NDArray[np.int64],
    traffic: Traffic,
    now_ms: int,
    rng: np.random.Generator,
) -> Lived:
    """One answer for each active user, and what they did with its items."""
    users = 1 + np.flatnonzero(rng.random(len(arm)) < traffic.active_share)
    shape = len(users), traffic.candidates
    candidates = rng.integers(1, world.config.num_items + 1, shape)
    noise = rng.standard_normal(shape)
    stays = rng.random((traffic.shown, len(users))) < traffic.go_on
    latency_noise, degraded = rng.standard_normal(len(users)), rng.random(len(users))
    chance = world.reveal(np.repeat(users, traffic.candidates), candidates.ravel(), 1, now_ms)[
        :, _LONG_VIEW
    ].astype(np.float64)
    taste = np.log(chance / (1 - chance)).reshape(shape)
    weight = np.array([policy.taste_weight for policy in policies])[arm[users - 1]]
    scores = weight[:, None] * taste + noise
    best = np.argsort(-scores, axis=1)[:, : traffic.shown]
    items = np.take_along_axis(candidates, best, axis=1)
    latency = np.array([policy.latency_ms for policy in policies])[arm[users - 1]]
    table = _exposures(
        users,
        now_ms,
        items,
        np.take_along_axis(scores, best, axis=1),
        np.array([policy.name for policy in policies])[arm[users - 1]],
        latency * np.exp(0.4 * latency_noise),
        degraded < traffic.degraded_share,
    )
    return Lived(table, _watch(world, users, items, stays, now_ms))


def _watch(
    world: World,
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    stays: NDArray[np.bool_],
    now_ms: int,
) -> EventBatch:
    """Users look at their items from the top until they have enough."""
    watching = np.ones(len(users), np.bool_)
    batches = []
    for place in range(items.shape[1]):
        time_ms = now_ms + 1_000 + place * _WATCH_MS
        shown = users[watching], items[watching, place], 1, time_ms
        batches.append(world.accept(*shown, world.respond(*shown)))
        watching &= stays[place]
    return EventBatch.concat(batches)


def _exposures(
    users: NDArray[np.int64],
    now_ms: int,
    items: NDArray[np.int64],
    scores: NDArray[np.float64],
    arm: NDArray[np.str_],
    latency_ms: NDArray[np.float64],
    degraded: NDArray[np.bool_],
) -> pa.Table:
    """A round's answers in `EXPOSURE_SCHEMA`."""
    count = len(users)
    offsets = np.arange(count + 1, dtype=np.int32) * items.shape[1]
    columns: dict[str, object] = {
        "request_id": [f"{now_ms:x}-{user}" for user in users.tolist()],
        "time_ms": np.full(count, now_ms),
        "user_id": users,
        "holdout": np.zeros(count, np.bool_),
        "overridden": np.zeros(count, np.bool_),
        "latency_ms": latency_ms.astype(np.float32),
        "degraded": [["ranking: deadline"] if late else [] for late in degraded.tolist()],
        "item_ids": pa.ListArray.from_arrays(offsets, pa.array(items.ravel())),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(scores.ravel().astype(np.float32))),
    }
    for stage in EXPOSURE_STAGES:
        mine = stage == STAGE
        columns[f"{stage}_experiment"] = [EXPERIMENT if mine else ""] * count
        columns[f"{stage}_arm"] = arm.tolist() if mine else ["default"] * count
        columns[f"{stage}_version"] = np.ones(count, np.int64)
        columns[f"{stage}_depth"] = np.zeros(count, np.int32)
        columns[f"{stage}_shadow"] = np.zeros(count, np.bool_)
    arrays = [pa.array(columns[column.name], column.type) for column in EXPOSURE_SCHEMA]
    return pa.table(arrays, schema=EXPOSURE_SCHEMA)
