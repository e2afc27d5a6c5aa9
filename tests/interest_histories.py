"""Random histories of queries, and what each query sees of them, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marm.attention import RecencyBias
from marm.batch_rows import KeySource
from marm.config import InterestConfig, ModelConfig
from marm.interest.interface import UNKNOWN_TAG, History, Interest, Tags
from marm.interest.methods import build_interest
from marm.interest.pooling import Readout, WindowAttention
from marm.memory import Namespace
from marm.sequence import NUM_DISTANCE_BUCKETS, NUM_GAP_BUCKETS

SITUATIONS = ("training", "reading", "request")


def random_history(
    situation: str, seed: int, num_queries: int = 7, num_columns: int = 9, feature_dim: int = 6
) -> History:
    """Double precision; hidden rows anywhere, user 3 with none, and in training a block."""
    generator = torch.Generator().manual_seed(seed)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    num_users, num_lines = (1, 1) if situation == "request" else (4, num_queries)
    user_row = whole(num_users, num_lines)

    def source(num_keys: int, features: Tensor, visible: Tensor, of: Tensor | None) -> KeySource:
        shape = (num_lines, num_keys)
        distance, gap = whole(NUM_DISTANCE_BUCKETS, *shape), whole(NUM_GAP_BUCKETS, *shape)
        return KeySource(features, visible, distance, gap, of)

    def features(*shape: int) -> Tensor:
        return torch.randn(*shape, feature_dim, generator=generator, dtype=torch.float64)

    seen = (whole(4, num_lines, num_columns) > 0) & (user_row != 3)[:, None]
    slab = source(num_columns, features(num_users, num_columns), seen, user_row)
    block = None
    if situation == "training":
        earlier = torch.ones(num_lines, num_lines).tril(-1).bool()
        seen = earlier & (user_row[:, None] == user_row[None, :])
        block = source(num_lines, features(num_lines), seen & (whole(5, num_lines) > 0), None)

    def tag(*shape: int) -> Tensor:
        return torch.tensor([UNKNOWN_TAG, 10, 11, 12])[whole(4, *shape)]

    query_tag = tag(num_queries)
    query_tag[:1] = UNKNOWN_TAG
    tags = Tags(query_tag, tag(num_users, num_columns), None if block is None else tag(num_lines))
    memory = torch.zeros(num_users, num_columns, 0, 8, dtype=torch.float64)
    return History(slab, memory, slab.visible, block, tags=tags)


def random_method(seed: int, history_length: int, **interest: object) -> Interest:
    """A method of double precision whose every parameter is random."""
    torch.manual_seed(seed)
    config = ModelConfig(
        namespace=Namespace(depth=0, dim=8, dtype="float32"),
        depth=0,
        attention_dim=8,
        feature_dim=6,
        history_length=history_length,
    )
    method = build_interest(config, InterestConfig(**interest))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return method.double()


def random_queries(seed: int, num_queries: int = 7, feature_dim: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(num_queries, feature_dim, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class SeenRow:
    """One row as one query sees it."""

    features: Tensor  # [F]
    distance: int
    gap: int
    tag: int


def seen_rows(history: History, query: int, n: int) -> list[SeenRow]:
    """The newest ``n`` rows of one query, newest first, in plain loops."""
    tags, rows = history.tags, []
    assert tags is not None
    block, slab = history.block, history.slab
    if block is not None:
        assert tags.block_P is not None
        for p in reversed(range(len(block.features))):
            if block.visible[query, p]:
                at = int(block.distance[query, p]), int(block.gap[query, p])
                rows.append(SeenRow(block.features[p], *at, int(tags.block_P[p])))
    assert slab.user_row is not None
    line = query if len(slab.visible) > 1 else 0
    user = int(slab.user_row[line])
    for column in range(slab.visible.shape[1]):
        if slab.visible[line, column]:
            at = int(slab.distance[line, column]), int(slab.gap[line, column])
            rows.append(SeenRow(slab.features[user, column], *at, int(tags.slab_UN[user, column])))
    return rows[:n]


def bias_of(recency: RecencyBias, row: SeenRow, pooling: int = 0) -> Tensor:
    """Recency bias of one row, ``[H]``."""
    both = recency.distance[row.distance] + recency.gap[row.gap]
    return both.view(recency.num_layers, recency.num_heads)[pooling]


def head_logits(attention: WindowAttention, q_F: Tensor, key_F: Tensor, bias_H: Tensor) -> Tensor:
    """Logits of one row, ``[H]``: (W_q q + b)_h . (W_k k)_h / sqrt(E) + bias_h."""
    q = attention.query(q_F).view(attention.num_heads, -1)
    k = attention.key(key_F).view(attention.num_heads, -1)
    return (q * k).sum(dim=1) / q.shape[1] ** 0.5 + bias_H


def softmax_mix(attention: WindowAttention, logits: list[Tensor], keys: list[Tensor]) -> Tensor:
    """``[D]``: the values of the keys by the softmax over their logits and the null key."""
    mixed = torch.zeros(attention.num_heads, attention.head_dim, dtype=torch.float64)
    for head in range(attention.num_heads):
        total = attention.null_logit[head].exp()
        for logit in logits:
            total = total + logit[head].exp()
        for logit, key in zip(logits, keys, strict=True):
            value = attention.value(key).view(attention.num_heads, -1)[head]
            mixed[head] += logit[head].exp() / total * value
    return mixed.flatten()


def read_out(readout: Readout, query_F: Tensor, pooled_X: Tensor) -> Tensor:
    """``[D]``."""
    y = readout.residual(query_F) + readout.output(pooled_X)
    answer: Tensor = y + readout.feed_forward(y)
    return answer


def assert_equals_reference(
    method: nn.Module, situation: str, seed: int, reference: Callable[[int, Tensor], Tensor]
) -> None:
    """The method's interest of every query is that of ``reference(query number, query)``."""
    history, queries = random_history(situation, seed), random_queries(seed)
    with torch.no_grad():
        known = method(queries, history)
        expected = torch.stack([reference(b, query) for b, query in enumerate(queries)])
    torch.testing.assert_close(known.interest_BD, expected, rtol=1e-9, atol=1e-9)
