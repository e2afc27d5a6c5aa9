"""The model at less than its full depth, and how the depth is chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from serving_models import make_rows, small_config, some_items

from marm.memory import RAW_STEP, Namespace, UserRows
from marm.model_factory import build_model
from marm.ranker import Ranker
from marm.scoring_plan import ScoringPlan
from stages.depth import MIN_OBSERVED, CostMeter, DepthPlan, DepthPlanner, ScoringWork, first_layers

DEEP = Namespace(depth=3, dim=8)
NOW_MS = 1_000_000


@pytest.fixture(params=["plain", "frozen"])
def ranker(request) -> Ranker:
    torch.manual_seed(0)
    model = build_model(small_config("ranking", DEEP)).eval()
    assert isinstance(model, Ranker)
    with torch.no_grad():  # heads and attention far from what an untrained model ignores
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if request.param == "frozen":
        model.freeze(ScoringPlan())
    return model


@pytest.fixture
def rows() -> UserRows:
    found = make_rows([3, 1, 4, 1, 5], memorised=4, namespace=DEEP)
    found["memory"][:4] = np.random.default_rng(0).normal(size=(4, 3, 8))
    return UserRows(np.array([5]), np.array([0, 5]), found)


def scores(model: Ranker, rows: UserRows) -> np.ndarray:
    return model.score(rows, 5, some_items(20), NOW_MS, 0)


def test_depth_0_equals_the_model_with_all_rows_raw(ranker, rows):
    raw = rows.rows.copy()
    raw["written_step"] = RAW_STEP
    expected = scores(ranker, UserRows(rows.user_ids, rows.offsets, raw))
    np.testing.assert_allclose(scores(ranker, first_layers(rows, 0)), expected, atol=1e-6)
    assert not np.allclose(scores(ranker, rows), expected)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_lower_depth_equals_the_model_whose_upper_layers_find_nothing(ranker, rows, depth):
    blind = build_model(ranker.config).eval()
    blind.load_state_dict(ranker.state_dict())
    with torch.no_grad():
        for layer in blind.net.sequence.memory_augmented.attention.layers[depth:]:
            layer.null_logit.fill_(1e6)  # all weight goes to the null key
    expected = scores(blind, rows)
    np.testing.assert_allclose(scores(ranker, first_layers(rows, depth)), expected, atol=1e-5)
    upper = rows.rows.copy()
    upper["memory"][:, depth:] = 9.0  # not looked at
    changed = first_layers(UserRows(rows.user_ids, rows.offsets, upper), depth)
    np.testing.assert_array_equal(
        scores(ranker, changed), scores(ranker, first_layers(rows, depth))
    )


def test_first_layers_copies_nothing_and_changes_nothing_else(rows):
    narrow = first_layers(rows, 1)
    assert np.shares_memory(narrow.rows, rows.rows)
    np.testing.assert_array_equal(narrow.rows["memory"], rows.rows["memory"][:, :1])
    for name in ("event_key", "item_id", "timestamp_ms", "feedback", "written_step", "written_s"):
        np.testing.assert_array_equal(narrow.rows[name], rows.rows[name])
    assert first_layers(rows, 3) is rows
    assert first_layers(narrow, 0).rows["memory"].shape == (5, 0, 8)
    for wrong in (2, -1):
        with pytest.raises(ValueError, match="rows have 1 layers"):
            first_layers(narrow, wrong)


def test_the_meter_finds_the_fixed_and_the_variable_cost():
    meter = CostMeter()
    for index in range(MIN_OBSERVED):
        assert meter.expected_ms(1.0) is None
        meter.observe(float(index % 4), 5.0 + 2.0 * (index % 4))
    assert meter.expected_ms(10.0) == pytest.approx(25.0)
    assert meter.expected_ms(0.0) == pytest.approx(5.0)


def test_the_meter_follows_recent_cost():
    meter = CostMeter()
    for slow in (1.0, 3.0):
        for index in range(200):
            gflop = 1.0 + index % 5
            meter.observe(gflop, slow * gflop)
    assert meter.expected_ms(2.0) == pytest.approx(6.0, rel=0.01)


def test_the_meter_takes_equal_requests_for_proportional_cost():
    meter = CostMeter()
    for _ in range(20):
        meter.observe(2.0, 10.0)
    assert meter.expected_ms(4.0) == pytest.approx(20.0)
    for _ in range(20):
        meter.observe(0.0, 1.0)
    assert meter.expected_ms(0.0) >= 0.0
    nothing = CostMeter()
    for _ in range(20):
        nothing.observe(0.0, 3.0)
    assert nothing.expected_ms(1.0) == pytest.approx(3.0)


def test_less_time_means_fewer_layers_then_raw_rows_then_none():
    planner = DepthPlanner(ScoringWork(dim=128, depth=4))
    assert planner.plan(4, 1000, 200, left_ms=0.0) == DepthPlan(4, True)  # nothing known yet
    for rows in (200, 600, 1000) * 5:
        planner.meter.observe(planner.work.gflop(rows, 200, 4), rows / 10)
    chosen = [planner.plan(4, 1000, 200, left_ms) for left_ms in np.linspace(200, 0, 101)]
    depths = [plan.depth for plan in chosen if plan.with_rows]
    assert depths == sorted(depths, reverse=True)
    assert set(depths) == {4, 3, 2, 1, 0}
    assert chosen[-1] == DepthPlan(0, False)
    assert planner.plan(2, 1000, 200, left_ms=1e6) == DepthPlan(2, True)
    assert planner.plan(4, 0, 200, left_ms=0.0) == DepthPlan(0, True)  # there are none anyway


def test_layers_of_errors_are_no_work_and_go_last():
    plain, errors = ScoringWork(dim=64, depth=1), ScoringWork(dim=64, depth=3, error_layers=2)
    for depth, attention in [(0, 0), (1, 0), (2, 0), (3, 1)]:
        assert errors.gflop(100, 50, depth) == plain.gflop(100, 50, attention)
    planner = DepthPlanner(errors)
    for rows in (200, 600, 1000) * 5:
        planner.meter.observe(errors.gflop(rows, 200, 3), rows / 10)
    chosen = [planner.plan(3, 1000, 200, left_ms) for left_ms in np.linspace(200, 0, 101)]
    assert {plan.depth for plan in chosen if plan.with_rows} == {3, 2}
    assert chosen[-1] == DepthPlan(0, False)


def test_work_grows_with_everything_and_masked_layers_cost_no_rows():
    work = ScoringWork(dim=64, depth=2)
    full = work.gflop(100, 50, 2)
    assert work.gflop(200, 50, 2) > full > work.gflop(100, 50, 1) > work.gflop(100, 50, 0)
    assert work.gflop(100, 60, 2) > full
    assert work.gflop(0, 50, 2) == pytest.approx(work.gflop(0, 50, 0)) == 3 * 12 * 64**2 * 50e-9
