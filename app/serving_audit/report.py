"""What an audit of serving found: how far served scores are from offline ones, arm by arm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.request import StageName
from stages.version_checks import worst_difference


@dataclass(frozen=True)
class ArmUnderAudit:
    """One version of one arm.

    ``tolerance`` is the largest ``|served - offline| / max(1, |offline|)`` that passes.
    """

    stage: StageName
    arm: str
    version: int
    tolerance: float

    @property
    def name(self) -> str:
        """Stage, arm and version."""
        return f"{self.stage}/{self.arm} version {self.version}"


@dataclass(frozen=True)
class Compared:
    """Scores of one user at one moment, both ways, ``[M, T]``."""

    arm: ArmUnderAudit
    user_id: int
    now_ms: int
    item_ids: NDArray[np.int64]
    tasks: tuple[str, ...]
    served: NDArray[np.float32]
    offline: NDArray[np.float32]

    @property
    def difference(self) -> float:
        """The worst difference."""
        return worst_difference(self.served, self.offline)

    def worst(self) -> dict[str, Any]:
        """The pair that differs most, as people need it to look into it."""
        scale = np.maximum(1.0, np.abs(self.offline))
        apart = np.nan_to_num(np.abs(self.served - self.offline) / scale, nan=np.inf)
        item, task = np.unravel_index(int(apart.argmax()), apart.shape)
        return {
            "user_id": self.user_id,
            "item_id": int(self.item_ids[item]),
            "now_ms": self.now_ms,
            "task": self.tasks[task],
            "served": float(self.served[item, task]),
            "offline": float(self.offline[item, task]),
        }


@dataclass(frozen=True)
class Skipped:
    """A user and moment that could not be compared, and why."""

    stage: StageName
    user_id: int
    now_ms: int
    reason: str


Outcome = Compared | Skipped


@dataclass(frozen=True)
class ArmReport:
    """All comparisons of one version of one arm."""

    arm: ArmUnderAudit
    users: int
    pairs: int
    worst_difference: float
    worst: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether served scores equal offline ones."""
        return self.pairs > 0 and self.worst_difference <= self.arm.tolerance


@dataclass(frozen=True)
class AuditReport:
    """An audit of all arms."""

    arms: tuple[ArmReport, ...]
    skipped: tuple[Skipped, ...]

    @staticmethod
    def of(outcomes: Iterable[Outcome]) -> AuditReport:
        """The report of what was compared and skipped."""
        by_arm: dict[ArmUnderAudit, list[Compared]] = {}
        skipped = []
        for outcome in outcomes:
            if isinstance(outcome, Skipped):
                skipped.append(outcome)
            elif outcome.served.size:
                by_arm.setdefault(outcome.arm, []).append(outcome)
        arms = [_arm_report(arm, compared) for arm, compared in by_arm.items()]
        return AuditReport(tuple(arms), tuple(skipped))

    @property
    def pairs(self) -> int:
        """(User, item, moment) triples compared."""
        return sum(arm.pairs for arm in self.arms)

    @property
    def passed(self) -> bool:
        """Whether something was compared, and everything that was is equal."""
        return bool(self.arms) and all(arm.passed for arm in self.arms)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        reasons: dict[str, int] = {}
        for skip in self.skipped:
            key = f"{skip.stage}: {skip.reason}"
            reasons[key] = reasons.get(key, 0) + 1
        return {
            "passed": self.passed,
            "pairs": self.pairs,
            "worst_difference": max((arm.worst_difference for arm in self.arms), default=None),
            "arms": [
                {
                    "stage": arm.arm.stage,
                    "arm": arm.arm.arm,
                    "version": arm.arm.version,
                    "tolerance": arm.arm.tolerance,
                    "users": arm.users,
                    "pairs": arm.pairs,
                    "worst_difference": arm.worst_difference,
                    "passed": arm.passed,
                    "worst": arm.worst,
                }
                for arm in self.arms
            ],
            "skipped": reasons,
        }


def _arm_report(arm: ArmUnderAudit, compared: list[Compared]) -> ArmReport:
    worst = max(compared, key=lambda one: one.difference)
    return ArmReport(
        arm,
        users=len({one.user_id for one in compared}),
        pairs=sum(len(one.item_ids) for one in compared),
        worst_difference=worst.difference,
        worst=worst.worst(),
    )
