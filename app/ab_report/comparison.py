"""All arms of one experiment against its control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from app.ab_report.checks import SampleRatio, holm, minimum_detectable, sample_ratio
from app.ab_report.cuped import cuped_sums, variance_reduction
from app.ab_report.history import History
from app.ab_report.lift import Lift, UserSums
from app.ab_report.metrics import GUARDS, LATENCY_P99, Metric, RequestSums
from app.ab_report.quantile import quantile_lift
from app.ab_report.settings import ReportSettings
from app.ab_report.users import HOLDOUT, ArmSize, Participants

MIN_CROSSED_SHARE = 0.01
"""Share of users in two arms that deserves a warning."""

Verdict = Literal["higher", "lower", "unclear"]


@dataclass(frozen=True)
class Comparison:
    """One arm against the control in one metric."""

    metric: str
    what: str
    guard: bool
    arm: str
    plain: Lift
    cuped: Lift | None  # None: no history, or a guard
    variance_reduction: float  # by CUPED; 0 without it
    minimum_detectable: float  # absolute, of `lift`
    confidence: float
    holm_p_value: float | None = None  # None for guards, which are not adjusted

    @property
    def lift(self) -> Lift:
        """The lift to go by: CUPED's where there is history. Which one was decided beforehand, so
        nobody picks the nicer."""
        return self.plain if self.cuped is None else self.cuped

    @property
    def minimum_detectable_relative(self) -> float:
        """The same as a share of the control's mean; NaN where there is no relative lift."""
        lift = self.lift
        usable = math.isfinite(lift.relative.value)
        return self.minimum_detectable / abs(lift.control) if usable else math.nan

    @property
    def verdict(self) -> Verdict:
        """Higher or lower than the control, at the report's confidence. Metrics go by Holm's p
        value; guards by their own, as there a false alarm costs less than a missed one."""
        p_value = self.lift.p_value if self.holm_p_value is None else self.holm_p_value
        if not p_value < 1 - self.confidence:
            return "unclear"
        return "higher" if self.lift.absolute.value > 0 else "lower"


@dataclass(frozen=True)
class ExperimentReport:
    """What an experiment showed."""

    experiment: str
    stage: str
    control: str
    arms: dict[str, ArmSize]
    crossed_users: int
    crossed_requests: int
    users_with_history: int
    sample_ratio: SampleRatio | None  # None: the weights are not known
    comparisons: tuple[Comparison, ...]
    warnings: tuple[str, ...]


def compare_arms(
    experiment: str,
    stage: str,
    who: Participants,
    requests: RequestSums,
    metrics: Sequence[Metric],
    history: History | None,
    settings: ReportSettings,
) -> ExperimentReport:
    """Compare; ``history`` is of ``who.user_ids``. Raises ValueError when there is no control or
    nothing to compare it with."""
    items_shown = requests.items.astype(np.int64)
    sizes = {arm: who.size(arm, items_shown) for arm in who.arms}
    tiny = [arm for arm, size in sizes.items() if size.users < 2]
    control = settings.control_of(experiment, who.arms)
    others = [arm for arm in who.arms if arm not in (control, *tiny)]
    if control in tiny or not others:
        raise ValueError(
            f"{experiment!r} needs two arms with at least 2 users each, got "
            f"{', '.join(f'{arm} with {size.users}' for arm, size in sizes.items())}; choose "
            "another --since or --until, look at the weights, or name other experiments with "
            "--experiment"
        )
    ratio = _sample_ratio(experiment, sizes, settings)
    usable = history if history is not None and history.users_with_history else None
    comparisons, skipped = [], []
    for metric in (*metrics, *GUARDS):
        arms = _sums_by_arm(who, metric, requests, (control, *others))
        if arms is None:
            skipped.append(metric.name)
            continue
        comparisons += _compare_metric(metric, arms, control, who, usable, settings)
    comparisons += _compare_p99(who, control, others, requests, settings)
    return ExperimentReport(
        experiment=experiment,
        stage=stage,
        control=control,
        arms=sizes,
        crossed_users=who.crossed_users,
        crossed_requests=who.crossed_requests,
        users_with_history=0 if history is None else history.users_with_history,
        sample_ratio=ratio,
        comparisons=_adjusted(comparisons),
        warnings=_warnings(who, ratio, tiny, skipped, experiment),
    )


def _sums_by_arm(
    who: Participants, metric: Metric, requests: RequestSums, arms: Sequence[str]
) -> dict[str, UserSums] | None:
    """The metric's sums by arm; None when an arm has nothing to divide by."""
    everyone = who.sums(metric, requests)
    parts = {arm: who.arm_of_user == arm for arm in arms}
    if not all(everyone.denominator[part].sum() > 0 for part in parts.values()):
        return None
    return {
        arm: UserSums(everyone.numerator[part], everyone.denominator[part])
        for arm, part in parts.items()
    }


def _compare_metric(
    metric: Metric,
    arms: dict[str, UserSums],
    control: str,
    who: Participants,
    history: History | None,
    settings: ReportSettings,
) -> list[Comparison]:
    adjusted: dict[str, UserSums] = {}
    if history is not None and not metric.guard:
        covariates = history.covariates(metric)
        adjusted = cuped_sums(arms, {arm: covariates[who.arm_of_user == arm] for arm in arms})
    found = []
    for arm in (name for name in arms if name != control):
        plain = settings.method.compare(arms[control], arms[arm])
        cuped, reduction = None, 0.0
        if adjusted:
            pair = adjusted[control], adjusted[arm]
            cuped = settings.method.compare(*pair)
            reduction = variance_reduction((arms[control], arms[arm]), pair)
        found.append(_comparison(metric, arm, plain, cuped, reduction, settings))
    return found


def _compare_p99(
    who: Participants,
    control: str,
    others: Sequence[str],
    requests: RequestSums,
    settings: ReportSettings,
) -> list[Comparison]:
    metric, confidence = LATENCY_P99, settings.method.confidence
    base = who.values(control, metric, requests)
    guard = Metric(metric.name, metric.what, metric.signal, "request", guard=True)
    found = []
    for arm in others:
        lift = quantile_lift(base, who.values(arm, metric, requests), metric.share, confidence)
        found.append(_comparison(guard, arm, lift, None, 0.0, settings))
    return found


def _comparison(
    metric: Metric,
    arm: str,
    plain: Lift,
    cuped: Lift | None,
    reduction: float,
    settings: ReportSettings,
) -> Comparison:
    confidence = settings.method.confidence
    error = (plain if cuped is None else cuped).standard_error
    return Comparison(
        metric=metric.name,
        what=metric.what,
        guard=metric.guard,
        arm=arm,
        plain=plain,
        cuped=cuped,
        variance_reduction=reduction,
        minimum_detectable=minimum_detectable(error, confidence),
        confidence=confidence,
    )


def _adjusted(comparisons: list[Comparison]) -> tuple[Comparison, ...]:
    """With Holm's p values: all metrics and arms of the experiment are one family, without the
    guards."""
    family = [index for index, found in enumerate(comparisons) if not found.guard]
    adjusted = holm([comparisons[index].lift.p_value for index in family])
    result = list(comparisons)
    for index, p_value in zip(family, adjusted.tolist(), strict=True):
        result[index] = replace(comparisons[index], holm_p_value=p_value)
    return tuple(result)


def _sample_ratio(
    experiment: str, sizes: dict[str, ArmSize], settings: ReportSettings
) -> SampleRatio | None:
    weights = settings.weights.get(experiment)
    if weights is None:
        return None
    return sample_ratio({arm: s.users for arm, s in sizes.items() if arm != HOLDOUT}, weights)


def _warnings(
    who: Participants,
    ratio: SampleRatio | None,
    tiny: Sequence[str],
    skipped: Sequence[str],
    experiment: str,
) -> tuple[str, ...]:
    found = []
    if ratio is None:
        found.append(
            "the sample ratio was not checked, as the weights are not known: give --config or "
            f"--weights {experiment}:ARM=WEIGHT,..."
        )
    elif ratio.mismatch:
        expected = {arm: round(users) for arm, users in ratio.expected.items()}
        found.append(
            f"SAMPLE RATIO MISMATCH (p = {ratio.p_value:.2g}): users per arm are {ratio.observed}, "
            f"the weights promise {expected}. Don't trust any lift below until the reason is "
            "known: lost exposures, weights that changed, an arm that fails for some users"
        )
    if who.crossed_users > MIN_CROSSED_SHARE * (len(who.user_ids) + who.crossed_users):
        found.append(
            f"{who.crossed_users} users saw two arms and are left out, as after a change of "
            "weights or salt; if the change favoured one kind of user, the rest is not a fair "
            "sample: begin --since after the change"
        )
    found += [f"arm {arm} has fewer than 2 users and is left out" for arm in tiny]
    found += [f"{name} is left out: an arm showed no items" for name in skipped]
    return tuple(found)
