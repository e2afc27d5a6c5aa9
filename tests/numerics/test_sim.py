"""SIM, soft and hard, against a search and two attentions computed row by row."""

from __future__ import annotations

import pytest
import torch
from interest_histories import (
    SITUATIONS,
    SeenRow,
    assert_equals_reference,
    bias_of,
    head_logits,
    random_history,
    random_method,
    random_queries,
    read_out,
    seen_rows,
    softmax_mix,
)
from torch import Tensor

from marm.config import STAGES, InterestConfig, ModelConfig
from marm.interest.interface import UNKNOWN_TAG
from marm.interest.methods import build_interest
from marm.interest.sim import SimHard, SimSoft


def relevance(method: SimSoft, q_F: Tensor, row: SeenRow) -> Tensor:
    """r = (W_q q) . (W_k k) / sqrt(D)."""
    query = method.search_query(q_F)
    return (query * method.search_row(method.row_norm(row.features))).sum() / len(query) ** 0.5


def found_and_newest(
    method: SimSoft | SimHard, query_F: Tensor, found: list[SeenRow], newest: list[SeenRow]
) -> Tensor:
    """The ESU on what was found, attention to the newest rows, and both read out."""
    q, reader, pooled = method.query_norm(query_F), method.reader, []
    for number, (attention, rows) in enumerate(((reader.exact, found), (reader.newest, newest))):
        keys = [method.row_norm(row.features) for row in rows]
        biases = [bias_of(reader.recency, row, number) for row in rows]
        logits = [head_logits(attention, q, k, b) for k, b in zip(keys, biases, strict=True)]
        pooled.append(softmax_mix(attention, logits, keys))
    return read_out(reader.readout, query_F, torch.cat(pooled))


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("top_k", [2, 30])
def test_soft_search_finds_the_highest_inner_products(situation: str, n: int, top_k: int) -> None:
    method = random_method(n, n, method="sim_soft", top_k=top_k)
    assert isinstance(method, SimSoft)
    history = random_history(situation, seed=6)

    def reference(number: int, query_F: Tensor) -> Tensor:
        q, rows = method.query_norm(query_F), seen_rows(history, number, n)
        found = sorted(rows, key=lambda row: float(relevance(method, q, row)), reverse=True)
        return found_and_newest(method, query_F, found[:top_k], rows[:top_k])

    assert_equals_reference(method, situation, 6, reference)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_auxiliary_prediction_reads_all_rows_by_their_relevance(situation: str) -> None:
    n, method = 20, random_method(1, 20, method="sim_soft", top_k=2)
    assert isinstance(method, SimSoft)
    history, queries = random_history(situation, seed=7), random_queries(7)
    with torch.no_grad():
        known = method(queries, history).auxiliary_BA
        for number, query_F in enumerate(queries):
            q, summed = method.query_norm(query_F), torch.zeros(6, dtype=torch.float64)
            for row in seen_rows(history, number, n):
                summed += relevance(method, q, row) * method.row_norm(row.features) / n**0.5
            torch.testing.assert_close(known[number], method.auxiliary(torch.cat([summed, q])))


def test_the_search_learns_from_the_auxiliary_prediction_alone() -> None:
    method = random_method(2, 20, method="sim_soft", top_k=2)
    assert isinstance(method, SimSoft)
    searches = [method.search_query.weight, method.search_row.weight]
    known = method(random_queries(8), random_history("training", seed=8))
    known.interest_BD.sum().backward(retain_graph=True)
    assert all(weight.grad is None for weight in searches)
    known.auxiliary_BA.sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in searches)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("top_k", [2, 30])
def test_hard_search_finds_the_newest_rows_of_the_tag(situation: str, top_k: int) -> None:
    n, method = 20, random_method(3, 20, method="sim_hard", top_k=top_k)
    assert isinstance(method, SimHard)
    history = random_history(situation, seed=9)
    assert history.tags is not None
    tag_of_query = history.tags.query_B
    assert (tag_of_query == UNKNOWN_TAG).any()

    def reference(number: int, query_F: Tensor) -> Tensor:
        rows, tag = seen_rows(history, number, n), int(tag_of_query[number])
        found = [row for row in rows if row.tag == tag and tag != UNKNOWN_TAG]
        return found_and_newest(method, query_F, found[:top_k], rows[:top_k])

    assert_equals_reference(method, situation, 9, reference)


def test_searches_that_have_nothing_to_search_with_are_refused() -> None:
    base = ModelConfig()
    untagged = {**base.to_dict(), "features": ("item", "author")}
    with pytest.raises(ValueError, match=r"sim_hard searches rows by tag, .* add 'tag'"):
        build_interest(ModelConfig.from_dict(untagged), InterestConfig(method="sim_hard"))
    assert STAGES[-1] == "retrieval"
    retrieval = ModelConfig.from_dict({**base.to_dict(), "stage": "retrieval"})
    for method in ("sim_soft", "sim_hard"):
        with pytest.raises(ValueError, match=f"{method} searches rows for a target item, which"):
            build_interest(retrieval, InterestConfig(method=method))
