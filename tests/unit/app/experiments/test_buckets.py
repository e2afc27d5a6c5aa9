from __future__ import annotations

from collections import Counter

import numpy as np

from app.experiments.buckets import NUM_AB_BUCKETS, ab_bucket, nested_layout, unit_position


def owners(weights: dict[str, float], control: str) -> list[str]:
    names = sorted(weights)
    return [names[index] for index in nested_layout(weights, control)]


def test_buckets_are_stable_across_processes_and_releases():
    assert [ab_bucket("marm:ranking", user) for user in (0, 1, 2**63 - 1)] == [4837, 6116, 5443]
    assert unit_position("marm:ranking", 0) == 0.16364475358563402


def test_every_bucket_has_the_arm_that_the_weights_ask_for():
    counts = Counter(owners({"a": 0.2, "b": 0.5, "c": 0.3}, "a"))
    assert counts == {"a": 2000, "b": 5000, "c": 3000}
    thirds = Counter(owners(dict.fromkeys("abc", 1 / 3), "b"))
    assert sorted(thirds.values()) == [3333, 3333, 3334]


def test_a_treatment_may_have_more_than_its_region():
    assert Counter(owners({"a": 0.0, "b": 0.9, "c": 0.1}, "a")) == {"b": 9000, "c": 1000}
    assert Counter(owners({"a": 0.0, "b": 1.0}, "a")) == {"b": NUM_AB_BUCKETS}


def test_the_order_in_which_arms_are_written_does_not_matter():
    np.testing.assert_array_equal(
        nested_layout({"a": 0.5, "b": 0.2, "c": 0.3}, "a"),
        nested_layout({"c": 0.3, "a": 0.5, "b": 0.2}, "a"),
    )
