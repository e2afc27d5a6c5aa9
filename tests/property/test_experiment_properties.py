"""What makes an experiment fair: balance, independence of layers, and users who stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.experiments.args import RoutingArgs
from app.experiments.buckets import NUM_AB_BUCKETS, nested_layout
from app.experiments.table import ExperimentTable

STAGES = ("retrieval", "cascading", "ranking")
VARIANTS = dict.fromkeys(STAGES, ("a", "b", "c"))
USERS = range(3000)
SALTS = ("marm", "exp7", "2026-03", "a", "0")  # fixed: a fair split is off by chance now and then

keys = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,10}", fullmatch=True)
names = st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=6, unique=True)


@st.composite
def weights(draw) -> dict[str, float]:
    """Arms with weights of whole thousandths."""
    arms = draw(names)
    cuts = sorted(draw(st.lists(st.integers(0, 1000), min_size=len(arms) - 1, max_size=5)))
    cuts = [0, *cuts[: len(arms) - 1], 1000]
    shares = np.diff(cuts) / 1000
    return dict(zip(arms, shares.tolist(), strict=True))


@st.composite
def small_treatments(draw) -> tuple[dict[str, float], dict[str, float]]:
    """Two sets of weights for the same arms, the control first, no treatment above its region."""
    arms = draw(names)
    most = 1000 // (len(arms) - 1)

    def one() -> dict[str, float]:
        given = [draw(st.integers(0, most)) / 1000 for _ in arms[1:]]
        return {arms[0]: 1 - sum(given), **dict(zip(arms[1:], given, strict=True))}

    return one(), one()


def routing(salt: str, **experiments) -> RoutingArgs:
    return RoutingArgs.model_validate({"salt": salt, "experiments": experiments})


def assigned(args: RoutingArgs, users=USERS) -> list:
    table = ExperimentTable(args, VARIANTS)
    return [table.assign(user, {}) for user in users]


@given(weights())
def test_buckets_are_dealt_out_exactly(arms):
    counts = np.bincount(nested_layout(arms, min(arms)), minlength=len(arms))
    expected = np.array([arms[name] for name in sorted(arms)]) * NUM_AB_BUCKETS
    np.testing.assert_allclose(counts, expected, atol=1)
    assert counts.sum() == NUM_AB_BUCKETS


@given(small_treatments())
def test_new_weights_move_nobody_from_treatment_to_treatment(pair):
    before, after = pair
    control = next(iter(before))
    old, new = (nested_layout(found, control) for found in (before, after))
    index = sorted(before).index(control)
    moved = old != new
    assert np.all((old[moved] == index) | (new[moved] == index))
    for name in before:  # and nobody leaves an arm that did not lose weight
        if name != control and after[name] >= before[name]:
            arm = sorted(before).index(name)
            assert np.all(new[old == arm] == arm)


@given(st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), keys)
@settings(max_examples=20, deadline=None)
def test_a_growing_share_takes_users_in_and_moves_none(shares, key):
    def at(share: float) -> list:
        arms = {"a": 0.5, "b": 0.3, "c": 0.2}
        return assigned(routing(key, depth={"stage": "ranking", "arms": arms, "share": share}))

    small, large = (at(share) for share in shares)
    for before, after in zip(small, large, strict=True):
        if before.experiments:
            assert after.experiments == before.experiments
            assert after.arms == before.arms


@given(st.lists(st.integers(0, 48), min_size=2, max_size=4).map(sorted), keys)
@settings(max_examples=20, deadline=None)
def test_users_stay_on_their_arm_while_a_ramp_runs(hours, key):
    ramp = {"start": "1970-01-01T06:00:00Z", "end": "1970-01-02T06:00:00Z", "from_share": 0.01}
    arms = {"a": 0.4, "b": 0.3, "c": 0.3}
    args = routing("salt", **{key: {"stage": "ranking", "arms": arms, "share": 0.7, "ramp": ramp}})
    tables = [ExperimentTable(args, VARIANTS, lambda h=hour: h * 3_600_000) for hour in hours]
    for user in range(500):
        seen = [table.assign(user, {}) for table in tables]
        inside = [bool(it.experiments) for it in seen]
        assert inside == sorted(inside)  # once in, always in
        assert len({it.arms["ranking"] for it in seen if it.experiments}) <= 1


@pytest.mark.parametrize("salt", SALTS)
def test_arms_are_balanced_and_layers_independent(salt):
    arms = {"a": 0.5, "b": 0.5}
    found = assigned(
        routing(salt, **{f"on-{stage}": {"stage": stage, "arms": arms} for stage in STAGES})
    )
    cells = Counter(tuple(it.arms[stage] for stage in STAGES) for it in found)
    assert len(cells) == 8
    # Chi-squared with 7 degrees of freedom: of a fair split, one in a million is above 40.
    expected = len(USERS) / 8
    assert sum((count - expected) ** 2 / expected for count in cells.values()) < 40


@pytest.mark.parametrize("salt", SALTS)
def test_share_arm_and_holdout_are_independent(salt):
    args = routing(salt, depth={"stage": "ranking", "arms": {"a": 0.5, "b": 0.5}, "share": 0.5})
    held = args.model_copy(
        update={"holdout": RoutingArgs.model_validate({"holdout": {"share": 0.5}}).holdout}
    )
    pairs = zip(assigned(args), assigned(held), strict=True)
    cells = Counter((bool(a.experiments), a.arms["ranking"], b.holdout) for a, b in pairs)
    inside = {cell: count for cell, count in cells.items() if cell[0]}
    expected = len(USERS) / 8
    assert len(inside) == 4
    assert all(abs(count - expected) < 6 * expected**0.5 for count in inside.values())
