"""Laws of the fusion formulas, for any predictions."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from marm.events import TASKS
from stages.knobs import RankingKnobs

WEIGHTS = st.dictionaries(st.sampled_from(TASKS), st.floats(0.01, 5), min_size=1)
POWERS = WEIGHTS.map(
    lambda betas: {task: {"beta": beta / len(betas)} for task, beta in betas.items()}
)
SETTINGS = st.one_of(
    WEIGHTS,
    POWERS.map(lambda powers: {"kind": "power_product", "powers": powers}),
    WEIGHTS.map(lambda weights: {"kind": "rank", "weights": weights}),
)
PREDICTIONS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 12), st.just(len(TASKS))),
    elements=st.floats(0, 1, width=32),
)


@settings(max_examples=100, deadline=None)
@given(SETTINGS, PREDICTIONS)
def test_scores_are_finite_and_one_per_candidate(formula, scores_MT):
    fused_M = RankingKnobs(fusion=formula).fusion.bind(TASKS).fuse(scores_MT)
    assert fused_M.shape == (len(scores_MT),)
    assert fused_M.dtype == np.float32
    assert np.isfinite(fused_M).all()


@settings(max_examples=100, deadline=None)
@given(SETTINGS, PREDICTIONS, st.randoms(use_true_random=False))
def test_the_order_of_candidates_and_of_tasks_changes_no_score(formula, scores_MT, random):
    rule = RankingKnobs(fusion=formula).fusion
    rows = random.sample(range(len(scores_MT)), len(scores_MT))
    columns = random.sample(range(len(TASKS)), len(TASKS))
    plain_M = rule.bind(TASKS).fuse(scores_MT)
    tasks = tuple(TASKS[column] for column in columns)
    moved_M = rule.bind(tasks).fuse(np.ascontiguousarray(scores_MT[rows][:, columns]))
    np.testing.assert_allclose(moved_M, plain_M[rows], rtol=1e-5, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(SETTINGS, PREDICTIONS)
def test_a_candidate_that_is_at_least_as_good_at_everything_never_scores_less(formula, scores_MT):
    fused_M = RankingKnobs(fusion=formula).fusion.bind(TASKS).fuse(scores_MT)
    for better in range(len(scores_MT)):
        dominated = (scores_MT[better] >= scores_MT).all(axis=1)
        assert (fused_M[better] >= fused_M[dominated] * (1 - 1e-5) - 1e-6).all()


@settings(max_examples=100, deadline=None)
@given(PREDICTIONS, st.floats(0.1, 8))
def test_rank_fusion_looks_at_the_order_alone(scores_MT, power):
    coarse_MT = np.round(scores_MT, 2)
    rule = RankingKnobs(fusion={"kind": "rank", "weights": {"like": 1.0, "click": 0.5}}).fusion
    stretched_MT = (coarse_MT.astype(np.float64) * power).astype(np.float32)
    fusion = rule.bind(TASKS)
    np.testing.assert_array_equal(fusion.fuse(coarse_MT), fusion.fuse(stretched_MT))
