"""What users did before an experiment: the covariates of CUPED."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from app.ab_report.metrics import Metric
from marm.events import TASKS, EventBatch


class History:
    """Sums of events per user in the time before an experiment."""

    def __init__(self, events: EventBatch, user_ids: NDArray[np.int64]) -> None:
        """``events`` are of that time; ``user_ids`` (ascending, distinct) are whom to sum for."""
        place = np.searchsorted(user_ids, events.user_id)
        place = np.minimum(place, max(len(user_ids) - 1, 0))
        mine = user_ids[place] == events.user_id if len(user_ids) else np.zeros(0, np.bool_)
        place = place[mine]
        self._labels = np.zeros((len(user_ids), len(TASKS)))
        np.add.at(self._labels, place, np.nan_to_num(events.labels[mine].astype(np.float64)))
        self._events = np.bincount(place, minlength=len(user_ids)).astype(np.float64)

    @property
    def users_with_history(self) -> int:
        """How many of the users did anything."""
        return int((self._events > 0).sum())

    def covariates(self, metric: Metric) -> NDArray[np.float64]:
        """``[U, P]``: what the metric counts, its rate, activity, and whether there was any."""
        any_events = self._events > 0
        activity = np.log1p(self._events)
        if metric.task is None:
            return np.stack([self._events, activity, any_events], axis=1)
        counted = self._labels[:, TASKS.index(metric.task)]
        total = max(self._events.sum(), 1.0)
        # The rate of a user with few events is drawn towards everybody's.
        rate = (counted + _PRIOR_EVENTS * counted.sum() / total) / (self._events + _PRIOR_EVENTS)
        return np.stack([counted, rate, self._events, activity, any_events], axis=1)


_PRIOR_EVENTS = 10.0
