"""Figures of every day of the stream, in memory that does not grow with it.

Predictions of a day are kept while events of it come in. At checkpoints the days that were touched
longest ago are closed: the predictions of all workers are put together, only the figures remain.
Which days are closed depends on the order of the stream and not on a clock, so a few events from
the future close nothing. Of a day with very many events only a share of the users is kept, chosen
by hash: a sample of users, unlike one of events, leaves GAUC what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marm.addressing import mix64
from train.collective import Collective
from train.predictions import Figures, Predictions

OPEN_DAYS = 4
"""Days that stay open at a checkpoint; an event of a closed day is counted as late."""

MAX_DAY_EVENTS = 200_000
"""Predictions of one day and stage that a worker keeps; beyond it, half of the users are dropped,
again and again."""

MAX_DAYS = 4_000
"""Days whose figures are kept, the newest."""

_MAX_HALVINGS = 40

DayTable = dict[str, dict[str, Any]]
"""By day as ``2001-12-31``: ``user_share`` (of the users, whose events are counted) and
``stages``, the figures by stage and task."""


@dataclass
class OpenDay:
    """The predictions of one day, of all users or of a share of them."""

    predictions: Predictions
    halvings: int = 0  # the share of the users is 2 to the minus this
    touched_step: int = 0

    def add(self, other: Predictions, step: int) -> None:
        """Add predictions of the day."""
        self.predictions.extend(of_share(other, self.halvings))
        self.touched_step = max(self.touched_step, step)
        while len(self.predictions) > MAX_DAY_EVENTS and self.halvings < _MAX_HALVINGS:
            self.halvings += 1
            self.predictions = of_share(self.predictions, self.halvings)


def of_share(predictions: Predictions, halvings: int) -> Predictions:
    """The predictions of 2 to the minus ``halvings`` of the users, the same for everybody."""
    if halvings == 0:
        return predictions
    users = np.concatenate([np.empty(0, np.int64), *predictions.user_ids])
    return predictions.take(mix64(users) >> np.uint64(64 - halvings) == 0)


class DailyMetrics:
    """Figures of all stages by day."""

    def __init__(self, tasks_of_stage: dict[str, tuple[str, ...]]) -> None:
        self.rows: dict[int, dict[str, Any]] = {}  # of closed days; complete on worker 0
        self.late_events = 0
        self._tasks = tasks_of_stage
        self._open: dict[str, dict[int, OpenDay]] = {stage: {} for stage in tasks_of_stage}

    def add(self, stage: str, predictions: Predictions, step: int) -> None:
        """Add a batch of predictions, made in ``step``."""
        days = np.concatenate(predictions.days)
        for day in np.unique(days).tolist():
            mask = days == day
            if day in self.rows:
                # Every stage predicts the same events; they are counted once.
                self.late_events += int(mask.sum()) if stage == next(iter(self._tasks)) else 0
                continue
            of_day = predictions if mask.all() else predictions.take(mask)
            self._day(stage, day).add(of_day, step)

    def _day(self, stage: str, day: int) -> OpenDay:
        return self._open[stage].setdefault(day, OpenDay(Predictions(self._tasks[stage])))

    def num_open_events(self) -> int:
        """Predictions that are kept."""
        return sum(len(day.predictions) for days in self._open.values() for day in days.values())

    def close_idle(self, collective: Collective) -> None:
        """Close all but the `OPEN_DAYS` days that were touched last; all workers call it."""
        touched = [
            [day, kept.touched_step] for days in self._open.values() for day, kept in days.items()
        ]
        latest: dict[int, int] = {}
        for part in collective.gather(touched):
            for day, step in part:
                latest[day] = max(step, latest.get(day, step))
        newest = sorted(latest, key=lambda day: (latest[day], day))
        closing = set(newest[: max(0, len(newest) - OPEN_DAYS)])
        if not closing:
            return
        closed = self._merged(collective, closing)
        for days in self._open.values():
            for day in closing:
                days.pop(day, None)
        self.rows.update(closed)
        for day in sorted(self.rows)[: max(0, len(self.rows) - MAX_DAYS)]:
            del self.rows[day]

    def table(self, collective: Collective) -> DayTable:
        """Figures of all days so far, open ones too, on worker 0; all workers call it."""
        every = {day for days in self._open.values() for day in days}
        return _by_date({**self.rows, **self._merged(collective, every)})

    def closed(self) -> DayTable:
        """Figures of the days that are closed, on worker 0."""
        return _by_date(self.rows)

    def _merged(self, collective: Collective, days: set[int]) -> dict[int, dict[str, Any]]:
        """The rows of ``days`` over all workers; without figures on workers other than 0."""
        parts = collective.gather(self._state_of(days))
        if collective.rank != 0:
            return {day: {} for day in days}
        together = DailyMetrics(self._tasks)
        for part in parts:
            together.extend(part)
        return together.summaries()

    def summaries(self) -> dict[int, dict[str, Any]]:
        """The rows of the days that are open."""
        rows: dict[int, dict[str, Any]] = {}
        for stage, days in self._open.items():
            for day, kept in days.items():
                row = rows.setdefault(day, {"user_share": 0.5**kept.halvings, "stages": {}})
                figures: Figures = kept.predictions.summarize()
                if figures:
                    row["stages"][stage] = figures
        return rows

    def state(self) -> dict[str, dict[str, NDArray]]:
        """What is kept of open days, by stage; `extend` reads it back."""
        return self._state_of({day for days in self._open.values() for day in days})

    def _state_of(self, wanted: set[int]) -> dict[str, dict[str, NDArray]]:
        state = {}
        for stage, days in self._open.items():
            together = Predictions(self._tasks[stage])
            kept = {day: days[day] for day in sorted(wanted & days.keys())}
            for day in kept.values():
                together.extend(day.predictions)
            facts = [[day, of.halvings, of.touched_step] for day, of in kept.items()]
            state[stage] = {
                **together.arrays(),
                "open_days": np.array(facts, np.int64).reshape(-1, 3),
            }
        return state

    def extend(self, state: dict[str, dict[str, NDArray]]) -> None:
        """Add the open days of another worker, or of a checkpoint."""
        for stage, arrays in state.items():
            together = Predictions.from_arrays(self._tasks[stage], arrays)
            for day, halvings, touched_step in arrays["open_days"].tolist():
                kept = self._day(stage, day)
                if halvings > kept.halvings:
                    kept.halvings = halvings
                    kept.predictions = of_share(kept.predictions, halvings)
                kept.add(together.take(arrays["days"] == day), touched_step)


def _by_date(rows: dict[int, dict[str, Any]]) -> DayTable:
    return {str(np.datetime64(day, "D")): rows[day] for day in sorted(rows)}
