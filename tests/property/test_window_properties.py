"""The windows of queries equal a plain loop over what each query sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interest_histories import SITUATIONS, random_history, seen_rows

from marm.interest.interface import UNKNOWN_TAG, History
from marm.interest.window import gather_window


@settings(max_examples=60, deadline=None)
@given(
    situation=st.sampled_from(SITUATIONS),
    seed=st.integers(0, 10_000),
    num_queries=st.integers(0, 9),
    num_columns=st.integers(0, 9),
    n=st.integers(1, 20),
)
def test_a_window_holds_the_newest_rows_newest_first(
    situation: str, seed: int, num_queries: int, num_columns: int, n: int
) -> None:
    history = random_history(situation, seed, num_queries, num_columns)
    window = gather_window(history, n)
    assert window.tag is not None
    num_lines = 1 if situation == "request" else num_queries
    expected = [seen_rows(history, query, n) for query in range(num_lines)]
    width = max([1, *(len(rows) for rows in expected)])
    assert window.keys.shape == (num_lines, width, 6)
    assert window.visible.tolist() == [
        [column < len(rows) for column in range(width)] for rows in expected
    ]
    for query, rows in enumerate(expected):
        for column, row in enumerate(rows):
            assert torch.equal(window.keys[query, column], row.features)
            assert int(window.distance[query, column]) == row.distance
            assert int(window.gap[query, column]) == row.gap
            assert int(window.tag[query, column]) == row.tag
        assert not window.keys[query, len(rows) :].any()
        assert (window.tag[query, len(rows) :] == UNKNOWN_TAG).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 20))
def test_gradients_reach_each_row_as_often_as_it_is_seen(seed: int, n: int) -> None:
    history = random_history("training", seed)
    assert history.block is not None
    history.slab.features.requires_grad_()
    history.block.features.requires_grad_()
    gather_window(history, n).keys.sum().backward()
    slab, block = history.slab.features.grad, history.block.features.grad
    assert slab is not None
    assert block is not None
    seen = [row for query in range(7) for row in seen_rows(history, query, n)]
    for features, gradient in ((history.slab.features, slab), (history.block.features, block)):
        for row, of_row in zip(features.flatten(0, -2), gradient.flatten(0, -2), strict=True):
            times = sum(torch.equal(row, one.features) for one in seen)
            assert of_row.tolist() == [float(times)] * 6


@pytest.mark.parametrize("situation", SITUATIONS)
def test_rows_without_tags_and_with_a_norm(situation: str) -> None:
    history: History = replace(random_history(situation, 1), tags=None)
    plain = gather_window(history, 5)
    assert plain.tag is None
    norm = torch.nn.LayerNorm(6).double()
    torch.nn.init.ones_(norm.bias)
    normed = gather_window(history, 5, norm)
    visible = plain.visible
    torch.testing.assert_close(normed.keys[visible], norm(plain.keys[visible]))
    assert not normed.keys[~visible].any()  # a row that is not there is no row of zeros
    newest = plain.newest(2)
    assert torch.equal(newest.keys, plain.keys[:, :2])
    assert newest.visible.shape == newest.distance.shape == newest.gap.shape
