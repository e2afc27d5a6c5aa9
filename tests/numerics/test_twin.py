"""TWIN and TWIN-V2 against a search and an attention computed row by row."""

from __future__ import annotations

import math

import pytest
import torch
from interest_histories import (
    SITUATIONS,
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

from marm.interest.twin import Twin
from marm.interest.twin_v2 import TwinV2, layout_of_clusters


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("top_k", [2, 30])
def test_search_and_attention_share_their_logits(situation: str, n: int, top_k: int) -> None:
    method = random_method(n, n, method="twin", top_k=top_k)
    assert isinstance(method, Twin)
    history = random_history(situation, seed=10)

    def reference(number: int, query_F: Tensor) -> Tensor:
        q, scored = method.query_norm(query_F), []
        for row in seen_rows(history, number, n):
            key = method.row_norm(row.features)
            scored.append(
                (head_logits(method.attention, q, key, bias_of(method.recency, row)), key)
            )
        best = sorted(scored, key=lambda pair: float(pair[0].mean()), reverse=True)[:top_k]
        pooled = softmax_mix(method.attention, [a for a, _ in best], [k for _, k in best])
        return read_out(method.readout, query_F, pooled)

    assert_equals_reference(method, situation, 10, reference)


def clusters_of(rows: list[Tensor], num_clusters: int, capacity: int) -> list[list[int]]:
    """Positions of the rows in each cluster that has some, by plain recursion."""

    def cut(members: list[int], num_clusters: int) -> list[list[int]]:
        if num_clusters == 1 or not members:
            return [members] if members else []
        x = torch.stack([rows[member] for member in members])
        x = x - x.mean(dim=0)
        axis = x[x.square().sum(dim=1).argmax()]
        axis = x.T @ (x @ axis)
        place = [float(one @ axis) for one in x]
        order = [members[i] for i in sorted(range(len(members)), key=lambda i: place[i])]
        half = num_clusters // 2
        return cut(order[: half * capacity], half) + cut(order[half * capacity :], half)

    return cut(list(range(len(rows))), num_clusters)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize(("top_k", "cluster_size"), [(2, 2), (30, 2), (30, 3), (3, 1), (30, 50)])
def test_clusters_weigh_as_much_as_their_rows(
    situation: str, n: int, top_k: int, cluster_size: int
) -> None:
    method = random_method(n, n, method="twin_v2", top_k=top_k, cluster_size=cluster_size)
    assert isinstance(method, TwinV2)
    history = random_history(situation, seed=11)

    def reference(number: int, query_F: Tensor) -> Tensor:
        q, scored = method.query_norm(query_F), []
        rows = seen_rows(history, number, n)
        keys = [method.row_norm(row.features) for row in rows]
        sketches = [method.sketch(key) for key in keys]
        for cluster in clusters_of(sketches, *layout_of_clusters(n, cluster_size)):
            assert 1 <= len(cluster) <= cluster_size
            key = torch.stack([keys[i] for i in cluster]).mean(dim=0)
            bias = torch.stack([bias_of(method.recency, rows[i]) for i in cluster]).mean(dim=0)
            logit = head_logits(method.attention, q, key, bias) + math.log(len(cluster))
            scored.append((logit, key))
        best = sorted(scored, key=lambda pair: float(pair[0].mean()), reverse=True)[:top_k]
        pooled = softmax_mix(method.attention, [a for a, _ in best], [k for _, k in best])
        return read_out(method.readout, query_F, pooled)

    assert_equals_reference(method, situation, 11, reference)


def test_clusters_of_one_row_are_twin() -> None:
    one = random_method(1, 20, method="twin_v2", top_k=3, cluster_size=1)
    twin = random_method(2, 20, method="twin", top_k=3)
    weights = one.state_dict()
    del weights["projection_FK"]  # what clusters are cut by
    twin.load_state_dict(weights)
    queries, history = random_queries(12), random_history("training", 12)
    with torch.no_grad():
        as_twin, as_clusters = twin(queries, history), one(queries, history)
    torch.testing.assert_close(as_clusters.interest_BD, as_twin.interest_BD)


@pytest.mark.parametrize(
    ("num_rows", "most", "layout"),
    [(50, 5, (16, 4)), (50, 50, (1, 50)), (1, 5, (1, 1)), (9, 2, (8, 2)), (6, 1, (8, 1))],
)
def test_a_full_history_fits_its_clusters(
    num_rows: int, most: int, layout: tuple[int, int]
) -> None:
    assert layout_of_clusters(num_rows, most) == layout
    assert layout[0] * layout[1] >= num_rows
    assert layout[1] <= most
