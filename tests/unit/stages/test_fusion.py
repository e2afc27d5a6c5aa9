from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from stages.fusion import PowerProduct, RankFusion, WeightedSum, best_first
from stages.fusion_rules import LARGEST_PREDICTION
from stages.knobs import RankingKnobs

SCORES = np.array([[0.1, 0.9], [0.5, 0.2]], np.float32)


def fused(settings: dict, tasks: tuple[str, ...], scores=SCORES) -> list[float]:
    return RankingKnobs(fusion=settings).fusion.bind(tasks).fuse(scores).tolist()


def test_weights_alone_are_a_weighted_sum():
    short = RankingKnobs(fusion={"like": 2.0})
    assert (
        short.fusion
        == RankingKnobs(fusion={"kind": "weighted_sum", "weights": {"like": 2.0}}).fusion
    )
    assert isinstance(short.fusion.bind(("like",)), WeightedSum)
    assert RankingKnobs().fusion.named_tasks() == ("long_view", "like", "watch_time")


def test_tasks_that_were_not_learned_are_left_out():
    assert fused({"like": 2.0, "watch_time": 1.0}, ("click", "like")) == pytest.approx([1.8, 0.4])
    product = {"kind": "power_product", "powers": {"like": {"beta": 2}, "follow": {"beta": 5}}}
    assert fused(product, ("click", "like")) == pytest.approx([1.9**2, 1.2**2])
    ranks = {"kind": "rank", "weights": {"like": 1.0, "follow": 5.0}, "smoothing": 0}
    assert fused(ranks, ("click", "like")) == pytest.approx([1.0, 0.5])


def test_a_model_that_learned_none_of_the_tasks_is_fused_with_equal_weights_and_says_so():
    rule = RankingKnobs(fusion={"like": 2.0}).fusion
    assert rule.bind(("click", "follow")).fuse(SCORES).tolist() == pytest.approx([1.0, 0.7])
    assert "none of the model's tasks ['click', 'follow']" in rule.unlearned(("click", "follow"))
    assert rule.unlearned(("click", "like")) == ""
    zero = RankingKnobs(fusion={"like": 0.0, "click": 1.0}).fusion
    assert zero.unlearned(("like",)) != ""


def test_a_product_of_powers_is_what_its_formula_says():
    settings = {
        "kind": "power_product",
        "powers": {"click": {"beta": 2.0, "alpha": 0.5}, "watch_time": {"beta": -0.5}},
    }
    scores = np.array([[0.1, 30.0], [0.9, 0.0]], np.float32)
    expected = (0.5 + scores[:, 0]) ** 2 * (1 + scores[:, 1]) ** -0.5
    assert fused(settings, ("click", "watch_time"), scores) == pytest.approx(expected, rel=1e-6)


def test_a_product_prefers_the_item_that_is_good_at_everything():
    scores = np.array([[0.9, 0.02], [0.4, 0.4]], np.float32)
    tasks = ("click", "like")
    powers = {task: {"beta": 1.0, "alpha": 0.01} for task in tasks}
    assert np.argmax(fused({"click": 1.0, "like": 1.0}, tasks, scores)) == 0
    assert np.argmax(fused({"kind": "power_product", "powers": powers}, tasks, scores)) == 1


def test_rank_fusion_gives_equal_predictions_equal_ranks():
    fusion = RankFusion(np.array([1.0, 2.0]), smoothing=1.0)
    scores = np.array([[3.0, 0.2], [9.0, 0.2], [3.0, 0.7]], np.float32)
    expected = [1 / 3 + 2 / 3, 1 / 2 + 2 / 3, 1 / 3 + 2 / 2]
    assert fusion.fuse(scores).tolist() == pytest.approx(expected)
    assert len(fusion.fuse(scores[:0])) == 0


def test_the_widest_product_that_is_accepted_is_a_finite_score():
    largest = np.array([[LARGEST_PREDICTION["watch_time"]], [0.0]], np.float32)
    for beta in (7.0, -7.0):
        rule = RankingKnobs(
            fusion={"kind": "power_product", "powers": {"watch_time": {"beta": beta}}}
        ).fusion
        scores = rule.bind(("watch_time",)).fuse(largest)
        assert np.isfinite(scores).all()
        assert (scores > 0).all()
    assert PowerProduct(np.ones(1), np.ones(1)).fuse(np.array([[-1e-9]], np.float32)) == [1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"magic": 1.0}, "fusion must map tasks of"),
        ({"like": float("nan")}, "fusion must map tasks of"),
        ({"like": 1e30}, "weights of at most 1e\\+09"),
        ({}, "at least one task"),
        ({"like": 0.0}, "at least one task"),
        ({"kind": "magic", "weights": {"like": 1.0}}, "weighted_sum.*power_product.*rank"),
        ({"kind": "power_product", "weights": {"like": 1.0}}, "powers"),
        ({"kind": "power_product", "powers": {"magic": {"beta": 1}}}, "fusion must map tasks of"),
        ({"kind": "power_product", "powers": {"like": {"beta": 0}}}, "at least one task"),
        ({"kind": "power_product", "powers": {"like": {"beta": 1, "alpha": 0}}}, "greater than"),
        ({"kind": "power_product", "powers": {"watch_time": {"beta": 8}}}, "scale all betas down"),
        ({"kind": "rank", "weights": {"magic": 1.0}}, "fusion must map tasks of"),
        ({"kind": "rank", "weights": {"like": 1.0}, "smoothing": -1}, "greater than or equal"),
        ("like", "valid dictionary"),
    ],
)
def test_formulas_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        RankingKnobs(fusion=settings)


def test_best_first_keeps_the_order_of_ties():
    assert best_first(np.array([1.0, 3.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
    assert best_first(np.array([1.0]), -1).tolist() == []
