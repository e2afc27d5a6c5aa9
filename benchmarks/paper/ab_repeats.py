"""Many small experiments at once: users of the simulated world don't influence each other, so one
large population, cut into groups, is as many independent experiments."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from app.ab_report.answers import parse_answers
from app.ab_report.attribution import attribute
from app.ab_report.bootstrap import UserBootstrap
from app.ab_report.cuped import cuped_sums
from app.ab_report.history import History
from app.ab_report.lift import DeltaMethod, Lift, UserSums
from app.ab_report.metrics import METRICS, request_sums
from app.ab_report.settings import DAY_MS
from app.ab_report.users import participants
from benchmarks.paper.ab_world import EXPERIMENT, STAGE, Policy, Traffic, live
from marm.events import EventBatch
from train.data.world import World
from train.data.world_config import WorldConfig

_METRIC = METRICS[0]
_BOOTSTRAP = UserBootstrap(resamples=1_000)
_TRAFFIC = Traffic(rounds=4)


@dataclass(frozen=True)
class Population:
    """What all users did under one arm, and before."""

    sums: UserSums
    covariates: NDArray[np.float64]  # [U, P]
    user_ids: NDArray[np.int64]  # [U], those who came at all


@dataclass(frozen=True)
class Repeats:
    """By method, a flag for each experiment, ``[groups]``: whether the interval excludes zero where
    there is no effect, holds the true effect, and excludes zero where there is one."""

    null: dict[str, NDArray[np.bool_]]
    covered: dict[str, NDArray[np.bool_]]
    found: dict[str, NDArray[np.bool_]]
    true_lift: float  # of the whole population, if everybody moved from one arm to the other
    control_mean: float


def repeat_experiments(
    control: Policy, better: Policy, groups: int, users_per_group: int, history: int, seed: int
) -> Repeats:
    """Run ``groups`` experiments without an effect and as many with one.

    The whole population lives twice, all under ``control`` and all under ``better``: the true lift
    is known, and users of either arm are taken from the run of that arm.
    """
    config = WorldConfig(
        num_users=groups * users_per_group,
        num_items=1_000,
        num_events=groups * users_per_group * history,
        seed=seed,
    )
    runs = [_populate(config, policy, seed) for policy in (control, better)]
    rng = np.random.default_rng(seed)
    in_arm = rng.random(config.num_users) < 0.5
    null = _lifts(runs[0], runs[0], in_arm, groups, users_per_group)
    planted = _lifts(runs[0], runs[1], in_arm, groups, users_per_group)
    truth = runs[1].sums.mean - runs[0].sums.mean
    return Repeats(
        null=_flags(null, 0.0, covers=False),
        covered=_flags(planted, truth, covers=True),
        found=_flags(planted, 0.0, covers=False),
        true_lift=truth,
        control_mean=runs[0].sums.mean,
    )


def _populate(config: WorldConfig, policy: Policy, seed: int) -> Population:
    world = World(config)
    past = list(world.stream())
    begins_ms = world.now_ms
    everybody = np.zeros(config.num_users, np.int64)
    lived = live(world, (policy,), everybody, _TRAFFIC, seed)
    answers = parse_answers(lived.exposures)
    requests = request_sums(answers, attribute(answers, lived.events, DAY_MS))
    who = participants(answers, STAGE, EXPERIMENT, np.ones(len(answers), np.bool_))
    before = EventBatch.concat(past)
    history = History(before.take(before.timestamp_ms <= begins_ms), who.user_ids)
    return Population(who.sums(_METRIC, requests), history.covariates(_METRIC), who.user_ids)


def _lifts(
    first: Population, second: Population, in_arm: NDArray[np.bool_], groups: int, size: int
) -> dict[str, list[Lift]]:
    """The lifts of every group, users ``in_arm`` from ``second`` against the others of
    ``first``."""
    lifts: dict[str, list[Lift]] = {"delta": [], "delta_cuped": [], "bootstrap": []}
    for group in range(groups):
        first_id, end_id = 1 + group * size, 1 + (group + 1) * size
        sums, covariates = {}, {}
        for name, run, treated in (("control", first, False), ("arm", second, True)):
            begin, end = np.searchsorted(run.user_ids, [first_id, end_id])
            place = np.arange(begin, end)
            place = place[in_arm[run.user_ids[place] - 1] == treated]
            sums[name] = UserSums(run.sums.numerator[place], run.sums.denominator[place])
            covariates[name] = run.covariates[place]
        adjusted = cuped_sums(sums, covariates)
        lifts["delta"].append(DeltaMethod().compare(sums["control"], sums["arm"]))
        lifts["delta_cuped"].append(DeltaMethod().compare(adjusted["control"], adjusted["arm"]))
        bootstrap = replace(_BOOTSTRAP, seed=group)
        lifts["bootstrap"].append(bootstrap.compare(sums["control"], sums["arm"]))
    return lifts


def _flags(
    lifts: dict[str, list[Lift]], value: float, *, covers: bool
) -> dict[str, NDArray[np.bool_]]:
    """Whether the interval of every lift covers ``value``, or whether it excludes it."""
    return {
        method: np.array(
            [(lift.absolute.low <= value <= lift.absolute.high) == covers for lift in found]
        )
        for method, found in lifts.items()
    }
