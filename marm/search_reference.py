"""The slow reference of searched attention: one candidate, one layer, one head at a time.

Scores every row, sorts, gathers the rows found and attends to them, with the modules of a model as
they are. `marm.amortised` must give the same numbers.

Shape legend: N rows, K rows found, H heads, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marm.amortised import UserHistory
from marm.attention import MultiLayerTargetAttention, TargetAttention
from marm.search import RowSearch


@torch.no_grad()
def searched_outputs(
    attention: MultiLayerTargetAttention,
    search: RowSearch,
    query_MC: Tensor,
    history: UserHistory,
) -> list[Tensor]:
    """``[y_1, ..., y_{L+1}]`` of the candidates, each ``[M, D]``; see `AmortisedAttention`."""
    biases = attention.recency(history.distance_N[None], history.gap_N[None])
    outputs: list[Tensor] = []
    x_MC = query_MC
    for index, layer in enumerate([attention.first, *attention.layers]):
        assert isinstance(layer, TargetAttention)
        seen_N = history.visible_N if index == 0 else history.memorised_N
        if index > history.memory_NLD.shape[1]:
            seen_N = torch.zeros_like(seen_N)
        rows = seen_N.nonzero().flatten()
        inputs_NC = attention.feature_norms[index](history.live_NF[rows])
        if index > 0 and len(rows):
            cached = attention.memory_norms[index - 1](history.memory_NLD[rows, index - 1])
            inputs_NC = torch.cat([cached, inputs_NC], dim=-1)
        found = []
        for number, x_C in enumerate(x_MC):
            bias_HN = biases[index][0][:, rows]
            kept = _found(layer, search, x_C, inputs_NC, bias_HN, history, rows, number)
            found.append(_attend(layer, x_C, inputs_NC[kept], bias_HN[:, kept]))
        x_MC = torch.stack(found)
        outputs.append(x_MC)
    return outputs


def _found(
    layer: TargetAttention,
    search: RowSearch,
    x_C: Tensor,
    inputs_NC: Tensor,
    bias_HN: Tensor,
    history: UserHistory,
    rows: Tensor,
    number: int,
) -> Tensor:
    """Positions of the rows that one candidate attends to."""
    if not len(rows):
        return rows
    q_HE, k_HNE, _ = _heads(layer, x_C, inputs_NC)
    scores_N = torch.stack([k_HNE[h] @ q_HE[h] + bias_HN[h] for h in range(layer.num_heads)]).mean(
        dim=0
    )
    categories = history.categories
    if categories is not None:
        categories = categories.of_rows(rows).of_candidates(slice(number, number + 1))
    found = search.find(scores_N[None], categories)
    return found.position[0][found.valid[0]]


def _attend(layer: TargetAttention, x_C: Tensor, inputs_KC: Tensor, bias_HK: Tensor) -> Tensor:
    if not len(inputs_KC):
        context = x_C.new_zeros(layer.dim)
    else:
        q_HE, k_HKE, v_HKE = _heads(layer, x_C, inputs_KC)
        parts = []
        for h in range(layer.num_heads):
            logits = torch.cat([layer.null_logit[h : h + 1], k_HKE[h] @ q_HE[h] + bias_HK[h]])
            parts.append(torch.softmax(logits, dim=0)[1:] @ v_HKE[h])
        context = torch.cat(parts)
    y: Tensor = layer.residual(x_C) + layer.output(context)
    return y + layer.feed_forward(y)


def _heads(layer: TargetAttention, x_C: Tensor, inputs_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = layer.dim // layer.num_heads
    q_HE = layer.query(layer.query_norm(x_C)).view(layer.num_heads, width) * width**-0.5
    k, v = layer.key_value(inputs_NC).chunk(2, dim=-1)
    by_head = (len(inputs_NC), layer.num_heads, width)
    return q_HE, k.view(by_head).transpose(0, 1), v.reshape(by_head).transpose(0, 1)
