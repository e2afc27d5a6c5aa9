"""The diversity rules against a plain reading of what they promise."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from marm.items import ItemFeatures
from stages.diversity import ByScore, MarginalRelevance, WindowCaps


@st.composite
def candidates(draw) -> tuple[ItemFeatures, np.ndarray]:
    num = draw(st.integers(0, 25))
    ids = st.lists(st.integers(0, 4), min_size=num, max_size=num)
    scores = draw(st.lists(st.integers(0, 9), min_size=num, max_size=num))
    item_ids = np.arange(1, num + 1)
    authors, tags = np.array(draw(ids), np.int64), np.array(draw(ids), np.int64)
    items = ItemFeatures(item_ids, authors, tags, item_ids * 0)
    return items, np.array(scores, np.float32) / 8


CAPS = st.one_of(st.none(), st.integers(1, 3))
LIMITS = st.integers(0, 30)
WINDOWS = st.integers(2, 8)


def within(chosen: list[int], window: int, ids: np.ndarray, candidate: int) -> int:
    """Items like ``candidate`` in the ``window`` - 1 places before the next one."""
    near = chosen[max(0, len(chosen) - window + 1) :]
    return 0 if ids[candidate] == 0 else sum(ids[other] == ids[candidate] for other in near)


def filled(num: int, limit: int, value) -> list[int]:
    """Places filled one by one with the candidate of the highest ``value``."""
    chosen: list[int] = []
    while len(chosen) < min(num, limit):
        left = [each for each in range(num) if each not in chosen]
        chosen.append(max(left, key=lambda each: (value(chosen, each), -each)))
    return chosen


@settings(max_examples=100, deadline=None)
@given(candidates(), WINDOWS, CAPS, CAPS, LIMITS)
def test_window_caps_equal_the_plain_reading(found, window, author_cap, tag_cap, limit):
    items, scores = found
    broken_places = 0

    def broken(chosen, each):
        caps = ((items.author_id, author_cap), (items.tag_id, tag_cap))
        return sum(
            cap is not None and within(chosen, window, ids, each) >= cap for ids, cap in caps
        )

    expected = filled(len(items), limit, lambda c, each: (-broken(c, each), scores[each]))
    for place, each in enumerate(expected):
        broken_places += broken(expected[:place], each) > 0
    picked = WindowCaps(window, author_cap, tag_cap).select(items, scores, limit)
    assert picked.positions.tolist() == expected
    assert (picked.note != "") == (broken_places > 0)
    assert f"in {broken_places} of {len(expected)} places" in picked.note or not broken_places


@settings(max_examples=100, deadline=None)
@given(candidates(), WINDOWS, st.sampled_from([0.0, 0.25, 1.0]), LIMITS)
def test_marginal_relevance_equals_the_plain_reading(found, window, tag_penalty, limit):
    items, scores = found
    spread = np.ptp(scores) if len(scores) else 0.0
    low = scores.min(initial=9.0)
    wide = scores.astype(np.float64)
    relevance = (wide - low) / spread if spread else np.ones(len(wide))

    def value(chosen, each):
        same_author = within(chosen, window, items.author_id, each) > 0
        same_tag = within(chosen, window, items.tag_id, each) > 0
        return relevance[each] - (0.5 * same_author + tag_penalty * same_tag), scores[each]

    picked = MarginalRelevance(window, 0.5, tag_penalty).select(items, scores, limit)
    assert picked.positions.tolist() == filled(len(items), limit, value)


@settings(max_examples=100, deadline=None)
@given(candidates(), WINDOWS, LIMITS)
def test_every_rule_fills_every_place_it_can_with_different_items(found, window, limit):
    items, scores = found
    rules = [ByScore(), WindowCaps(window, 1, 1), MarginalRelevance(window, 0.7, 0.2)]
    for rule in rules:
        positions = rule.select(items, scores, limit).positions
        assert len(positions) == min(limit, len(items))
        assert len(np.unique(positions)) == len(positions)
        if len(positions):
            assert scores[positions[0]] == scores.max()
        again = rule.select(items, scores, limit).positions
        np.testing.assert_array_equal(positions, again)
