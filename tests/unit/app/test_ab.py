from __future__ import annotations

from collections import Counter

import pytest
from pydantic import ValidationError

from app.ab import NUM_AB_BUCKETS, AbConfig, ArmTable, ab_bucket

VARIANTS = {"retrieval": ("default",), "cascading": ("default",), "ranking": ("control", "l4")}


def table(**config) -> ArmTable:
    return ArmTable(AbConfig(**config), VARIANTS)


def test_buckets_are_stable_across_processes_and_releases():
    assert [ab_bucket("marm:ranking", user) for user in (0, 1, 2**63 - 1)] == [4837, 6116, 5443]


def test_shares_follow_the_weights():
    arms = table(ranking={"control": 3, "l4": 1})
    counts = Counter(arms.assign(user)["ranking"] for user in range(20_000))
    assert counts["control"] / 20_000 == pytest.approx(0.75, abs=0.015)


def test_a_user_stays_and_stages_are_independent():
    variants = dict.fromkeys(VARIANTS, ("a", "b"))
    weights = {"a": 1.0, "b": 1.0}
    arms = ArmTable(AbConfig(retrieval=weights, cascading=weights, ranking=weights), variants)
    users = range(4000)
    assert [arms.assign(user) for user in users] == [arms.assign(user) for user in users]
    pairs = Counter((arms.assign(u)["retrieval"], arms.assign(u)["ranking"]) for u in users)
    assert all(abs(count - 1000) < 150 for count in pairs.values())


def test_another_salt_shuffles_users():
    first = table(salt="one", ranking={"control": 1, "l4": 1})
    second = table(salt="two", ranking={"control": 1, "l4": 1})
    moved = sum(first.assign(user) != second.assign(user) for user in range(2000))
    assert 850 < moved < 1150


def test_raising_a_share_moves_users_one_way_only():
    before = table(ranking={"control": 0.9, "l4": 0.1})
    after = table(ranking={"control": 0.8, "l4": 0.2})
    for user in range(5000):
        if before.assign(user)["ranking"] == "l4":
            assert after.assign(user)["ranking"] == "l4"


def test_an_unnamed_stage_has_everybody_on_its_first_arm():
    assert table().assign(7) == {
        "retrieval": "default",
        "cascading": "default",
        "ranking": "control",
    }


def test_all_buckets_have_an_arm_whatever_the_rounding():
    arms = ArmTable(
        AbConfig(ranking={"a": 1 / 3, "b": 1 / 3, "c": 1e-9}),
        {**VARIANTS, "ranking": ("a", "b", "c")},
    )
    assert len({arms.assign(user)["ranking"] for user in range(NUM_AB_BUCKETS)}) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ranking": {"magic": 1}}, "names the arms"),
        ({"ranking": {"control": 0}}, "weight above 0"),
    ],
)
def test_tables_that_make_no_sense_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        table(**config)


@pytest.mark.parametrize(
    "config", [{"ranking": {"control": -1}}, {"rank": {}}, {"ranking": {"control": float("nan")}}]
)
def test_malformed_settings_are_refused(config):
    with pytest.raises(ValidationError):
        AbConfig(**config)
