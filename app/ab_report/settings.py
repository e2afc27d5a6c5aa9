"""How a report is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.ab_report.lift import DeltaMethod, LiftMethod

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


@dataclass(frozen=True)
class ReportSettings:
    """Everything but which part of the log."""

    method: LiftMethod = field(default_factory=DeltaMethod)
    window_ms: int = DAY_MS
    """How long after an exposure feedback still belongs to it."""
    history_ms: int = 28 * DAY_MS
    """How far before an experiment CUPED looks; 0: no CUPED."""
    metrics: tuple[str, ...] | None = None
    """Names of the metrics; None: all that the feedback reports."""
    controls: Mapping[str, str] = field(default_factory=dict)
    """The control arm by experiment; the key "" is for experiments that are not named."""
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Configured weights of the arms by experiment, for the sample ratio."""
    with_holdout: bool = False
    """Compare held-out users with the control as if they were an arm."""

    def __post_init__(self) -> None:
        if self.window_ms < 1 or self.history_ms < 0:
            raise ValueError(
                "the attribution window must be above 0 and the history not below, got "
                f"{self.window_ms} ms and {self.history_ms} ms"
            )

    def control_of(self, experiment: str, arms: list[str]) -> str:
        """The control among the ``arms`` that were seen; raises ValueError when unclear."""
        named = self.controls.get(experiment, self.controls.get(""))
        if named is None:
            # Of three arms or more nobody should guess which one is compared with.
            if "control" not in arms:
                raise ValueError(
                    f"say which of the arms {', '.join(arms)} of {experiment!r} is the control: "
                    f"--control {experiment}=ARM"
                )
            return "control"
        if named not in arms:
            raise ValueError(
                f"the control {named!r} of {experiment!r} was not seen in these exposures; the "
                f"arms seen are {', '.join(arms)}"
            )
        return named
