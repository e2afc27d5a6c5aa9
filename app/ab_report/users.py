"""Who takes part in an experiment, in which arm; users are what was randomised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.ab_report.answers import Answers
from app.ab_report.lift import UserSums
from app.ab_report.metrics import Metric, QuantileMetric, RequestSums, sum_by
from app.ab_report.quantile import RequestValues

HOLDOUT = "(holdout)"
"""Name of the arm of held-out users; no arm of a configuration can have it."""


@dataclass(frozen=True)
class ArmSize:
    """How much of the log one arm is."""

    users: int
    requests: int
    items: int


@dataclass(frozen=True)
class Participants:
    """The ``U`` users of an experiment that saw one arm only, and their ``R`` answers."""

    user_ids: NDArray[np.int64]  # [U], ascending
    arm_of_user: NDArray[np.object_]  # [U]
    request: NDArray[np.int64]  # [R], place among all answers
    user: NDArray[np.int64]  # [R], 0 .. U - 1
    crossed_users: int  # left out: they saw two arms or more
    crossed_requests: int

    @property
    def arms(self) -> list[str]:
        """Arms with users, in alphabetical order."""
        return sorted(set(self.arm_of_user.tolist()))

    def size(self, arm: str, items_shown: NDArray[np.int64]) -> ArmSize:
        """Users, requests and items of an arm; ``items_shown`` is of all answers."""
        of_arm = self.arm_of_user[self.user] == arm
        return ArmSize(
            users=int((self.arm_of_user == arm).sum()),
            requests=int(of_arm.sum()),
            items=int(items_shown[self.request[of_arm]].sum()),
        )

    def sums(self, metric: Metric, requests: RequestSums) -> UserSums:
        """The metric of every user; raises ValueError when there is nothing to divide by."""
        count = len(self.user_ids)
        numerator = sum_by(self.user, requests.signals[metric.signal][self.request], count)
        if metric.per == "user":
            return UserSums(numerator, np.ones(count))
        denominator = requests.denominator(metric.per)[self.request]
        return UserSums(numerator, sum_by(self.user, denominator, count))

    def values(self, arm: str, metric: QuantileMetric, requests: RequestSums) -> RequestValues:
        """The signal of every answer of an arm."""
        of_arm = self.arm_of_user[self.user] == arm
        users, user = np.unique(self.user[of_arm], return_inverse=True)
        values = requests.signals[metric.signal][self.request[of_arm]]
        return RequestValues(values, user, len(users))


def experiment_stages(answers: Answers, counted: NDArray[np.bool_]) -> dict[str, str]:
    """The stage of every experiment in the ``counted`` ([N]) answers; raises ValueError for a key
    at two stages."""
    stages: dict[str, str] = {}
    for stage, columns in answers.stages.items():
        for experiment in set(columns.experiment[counted].tolist()) - {""}:
            if experiment in stages:
                raise ValueError(
                    f"experiment {experiment!r} was logged at the stages {stages[experiment]} and "
                    f"{stage}; a key belongs to one stage, so choose another --since or --until"
                )
            stages[experiment] = stage
    return dict(sorted(stages.items()))


def participants(
    answers: Answers,
    stage: str,
    experiment: str,
    counted: NDArray[np.bool_],
    *,
    with_holdout: bool = False,
) -> Participants:
    """Users of an experiment by their answers in ``counted`` ([N]) that nobody overrode.

    Users who saw two arms are left out: what they did can't be credited to either.
    """
    columns = answers.stages[stage]
    member = (columns.experiment == experiment) & ~answers.holdout
    arm = columns.arm.copy()
    if with_holdout:
        member |= answers.holdout
        arm[answers.holdout] = HOLDOUT
    request = np.flatnonzero(member & counted & ~answers.overridden)
    user_ids, user = np.unique(answers.user_id[request], return_inverse=True)
    names, code = np.unique(arm[request].astype(str), return_inverse=True)
    first = np.zeros(len(user_ids), np.int64)
    first[user] = code
    crossed = np.zeros(len(user_ids), np.bool_)
    crossed[user[code != first[user]]] = True
    kept = ~crossed[user]
    new_place = np.cumsum(~crossed) - 1
    return Participants(
        user_ids=user_ids[~crossed],
        arm_of_user=names[first[~crossed]].astype(object),
        request=request[kept],
        user=new_place[user[kept]],
        crossed_users=int(crossed.sum()),
        crossed_requests=int((~kept).sum()),
    )
