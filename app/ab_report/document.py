"""A report as a JSON document."""

from __future__ import annotations

import math
from typing import Any

from app.ab_report.comparison import Comparison, ExperimentReport
from app.ab_report.lift import Estimate, Lift
from app.ab_report.report import AbReport

DOCUMENT_VERSION = 1


def to_document(report: AbReport) -> dict[str, Any]:
    """Plain values; what the data can't tell is null."""
    return {
        "version": DOCUMENT_VERSION,
        "first_ms": report.first_ms,
        "last_ms": report.last_ms,
        "confidence": report.confidence,
        "attribution_window_ms": report.window_ms,
        "answers": report.answers,
        "overridden_answers": report.overridden_answers,
        "holdout_answers": report.holdout_answers,
        "open_answers": report.open_answers,
        "attributed_events": report.attributed_events,
        "other_events": report.other_events,
        "experiments": {found.experiment: _experiment(found) for found in report.experiments},
    }


def _experiment(found: ExperimentReport) -> dict[str, Any]:
    ratio = found.sample_ratio
    return {
        "stage": found.stage,
        "control": found.control,
        "arms": {
            arm: {"users": size.users, "requests": size.requests, "items": size.items}
            for arm, size in found.arms.items()
        },
        "crossed_users": found.crossed_users,
        "crossed_requests": found.crossed_requests,
        "users_with_history": found.users_with_history,
        "sample_ratio": None
        if ratio is None
        else {
            "observed": ratio.observed,
            "expected": {arm: _number(users) for arm, users in ratio.expected.items()},
            "p_value": _number(ratio.p_value),
            "mismatch": ratio.mismatch,
        },
        "warnings": list(found.warnings),
        "comparisons": [_comparison(comparison) for comparison in found.comparisons],
    }


def _comparison(found: Comparison) -> dict[str, Any]:
    return {
        "metric": found.metric,
        "what": found.what,
        "guard": found.guard,
        "arm": found.arm,
        "verdict": found.verdict,
        "lift": _lift(found.lift),
        "uses_cuped": found.cuped is not None,
        "without_cuped": _lift(found.plain),
        "variance_reduction": _number(found.variance_reduction),
        "holm_p_value": _number(found.holm_p_value),
        "minimum_detectable": _number(found.minimum_detectable),
        "minimum_detectable_relative": _number(found.minimum_detectable_relative),
    }


def _lift(lift: Lift) -> dict[str, Any]:
    return {
        "control": _number(lift.control),
        "arm": _number(lift.arm),
        "absolute": _estimate(lift.absolute),
        "relative": _estimate(lift.relative),
        "standard_error": _number(lift.standard_error),
        "p_value": _number(lift.p_value),
    }


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {
        "value": _number(estimate.value),
        "low": _number(estimate.low),
        "high": _number(estimate.high),
    }


def _number(value: float | None) -> float | None:
    """Short enough to read, and null where it is not a number."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
