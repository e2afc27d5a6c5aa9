"""From the logs of a home to a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.ab_report.answers import Answers, parse_answers
from app.ab_report.attribution import attribute
from app.ab_report.comparison import ExperimentReport, compare_arms
from app.ab_report.history import History
from app.ab_report.metrics import choose_metrics, request_sums
from app.ab_report.settings import ReportSettings
from app.ab_report.users import experiment_stages, participants
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.exposure_log.reader import read_exposures
from cache_actors.home import Home
from marm.events import EventBatch

_READ_EVENTS = 65_536
_END_OF_TIME_MS = np.iinfo(np.int64).max


@dataclass(frozen=True)
class AbReport:
    """Everything that a report says, before it becomes a table, JSON or a plot."""

    first_ms: int  # of the exposures that count
    last_ms: int
    confidence: float
    window_ms: int
    answers: int  # that count: answered requests without shadow runs
    overridden_answers: int  # left out
    holdout_answers: int
    attributed_events: int
    other_events: int
    open_answers: int  # whose attribution window reaches beyond the newest event
    experiments: tuple[ExperimentReport, ...]


def build_report(
    home: Home,
    settings: ReportSettings,
    *,
    since_ms: int | None = None,
    until_ms: int | None = None,
    experiments: Sequence[str] = (),
) -> AbReport:
    """Report on the exposures of ``since_ms <= time < until_ms`` in the logs of ``home``.

    ``experiments`` are keys; by default all that were seen. Raises ValueError, which says what to
    do, when there are no exposures, no experiment of that name, no feedback, or only one arm.
    """
    # Exposures a little later than the end still own the feedback that came to them.
    read_until = None if until_ms is None else until_ms + settings.window_ms
    answers = parse_answers(read_exposures(home.exposures, since_ms, read_until))
    counted = answers.time_ms < (_END_OF_TIME_MS if until_ms is None else until_ms)
    if not counted.any():
        raise ValueError(
            f"{home.exposures} has no exposures in that time; answers are logged while the service "
            "runs, so check --home, --since and --until"
        )
    stages = _chosen(answers, counted, experiments)
    starts = _starts(home, answers, stages, since_ms)
    events = _read_events(home, answers, min(starts.values()), settings)
    return report_on(answers, counted, events, stages, starts, settings)


def report_on(
    answers: Answers,
    counted: NDArray[np.bool_],
    events: EventBatch,
    stages: Mapping[str, str],
    starts: Mapping[str, int],
    settings: ReportSettings,
) -> AbReport:
    """`build_report` from columns: ``counted`` ([N]) answers, ``events`` of their users from the
    beginning of the history on, and the stage and the start (ms) of each experiment."""
    attributed = attribute(answers, _since(events, int(answers.time_ms[0])), settings.window_ms)
    if not attributed.attributed_events:
        raise ValueError(
            f"no feedback in the log within {settings.window_ms / 3_600_000:g} hours of these "
            f"{int(counted.sum())} answers; send it to /feedback with the user's and the item's "
            "id, or raise --window-hours"
        )
    requests = request_sums(answers, attributed)
    metrics = choose_metrics(settings.metrics, attributed.task_observed)
    found = []
    for experiment, stage in stages.items():
        who = participants(answers, stage, experiment, counted, with_holdout=settings.with_holdout)
        history = None
        if settings.history_ms:
            begin = starts[experiment] - settings.history_ms
            before = (events.timestamp_ms >= begin) & (events.timestamp_ms < starts[experiment])
            history = History(events.take(before), who.user_ids)
        found.append(compare_arms(experiment, stage, who, requests, metrics, history, settings))
    newest_ms = int(events.timestamp_ms.max(initial=0))
    return AbReport(
        first_ms=int(answers.time_ms[counted].min()),
        last_ms=int(answers.time_ms[counted].max()),
        confidence=settings.method.confidence,
        window_ms=settings.window_ms,
        answers=int(counted.sum()),
        overridden_answers=int((counted & answers.overridden).sum()),
        holdout_answers=int((counted & answers.holdout).sum()),
        attributed_events=attributed.attributed_events,
        other_events=attributed.other_events,
        open_answers=int((answers.time_ms[counted] > newest_ms - settings.window_ms).sum()),
        experiments=tuple(found),
    )


def _chosen(
    answers: Answers, counted: NDArray[np.bool_], experiments: Sequence[str]
) -> dict[str, str]:
    """The stage of each experiment to report on."""
    stages = experiment_stages(answers, counted)
    if not stages:
        raise ValueError(
            f"none of {int(counted.sum())} answers in that time took part in an experiment; "
            "configure one, or choose another --since or --until"
        )
    unknown = [name for name in experiments if name not in stages]
    if unknown:
        raise ValueError(
            f"no exposures of {', '.join(unknown)} in that time; the experiments seen are "
            f"{', '.join(stages)}"
        )
    return {name: stages[name] for name in experiments} if experiments else stages


def _starts(
    home: Home, answers: Answers, stages: Mapping[str, str], since_ms: int | None
) -> dict[str, int]:
    """When each experiment began, also when that was before ``since_ms``: from then on what users
    do may be its effect, and is no history."""
    starts = _first_times(answers, stages)
    if since_ms is not None:
        earlier = parse_answers(read_exposures(home.exposures, None, since_ms))
        starts |= _first_times(earlier, stages)
    return starts


def _first_times(answers: Answers, stages: Mapping[str, str]) -> dict[str, int]:
    found = {}
    for experiment, stage in stages.items():
        of_it = answers.stages[stage].experiment == experiment
        if of_it.any():
            found[experiment] = int(answers.time_ms[of_it].min())
    return found


def _read_events(
    home: Home, answers: Answers, start_ms: int, settings: ReportSettings
) -> EventBatch:
    """Events of the users of ``answers``, from the history on until the last window closes."""
    users = np.unique(answers.user_id)
    first_ms = start_ms - settings.history_ms
    last_ms = int(answers.time_ms.max()) + settings.window_ms
    kept = []
    log = EventLog(home.log)
    for batch in log.read(LogOffsets.start(), max_events=_READ_EVENTS):
        wanted = (batch.timestamp_ms >= first_ms) & (batch.timestamp_ms <= last_ms)
        wanted &= np.isin(batch.user_id, users)
        if wanted.any():
            kept.append(batch.take(wanted))
    return EventBatch.concat(kept)


def _since(events: EventBatch, first_ms: int) -> EventBatch:
    return events.take(events.timestamp_ms >= first_ms)
