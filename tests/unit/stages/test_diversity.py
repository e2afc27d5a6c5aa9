from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from marm.items import ItemFeatures
from stages.diversity import ByScore, MarginalRelevance, WindowCaps
from stages.knobs import RankingKnobs


def items_of(authors: list[int], tags: list[int] | None = None) -> ItemFeatures:
    ids = np.arange(1, len(authors) + 1, dtype=np.int64)
    tags = [0] * len(authors) if tags is None else tags
    return ItemFeatures(ids, np.array(authors), np.array(tags), ids * 0)


def falling(num: int) -> np.ndarray:
    return np.linspace(1, 0, num).astype(np.float32)


def test_without_a_rule_the_order_is_that_of_the_scores():
    assert RankingKnobs().diversity.rule() == ByScore()
    picked = ByScore().select(items_of([1, 1, 1]), np.array([0.1, 0.9, 0.5], np.float32), 2)
    assert (picked.positions.tolist(), picked.note) == ([1, 2], "")


def test_an_author_comes_again_only_outside_the_window():
    items = items_of([1, 1, 1, 2, 3, 2])
    picked = WindowCaps(3, max_per_author=1, max_per_tag=None).select(items, falling(6), 6)
    assert picked.positions.tolist() == [0, 3, 4, 1, 5, 2]
    assert "caps were exceeded in 1 of 6 places" in picked.note


def test_caps_hold_for_tags_as_well():
    items = items_of([1, 2, 3, 4, 5], tags=[7, 7, 7, 8, 9])
    picked = WindowCaps(4, max_per_author=1, max_per_tag=2).select(items, falling(5), 4)
    assert (picked.positions.tolist(), picked.note) == ([0, 1, 3, 4], "")


def test_a_rule_that_cannot_be_kept_is_relaxed_as_little_as_possible():
    items = items_of([1, 1, 2], tags=[7, 7, 7])
    picked = WindowCaps(3, max_per_author=1, max_per_tag=1).select(items, falling(3), 3)
    # Both of what is left break the tag's cap; only one of them breaks the author's as well.
    assert picked.positions.tolist() == [0, 2, 1]
    assert "in 2 of 3 places" in picked.note


def test_unknown_authors_are_not_one_author():
    picked = WindowCaps(5, 1, 1).select(items_of([0, 0, 0]), falling(3), 3)
    assert (picked.positions.tolist(), picked.note) == ([0, 1, 2], "")


def test_marginal_relevance_weighs_likeness_against_the_score():
    items = items_of([1, 1, 2], tags=[5, 5, 5])
    scores = np.array([1.0, 0.9, 0.0], np.float32)
    mild = MarginalRelevance(3, author_penalty=0.5, tag_penalty=0.1)
    strict = MarginalRelevance(3, author_penalty=1.0, tag_penalty=0.1)
    assert mild.select(items, scores, 3).positions.tolist() == [0, 1, 2]
    assert strict.select(items, scores, 2).positions.tolist() == [0, 2]
    equal = strict.select(items, np.ones(3, np.float32), 3)
    assert (equal.positions.tolist(), equal.note) == ([0, 2, 1], "")


@pytest.mark.parametrize("rule", [ByScore(), WindowCaps(3, 1, 1), MarginalRelevance(3, 0.3, 0.1)])
def test_no_candidates_and_no_places(rule):
    assert len(rule.select(items_of([]), falling(0), 5).positions) == 0
    assert len(rule.select(items_of([1, 1]), falling(2), 0).positions) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "window_caps"}, "needs max_per_author or max_per_tag"),
        ({"kind": "window_caps", "window": 4, "max_per_tag": 4}, "each below its window"),
        ({"kind": "window_caps", "window": 1, "max_per_tag": 1}, "greater than or equal to 2"),
        ({"kind": "marginal_relevance", "author_penalty": 0, "tag_penalty": 0}, "above 0"),
        ({"kind": "marginal_relevance", "tag_penalty": float("inf")}, "finite"),
        ({"kind": "magic"}, "by_score.*window_caps.*marginal_relevance"),
        ({"window": 4}, "kind"),
    ],
)
def test_rules_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        RankingKnobs(diversity=settings)
