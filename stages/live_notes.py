"""What is told about live versions: notes in the home for rollbacks, and metrics for people."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from cache_actors.registry import ModelRegistry, PublishedModel
from stages.request import StageName

_LOAD_MS = [10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000]
_TAGS = ("stage", "variant")


class LiveNotes:
    """A `LiveObserver` of one arm.

    A version that ``user_config`` asked for is not noted for rollbacks: it serves one arm, and
    rolls back by taking the setting away.
    """

    def __init__(self, registry: ModelRegistry, stage: StageName, model: str, variant: str) -> None:
        self._registry = registry
        self._stage, self._model = stage, model
        self._tags = {"stage": stage, "variant": variant}
        self._version = Gauge(
            "marm_model_version", "Version that serves; absent before the first", _TAGS
        )
        self._newest_event_s = Gauge(
            "marm_model_newest_event_s",
            "Unix time of the newest event that the version that serves has learned",
            _TAGS,
        )
        self._refused = Counter(
            "marm_model_refused", "Attempts to load a version that ended in its refusal", _TAGS
        )
        self._load_ms = Histogram(
            "marm_model_load_ms", "From finding a version to its going live", _LOAD_MS, _TAGS
        )

    def swapped(self, published: PublishedModel, load_ms: float, by_hand: bool) -> None:
        """See `LiveObserver.swapped`."""
        self._version.set(published.version, self._tags)
        newest_ms = published.newest_event_ms
        # Not the last version's where this one does not say: an alert should see that it is gone.
        self._newest_event_s.set(0 if newest_ms is None else newest_ms / 1000, self._tags)
        self._load_ms.observe(load_ms, self._tags)
        if not by_hand:
            self._registry.note_served(self._stage, self._model, published.version)

    def refused(self, version: int) -> None:
        """See `LiveObserver.refused`."""
        self._refused.inc(1, self._tags)
