from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from app.errors import RefusedError
from app.experiments.args import RoutingArgs
from app.experiments.overrides import ForbiddenError
from app.experiments.table import ExperimentTable, experiment_table

VARIANTS = {
    "retrieval": ("default", "wide"),
    "cascading": ("default", "deep"),
    "ranking": ("marm-l2", "marm-l4", "din"),
}
CONTROLS = {"retrieval": "default", "cascading": "default", "ranking": "marm-l2"}
HALVES = {"marm-l2": 0.5, "marm-l4": 0.5}
START_MS = int(datetime(2026, 3, 1, tzinfo=UTC).timestamp() * 1000)
HOUR_MS = 3_600_000


def ranking(**settings) -> dict:
    return {"experiments": {"depth": {"stage": "ranking", "arms": HALVES, **settings}}}


def table(routing: dict, time_ms: int = 0) -> ExperimentTable:
    return ExperimentTable(RoutingArgs.model_validate(routing), VARIANTS, lambda: time_ms)


def arms(found: ExperimentTable, users: int, stage="ranking") -> list[str]:
    return [found.assign(user, {}).arms[stage] for user in range(users)]


def test_without_experiments_everybody_has_the_first_arms():
    assignment = table({}).assign(7, {})
    assert assignment.arms == CONTROLS
    assert assignment.experiments == {}
    assert (assignment.holdout, assignment.overridden, assignment.shadows) == (False, (), {})


def test_shares_follow_the_weights():
    counts = Counter(arms(table(ranking(arms={"marm-l2": 0.75, "marm-l4": 0.25})), 20_000))
    assert counts["marm-l2"] / 20_000 == pytest.approx(0.75, abs=0.015)


def test_another_salt_or_key_shuffles_users():
    first = arms(table(ranking()), 2000)
    other_salt = arms(table({**ranking(), "salt": "two"}), 2000)
    other_key = arms(
        table({"experiments": {"depth-2": {"stage": "ranking", "arms": HALVES}}}), 2000
    )
    for second in (other_salt, other_key):
        moved = sum(a != b for a, b in zip(first, second, strict=True))
        assert 850 < moved < 1150


def test_users_outside_the_share_have_the_control_and_no_experiment():
    found = table(ranking(share=0.3, control="marm-l4"))
    assignments = [found.assign(user, {}) for user in range(10_000)]
    inside = [it for it in assignments if it.experiments]
    assert len(inside) / 10_000 == pytest.approx(0.3, abs=0.015)
    assert all(it.experiments == {"ranking": "depth"} for it in inside)
    assert {it.arms["ranking"] for it in assignments if not it.experiments} == {"marm-l4"}
    halves = Counter(it.arms["ranking"] for it in inside)
    assert halves["marm-l2"] / len(inside) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("time_ms", "share"),
    [
        (START_MS - 1, 0.0),
        (START_MS, 0.1),
        (START_MS + HOUR_MS, 0.3),
        (START_MS + 2 * HOUR_MS, 0.5),
        (START_MS + 99 * HOUR_MS, 0.5),
    ],
)
def test_a_ramp_grows_by_schedule(time_ms, share):
    ramp = {"start": "2026-03-01T00:00:00Z", "end": "2026-03-01T03:00:00+01:00", "from_share": 0.1}
    found = table(ranking(share=0.5, ramp=ramp), time_ms)
    taking_part = sum(bool(found.assign(user, {}).experiments) for user in range(5000))
    assert taking_part / 5000 == pytest.approx(share, abs=0.02)


def test_the_holdout_has_control_arms_everywhere():
    experiments = {
        "depth": {"stage": "ranking", "arms": {"din": 0.5, "marm-l4": 0.5}, "control": "din"},
        "width": {"stage": "retrieval", "arms": {"wide": 1.0, "default": 0.0}},
    }
    found = table({"experiments": experiments, "holdout": {"share": 0.2}})
    held = [it for it in (found.assign(user, {}) for user in range(5000)) if it.holdout]
    assert len(held) / 5000 == pytest.approx(0.2, abs=0.02)
    controls = {"retrieval": "wide", "cascading": "default", "ranking": "din"}
    assert all(it.arms == controls and not it.experiments for it in held)
    assert not any(it.popular for it in held)


def test_the_holdout_may_be_given_popular_items_and_then_has_no_shadows():
    shadows = {"ranking": {"arms": ["din"]}}
    found = table({"holdout": {"share": 1.0, "serves": "popular"}, "shadows": shadows})
    assignment = found.assign(1, {})
    assert (assignment.holdout, assignment.popular, assignment.shadows) == (True, True, {})


def test_overrides_are_for_those_who_are_listed():
    routing = {**ranking(), "overrides": {"user_ids": [1], "roles": ["test"]}}
    found = table(routing)
    assignment = found.assign(1, {"ranking": "din"})
    assert assignment.arms == {**CONTROLS, "ranking": "din"}
    assert assignment.overridden == ("ranking",)
    assert assignment.experiments == {}
    assert found.assign(2, {"ranking": "din"}, role="test").arms["ranking"] == "din"
    for role in (None, "feedback"):
        with pytest.raises(ForbiddenError, match=r"not allowed for user 2; list the user in"):
            found.assign(2, {"ranking": "din"}, role)
    with pytest.raises(RefusedError, match=r"asks for ranking=l9, but ranking has the arms"):
        found.assign(1, {"ranking": "l9"})
    assert found.assign(2, {}).overridden == ()


def test_nobody_may_override_by_default():
    with pytest.raises(ForbiddenError):
        table({}).assign(1, {"ranking": "din"})


def test_an_overridden_user_of_a_popular_holdout_is_served_by_the_arm():
    routing = {"holdout": {"share": 1, "serves": "popular"}, "overrides": {"user_ids": [1]}}
    assert not table(routing).assign(1, {"ranking": "din"}).popular


def test_shadows_are_the_arms_that_the_user_does_not_have():
    found = table({**ranking(), "shadows": {"ranking": {"arms": ["din", "marm-l4"], "share": 0.5}}})
    shadowed = [it for it in (found.assign(user, {}) for user in range(2000)) if it.shadows]
    assert len(shadowed) / 2000 == pytest.approx(0.5, abs=0.04)
    for assignment in shadowed:
        expected = {"marm-l2": ("din", "marm-l4"), "marm-l4": ("din",)}
        assert assignment.shadows["ranking"] == expected[assignment.arms["ranking"]]


def changed(user_config: dict, **settings) -> ExperimentTable:
    routing = RoutingArgs.model_validate(ranking(**settings))
    return experiment_table(routing, VARIANTS, user_config)


def test_weights_shares_ramps_and_shadows_change_live():
    def live(**knobs) -> ExperimentTable:
        ramp = {"start": "2100-01-01T00:00:00Z", "end": "2100-01-02T00:00:00Z"}
        return changed({"experiments": {"depth": knobs}}, share=0.5, ramp=ramp)

    def count(found: ExperimentTable) -> int:
        return sum(bool(found.assign(user, {}).experiments) for user in range(1000))

    assert count(live()) == 0  # the ramp has not begun
    assert 400 < count(live(ramp=None)) < 600
    assert count(live(ramp=None, share=1.0)) == 1000
    all_l4 = live(ramp=None, share=1.0, arms={"marm-l4": 1.0, "marm-l2": 0.0})
    assert set(arms(all_l4, 100)) == {"marm-l4"}
    shadowed = changed({"shadows": {"retrieval": {"arms": ["wide"]}}})
    assert shadowed.assign(1, {}).shadows == {"retrieval": ("wide",)}


def test_the_control_stays_whatever_the_order_of_live_weights():
    live = {"experiments": {"depth": {"share": 0.0, "arms": {"marm-l4": 0.5, "marm-l2": 0.5}}}}
    assert set(arms(changed(live), 20)) == {"marm-l2"}


@pytest.mark.parametrize(
    ("live", "message"),
    [
        ({"experiments": {"deep": {"share": 0.5}}}, r"names \['deep'\], but args.routing declares"),
        ({"experiments": {"depth": {"arms": {"marm-l2": 0.5, "magic": 0.5}}}}, "got .*magic"),
        ({"experiments": {"depth": {"arms": {"marm-l2": 1.0}}}}, "give 0 to an arm for nobody"),
        ({"experiments": {"depth": {"arms": {"marm-l2": 0.5, "marm-l4": 0.4}}}}, "sum to 0.9"),
        ({"experiments": {"depth": {"share": 1.5}}}, "less than or equal to 1"),
        ({"experiments": {"depth": {"share": None}}}, "given a value or left out"),
        ({"experiments": {"depth": {"stage": "ranking"}}}, "Extra inputs"),
        ({"shadows": {"ranking": {"arms": ["magic"]}}}, "but ranking has the variants"),
        ({"shadows": {"rank": {"arms": ["din"]}}}, "Input should be 'retrieval'"),
        ({"ab": {"ranking": {"default": 1.0}}}, "Extra inputs"),
    ],
)
def test_live_settings_that_make_no_sense_are_refused(live, message):
    with pytest.raises(ValueError, match=message):
        changed(live)


RAMP = {"start": "2026-03-01T00:00:00Z", "end": "2026-03-02T00:00:00Z"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": {"marm-l2": 0.5, "marm-l4": 0.6}}, "must sum to 1.*sum to 1.1"),
        ({"arms": {"marm-l2": 1.0}}, "at least two arms"),
        ({"arms": {"marm-l2": -0.5, "marm-l4": 1.5}}, "greater than or equal to 0"),
        ({"arms": {"marm-l2": float("nan"), "marm-l4": 1.0}}, "finite number"),
        ({"arms": {"marm-l2": 0.99999, "marm-l4": 0.00001}}, "at least 0.0001"),
        ({"control": "din"}, "control must be one of the arms"),
        ({"stage": "rank"}, "Input should be 'retrieval'"),
        ({"share": 0.1, "ramp": {**RAMP, "from_share": 0.2}}, "from_share must be at most"),
        ({"ramp": {"start": RAMP["end"], "end": RAMP["start"]}}, "must end after its start"),
        ({"ramp": {**RAMP, "end": "2026-03-02T00:00:00"}}, "timezone"),
        ({"weights": {}}, "Extra inputs"),
    ],
)
def test_experiments_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        RoutingArgs.model_validate(ranking(**settings))


def test_two_experiments_on_one_stage_are_refused():
    both = {key: {"stage": "ranking", "arms": HALVES} for key in ("depth", "width")}
    with pytest.raises(ValidationError, match=r"\['depth', 'width'\] are all on ranking"):
        RoutingArgs.model_validate({"experiments": both})


@pytest.mark.parametrize(
    "routing",
    [
        ranking(arms={"marm-l2": 0.5, "magic": 0.5}),
        {"shadows": {"ranking": {"arms": ["magic"]}}},
    ],
)
def test_arms_that_are_no_variants_are_refused(routing):
    with pytest.raises(ValueError, match=r"names \['magic'\], but ranking has the variants"):
        table(routing)
