"""From logs to a report: who counts, what is warned of, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from ab_logs import EXPERIMENT, MINUTE_MS, START_MS, make_exposure, two_arms, write_logs
from rich.console import Console

from app.ab_report.bootstrap import UserBootstrap
from app.ab_report.comparison import Comparison
from app.ab_report.document import to_document
from app.ab_report.plot import plot_report
from app.ab_report.report import AbReport, build_report
from app.ab_report.settings import DAY_MS, ReportSettings
from app.ab_report.table import print_report
from app.ab_report.users import HOLDOUT
from cache_actors.home import Home

EVEN = {EXPERIMENT: {"control": 0.5, "deep": 0.5}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Two arms of 100 users each, with a lift of 30% in long views and of 20% in latency."""
    return write_logs(tmp_path_factory.mktemp("ab"), *two_arms())


@pytest.fixture(scope="module")
def report(home: Home) -> AbReport:
    return build_report(home, ReportSettings(weights=EVEN))


def row(report: AbReport, metric: str, arm: str = "deep") -> Comparison:
    (found,) = (
        part
        for part in report.experiments[0].comparisons
        if (part.metric, part.arm) == (metric, arm)
    )
    return found


def test_planted_lift_is_found(report: AbReport) -> None:
    found = row(report, "long_view_rate")
    assert found.verdict == "higher"
    assert found.lift.relative.low < 0.3 < found.lift.relative.high
    assert found.lift.control == pytest.approx(1 / 3, abs=0.05)
    assert row(report, "watch_time_per_item_s").verdict == "unclear"
    assert row(report, "requests_per_user").verdict == "unclear"


def test_guards_are_reported_unadjusted(report: AbReport) -> None:
    latency = row(report, "latency_mean_ms")
    assert latency.guard
    assert latency.verdict == "higher"
    assert latency.holm_p_value is None
    assert latency.cuped is None
    assert row(report, "latency_p99_ms").lift.control > 25
    assert row(report, "degraded_share").lift.absolute.value == 0


def test_history_narrows_the_intervals(home: Home, report: AbReport) -> None:
    found = row(report, "long_view_rate")
    assert found.cuped is not None
    assert found.variance_reduction > 0.1
    assert found.cuped.standard_error < found.plain.standard_error
    assert report.experiments[0].users_with_history == 200
    without = build_report(home, ReportSettings(weights=EVEN, history_ms=0))
    assert row(without, "long_view_rate").cuped is None
    assert row(without, "long_view_rate").plain == found.plain


def test_history_ends_where_the_experiment_began(home: Home, report: AbReport) -> None:
    """What users did in the experiment is no history, also where a report begins later."""
    since = START_MS + 45 * MINUTE_MS
    later = build_report(home, ReportSettings(weights=EVEN), since_ms=since)
    assert later.answers < report.answers
    assert later.first_ms >= since
    found = later.experiments[0]
    assert found.users_with_history == sum(size.users for size in found.arms.values())
    short = ReportSettings(weights=EVEN, history_ms=45 * MINUTE_MS)
    assert build_report(home, short, since_ms=since).experiments[0].users_with_history == 0


def test_sums_are_those_of_the_log(report: AbReport) -> None:
    exposures, feedback = two_arms()
    of_control = [exposure for exposure in exposures if exposure.user_id % 2 == 0]
    long_views = sum(
        labels["long_view"] for user, _, at, labels in feedback if user % 2 == 0 and at > START_MS
    )
    size = report.experiments[0].arms["control"]
    assert (size.users, size.requests, size.items) == (100, len(of_control), 5 * len(of_control))
    plain = row(report, "long_view_rate").plain
    assert plain.control == pytest.approx(long_views / (5 * len(of_control)))
    assert report.attributed_events == sum(at > START_MS for _, _, at, _ in feedback)


def test_holm_is_over_the_metrics(report: AbReport) -> None:
    family = [found for found in report.experiments[0].comparisons if not found.guard]
    smallest = min(family, key=lambda found: found.lift.p_value)
    assert smallest.holm_p_value == pytest.approx(smallest.lift.p_value * len(family))
    # Clicks and the like are in no feedback here, so they are no comparisons either.
    assert {found.metric for found in family} == {
        "long_view_rate",
        "watch_time_per_item_s",
        "watch_time_per_user_s",
        "feedback_rate",
        "requests_per_user",
    }


def test_who_does_not_count(tmp_path: Path) -> None:
    exposures, feedback = two_arms(users=40)
    extra = [
        make_exposure(100, START_MS + 5, [1], "control"),
        make_exposure(100, START_MS + 9, [1], "deep"),  # moved to the other arm
        make_exposure(2, START_MS + 7, [99], "deep", overridden=True, experiment=""),
        make_exposure(4, START_MS + 7, [1], "deep", shadow=True),
        make_exposure(101, START_MS + 7, [1], "control", holdout=True, experiment=""),
        make_exposure(102, START_MS + 7, [1], "control", experiment=""),  # outside of its share
    ]
    plain = build_report(write_logs(tmp_path / "a", exposures, feedback), ReportSettings())
    mixed = build_report(write_logs(tmp_path / "b", exposures + extra, feedback), ReportSettings())
    assert mixed.answers == plain.answers + 5
    assert (mixed.overridden_answers, mixed.holdout_answers) == (1, 1)
    found, expected = mixed.experiments[0], plain.experiments[0]
    assert found.arms == expected.arms
    assert (found.crossed_users, found.crossed_requests) == (1, 2)
    assert comparisons_of(mixed) == comparisons_of(plain)
    assert any("saw two arms" in warning for warning in found.warnings)


def comparisons_of(report: AbReport) -> list[dict]:
    """As in the document: NaN, which equals nothing, is None there."""
    found: list[dict] = to_document(report)["experiments"][EXPERIMENT]["comparisons"]
    return found


def test_holdout_can_be_an_arm(tmp_path: Path) -> None:
    exposures, feedback = two_arms(users=40)
    held = [
        make_exposure(user, START_MS + 7, [1], "control", holdout=True, experiment="")
        for user in range(100, 110)
    ]
    home = write_logs(tmp_path, exposures + held, feedback)
    report = build_report(home, ReportSettings(weights=EVEN, with_holdout=True))
    found = report.experiments[0]
    assert found.arms[HOLDOUT].users == 10
    assert row(report, "feedback_rate", HOLDOUT).lift.arm == pytest.approx(0, abs=0.3)
    assert found.sample_ratio is not None
    assert HOLDOUT not in found.sample_ratio.observed


def test_sample_ratio_mismatch_is_loud(home: Home, report: AbReport) -> None:
    assert report.experiments[0].warnings == ()
    uneven = ReportSettings(weights={EXPERIMENT: {"control": 0.7, "deep": 0.3}})
    found = build_report(home, uneven)
    assert found.experiments[0].sample_ratio is not None
    assert found.experiments[0].sample_ratio.mismatch
    assert "SAMPLE RATIO MISMATCH" in printed(found)
    unknown = build_report(home, ReportSettings())
    assert unknown.experiments[0].sample_ratio is None
    assert "not checked" in printed(unknown)


def test_bootstrap_agrees_with_the_delta_method(home: Home, report: AbReport) -> None:
    method = UserBootstrap(resamples=1_000)
    resampled = build_report(home, ReportSettings(weights=EVEN, method=method))
    for metric in ("long_view_rate", "watch_time_per_user_s"):
        ours, theirs = row(report, metric).lift, row(resampled, metric).lift
        assert theirs.standard_error == pytest.approx(ours.standard_error, rel=0.1)
        assert theirs.absolute.value == pytest.approx(ours.absolute.value)


def test_three_arms_share_one_control(tmp_path: Path) -> None:
    exposures, feedback = two_arms(users=60)
    moved = [
        make_exposure(
            exposure.user_id,
            exposure.time_ms,
            exposure.item_ids.tolist(),
            ("control", "deep", "wide")[exposure.user_id % 3],
        )
        for exposure in exposures
    ]
    report = build_report(write_logs(tmp_path, moved, feedback), ReportSettings())
    assert {found.arm for found in report.experiments[0].comparisons} == {"deep", "wide"}
    family = [found for found in report.experiments[0].comparisons if not found.guard]
    assert len(family) == 2 * 5
    assert "wide" in printed(report)


def printed(report: AbReport) -> str:
    console = Console(width=140, record=True, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        print_report(report, console)
    return capture.get()


def test_table_shows_every_comparison(report: AbReport) -> None:
    text = printed(report)
    for found in report.experiments[0].comparisons:
        assert found.metric in text
    assert "sample ratio: p =" in text


def test_document_is_json_without_nan(report: AbReport) -> None:
    document = json.loads(json.dumps(to_document(report), allow_nan=False))
    experiment = document["experiments"][EXPERIMENT]
    assert experiment["sample_ratio"]["mismatch"] is False
    first = experiment["comparisons"][0]
    assert first["metric"] == "long_view_rate"
    assert first["uses_cuped"] is True
    assert first["lift"]["relative"]["low"] > 0
    degraded = next(c for c in experiment["comparisons"] if c["metric"] == "degraded_share")
    assert degraded["lift"]["relative"]["value"] is None  # of a control without any


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_written(report: AbReport, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"lifts.{suffix}"
    plot_report(report, target)
    start = target.read_bytes()[:5]
    assert start == (b"\x89PNG\r" if suffix == "png" else b"<?xml")


def test_no_exposures(tmp_path: Path) -> None:
    home = write_logs(tmp_path, [], [(1, 1, START_MS, {"like": 1})])
    with pytest.raises(ValueError, match="has no exposures in that time"):
        build_report(home, ReportSettings())


def test_no_exposures_in_the_window(home: Home) -> None:
    with pytest.raises(ValueError, match="no exposures in that time"):
        build_report(home, ReportSettings(), since_ms=START_MS + 30 * DAY_MS)
    with pytest.raises(ValueError, match="no exposures in that time"):
        build_report(home, ReportSettings(), until_ms=START_MS)


def test_no_feedback(tmp_path: Path) -> None:
    exposures, _ = two_arms(users=10)
    home = write_logs(tmp_path, exposures, [(1, 999, START_MS, {"like": 1})])
    with pytest.raises(ValueError, match="no feedback in the log within 24 hours of these"):
        build_report(home, ReportSettings())


def test_one_arm_only(tmp_path: Path) -> None:
    exposures, feedback = two_arms(users=10)
    home = write_logs(tmp_path, [e for e in exposures if e.user_id % 2 == 0], feedback)
    with pytest.raises(ValueError, match=r"needs two arms with at least 2 users each, got control"):
        build_report(home, ReportSettings())


def test_unknown_names(home: Home) -> None:
    with pytest.raises(
        ValueError, match=r"the control 'wide' of 'depth' was not seen.*control, dee"
    ):
        build_report(home, ReportSettings(controls={EXPERIMENT: "wide"}))
    with pytest.raises(ValueError, match=r"no exposures of width.*experiments seen are depth"):
        build_report(home, ReportSettings(), experiments=["width"])
    with pytest.raises(ValueError, match="weights are missing for the arms deep"):
        build_report(home, ReportSettings(weights={EXPERIMENT: {"control": 1.0}}))
    with pytest.raises(ValueError, match="metrics must be some of long_view_rate"):
        build_report(home, ReportSettings(metrics=("ctr",)))
    with pytest.raises(ValueError, match="no feedback of these exposures reports what click_rate"):
        build_report(home, ReportSettings(metrics=("click_rate",)))


def test_control_is_never_guessed(tmp_path: Path) -> None:
    exposures = [
        make_exposure(user, START_MS, [1], "a" if user % 2 else "b") for user in range(1, 9)
    ]
    home = write_logs(tmp_path, exposures, [(1, 1, START_MS + 5, {"like": 1})])
    with pytest.raises(ValueError, match="say which of the arms a, b of 'depth' is the control"):
        build_report(home, ReportSettings())
    report = build_report(home, ReportSettings(controls={"": "b"}))
    assert report.experiments[0].control == "b"


def test_answers_outside_of_experiments(tmp_path: Path) -> None:
    exposures = [make_exposure(user, START_MS, [1], experiment="") for user in range(1, 9)]
    home = write_logs(tmp_path, exposures, [(1, 1, START_MS + 5, {"like": 1})])
    with pytest.raises(ValueError, match="none of 8 answers in that time took part"):
        build_report(home, ReportSettings())


def test_experiments_after_the_end_are_not_reported(tmp_path: Path) -> None:
    exposures, feedback = two_arms(users=20)
    later = [
        make_exposure(user, START_MS + DAY_MS, [1], experiment="later") for user in range(1, 9)
    ]
    home = write_logs(tmp_path, exposures + later, feedback)
    report = build_report(home, ReportSettings(), until_ms=START_MS + DAY_MS)
    assert [found.experiment for found in report.experiments] == [EXPERIMENT]


def test_late_exposures_keep_their_feedback(tmp_path: Path) -> None:
    """An event after a second showing, beyond --until, is not credited to the first."""
    exposures = [
        make_exposure(u, START_MS, [1], "deep" if u % 2 else "control") for u in (1, 2, 3, 4)
    ]
    exposures.append(make_exposure(1, START_MS + 100, [1], "deep"))
    feedback = [(1, 1, START_MS + 150, {"like": 1.0}), (3, 1, START_MS + 50, {"like": 1.0})]
    home = write_logs(tmp_path, exposures, feedback)
    report = build_report(home, ReportSettings(), until_ms=START_MS + 100)
    assert row(report, "like_rate").plain.arm == pytest.approx(0.5)


def test_unusable_settings() -> None:
    with pytest.raises(ValueError, match="attribution window"):
        ReportSettings(window_ms=0)
    assert math.isclose(ReportSettings().window_ms, DAY_MS)
    assert np.isclose(ReportSettings().method.confidence, 0.95)
