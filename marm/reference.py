"""The slow reference: a banded, strictly causal decoder over a raw history, O(n^2).

What Fig. 2(b) of the paper draws, written as plainly as possible: every position of the history is
a query, position j sees the n positions before it, and layer i reads layer i's outputs at those
positions, or at those of them that its search finds (Eq. 9). With frozen weights, streaming a log
in micro-batches and reading the memory must give the same numbers (see tests/numerics). It shares a
model's parameters and none of the masking, batching, hashing shortcuts or memory of the fast path.

Shape legend: P positions of one user's history, D attention width, F feature dim, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from marm.attention import RecencyBias, TargetAttention
from marm.events import BINARY_TASKS, WATCH_BUCKET_SHIFT, EventBatch, pack_feedback
from marm.network import stack_rows
from marm.ranker import Ranker, RankerNet
from marm.sequence import distance_bucket, enters_sequence, gap_bucket


@dataclass(frozen=True)
class ReferenceOutput:
    """What the decoder computes at every position of a history."""

    logits_PT: Tensor
    rows_PLD: Tensor  # y_1..y_L


@torch.no_grad()
def decode_history(model: Ranker, history: EventBatch) -> ReferenceOutput:
    """Run the decoder over one user's ``history``, sorted by time.

    Raises:
        ValueError: when ``history`` is of several users or not in strictly increasing time.
    """
    if len(np.unique(history.user_id)) > 1 or np.any(np.diff(history.timestamp_ms) <= 0):
        raise ValueError(
            "the reference decodes one user's events in strictly increasing time; got "
            f"{len(np.unique(history.user_id))} users or unordered timestamps"
        )
    net = model.net
    assert isinstance(net, RankerNet)
    attention = net.sequence.memory_augmented.attention
    target_PF, live_PF = _item_embeddings(model, history), _live_features(model, net, history)
    user_PF = _look_up(model, "user", history.user_id)
    context_PF = _look_up(model, "context", history.context_id)
    query = target_PF + context_PF
    outputs: list[Tensor] = []
    for index, layer in enumerate([attention.first, *attention.layers]):
        assert isinstance(layer, TargetAttention)
        key_inputs = attention.feature_norms[index](live_PF)
        if index > 0:
            cached = attention.memory_norms[index - 1](outputs[-1])
            key_inputs = torch.cat([cached, key_inputs], dim=-1)
        rows = []
        for position in range(len(history)):
            past, (distances, gaps) = _band(history, position, model)
            bias = _bias(attention.recency, distances, gaps)[index]
            logits_HP = _logits(layer, query[position], key_inputs[past], bias)
            found = attention.search.find(logits_HP.mean(dim=0, keepdim=True), None).position[0]
            keys = key_inputs[past][found]
            rows.append(_attend(layer, query[position], keys, bias[:, found]))
        query = torch.stack(rows)
        outputs.append(query)
    item_slots = torch.from_numpy(model.table.slots("item", history.item_id))
    prior = model.item_prior(item_slots)
    logits = net.predict(outputs[-1], target_PF, user_PF, context_PF, prior)
    return ReferenceOutput(logits, stack_rows(outputs[:-1], target_PF, model.config.namespace.dim))


def _band(
    history: EventBatch, position: int, model: Ranker
) -> tuple[list[int], tuple[list[int], list[int]]]:
    """Positions visible from ``position``, oldest first, with their distances and time gaps."""
    entering = enters_sequence(history, model.config.namespace.sequence)
    past = [j for j in range(position) if entering[j]][-model.config.history_length :]
    distances = [len(past) - k for k in range(len(past))]
    gaps = [int(history.timestamp_ms[position] - history.timestamp_ms[j]) for j in past]
    return past, (distances, gaps)


def _bias(recency: RecencyBias, distances: list[int], gaps_ms: list[int]) -> Tensor:
    """Recency bias ``[L + 1, H, P]`` of visible positions."""
    distance = torch.from_numpy(distance_bucket(np.array(distances, np.int64)))
    gap = torch.from_numpy(gap_bucket(np.array(gaps_ms, np.int64)))
    bias = recency.distance[distance] + recency.gap[gap]
    return bias.view(len(distances), recency.num_layers, recency.num_heads).permute(1, 2, 0)


def _logits(layer: TargetAttention, query: Tensor, keys: Tensor, bias_HP: Tensor) -> Tensor:
    """Content and recency bias of one query, head by head, ``[H, P]``."""
    width = layer.dim // layer.num_heads
    q = layer.query(layer.query_norm(query))
    k, _ = layer.key_value(keys).chunk(2, dim=-1)
    logits = []
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        logits.append(k[:, part] @ q[part] / width**0.5 + bias_HP[head])
    return torch.stack(logits)


def _attend(layer: TargetAttention, query: Tensor, keys: Tensor, bias_HP: Tensor) -> Tensor:
    """One query, head by head, over the keys and the null key (Eq. 5)."""
    width = layer.dim // layer.num_heads
    _, v = layer.key_value(keys).chunk(2, dim=-1)
    heads = []
    for head, logits in enumerate(_logits(layer, query, keys, bias_HP)):
        weights = torch.softmax(torch.cat([layer.null_logit[head : head + 1], logits]), dim=0)
        heads.append(weights[1:] @ v[:, head * width : (head + 1) * width])
    y = layer.residual(query) + layer.output(torch.cat(heads))
    return y + layer.feed_forward(y)


def _look_up(model: Ranker, feature: str, ids: np.ndarray) -> Tensor:
    return nn.functional.embedding(
        torch.from_numpy(model.table.find(model.table.slots(feature, ids))), model.table.weight
    )


def _item_embeddings(model: Ranker, history: EventBatch) -> Tensor:
    octave = np.ceil(np.log2(1.0 + np.maximum(history.duration_ms, 0) / 1000.0)).astype(np.int64)
    columns: dict[str, np.ndarray] = {
        "item": history.item_id,
        "author": history.author_id,
        "tag": history.tag_id,
        "duration": octave,
    }
    used = [name for name in columns if name in model.config.features]
    return torch.stack([_look_up(model, name, columns[name]) for name in used]).sum(dim=0)


def _live_features(model: Ranker, net: RankerNet, history: EventBatch) -> Tensor:
    """Item and feedback embeddings of the history's rows, ``[P, F]``."""
    columns: dict[str, np.ndarray] = {
        "item": history.item_id,
        "author": history.author_id,
        "tag": history.tag_id,
        "context": history.context_id,
    }
    used = [name for name in columns if name in model.config.features]
    live = torch.stack([_look_up(model, name, columns[name]) for name in used]).sum(dim=0)
    packed = pack_feedback(history.labels)
    for index, signal in enumerate(model.config.feedback_signals):
        bit = (packed >> np.uint32(BINARY_TASKS.index(signal))) & np.uint32(1)
        weight = net.sequence.feedback_signal.weight[:, index]
        live = live + torch.from_numpy(bit.astype(np.float32))[:, None] * weight
    bucket = ((packed >> np.uint32(WATCH_BUCKET_SHIFT)) & np.uint32(0xF)).astype(np.int64)
    return live + net.sequence.watch_bucket(torch.from_numpy(bucket))
