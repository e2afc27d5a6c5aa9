"""Exposures and shadow runs of an ingress replica, as metrics of Ray."""

from __future__ import annotations

from ray.serve.metrics import Counter

from app.experiments.shadows import ShadowOutcome
from app.exposures import ExposureSink
from cache_actors.exposure_log.schema import Exposure
from stages.request import StageName


class RoutingMetrics:
    """Counts what is recorded and what is lost; make one per ingress replica, inside of it."""

    def __init__(self) -> None:
        self._exposures = Counter(
            "marm_exposures_total", "Exposures by whether they are kept.", ("outcome",)
        )
        self._shadows = Counter(
            "marm_shadow_runs_total",
            "Runs of shadow arms by what became of them.",
            ("stage", "variant", "outcome"),
        )

    def exposure(self, kept: bool) -> None:
        """An exposure was buffered, or dropped."""
        self._exposures.inc(tags={"outcome": "kept" if kept else "dropped"})

    def shadow(self, stage: StageName, arm: str, outcome: ShadowOutcome) -> None:
        """A shadow run is over, or was dropped."""
        self._shadows.inc(tags={"stage": stage, "variant": arm, "outcome": outcome})


class CountedExposures:
    """A sink that counts what goes through it."""

    def __init__(self, sink: ExposureSink, metrics: RoutingMetrics) -> None:
        self._sink = sink
        self._metrics = metrics

    def record(self, exposure: Exposure) -> bool:
        """See `ExposureSink.record`."""
        kept = self._sink.record(exposure)
        self._metrics.exposure(kept)
        return kept
