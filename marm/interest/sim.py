"""SIM: Search-based Interest Model, soft and hard search (Pi et al., CIKM 2020).

A general search unit (GSU) finds K rows, an exact search unit (ESU) attends to them, and a second
attention reads the newest rows.

Shape legend: B queries, W columns of a window, K rows found, F feature dim, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marm.config import InterestConfig, ModelConfig
from marm.interest.interface import UNKNOWN_TAG, History, Interest, InterestOutput
from marm.interest.pooling import MASKED, Readout, WindowAttention, recency_of_heads, weighted_sums
from marm.interest.window import Window, first_columns, gather_window


class _FoundAndNewest(nn.Module):
    """ESU on the rows found and attention to the newest K rows, read out together.

    Recency: a learned bias per head for distance and gap, in both attentions. The paper gives the
    ESU the time gap as an embedding beside the row.
    """

    def __init__(self, config: ModelConfig, top_k: int) -> None:
        super().__init__()
        dims = (config.feature_dim, config.feature_dim, config.attention_dim, config.num_heads)
        self.num_newest = top_k
        self.recency = recency_of_heads(config, num_poolings=2)
        self.exact = WindowAttention(*dims)
        self.newest = WindowAttention(*dims)
        self.readout = Readout(config.feature_dim, 2 * config.attention_dim, config.attention_dim)

    def forward(self, query_BF: Tensor, q_BF: Tensor, window: Window, found: Window) -> Tensor:
        """``[B, D]`` for queries as they are, and normalised."""
        newest = window.newest(self.num_newest)
        exact_bias, _ = self.recency(found.distance, found.gap)
        _, newest_bias = self.recency(newest.distance, newest.gap)
        pooled = [self.exact(q_BF, found, exact_bias), self.newest(q_BF, newest, newest_bias)]
        interest_BD: Tensor = self.readout(query_BF, torch.cat(pooled, dim=-1))
        return interest_BD


class SimSoft(Interest):
    """The search by inner product: r = (W_q q) . (W_k k), top K.

    The search has projections of its own, which no gradient reaches through the K rows found. They
    learn from an auxiliary prediction on the sum of all rows by r, trained beside the heads with a
    weight of 1. Differences to the paper: rows and queries are normalised; r is divided by the root
    of its width and the sum by the root of the history length, constants that keep both of unit
    size; all methods here have the same n rows, so the newest K are among those searched.
    """

    def __init__(self, config: ModelConfig, interest: InterestConfig) -> None:
        super().__init__()
        _needs_a_target(config, "sim_soft")
        feature_dim, dim = config.feature_dim, config.attention_dim
        self._dim, self._num_rows, self._top_k = dim, config.history_length, interest.top_k
        self.row_norm = nn.LayerNorm(feature_dim)
        self.query_norm = nn.LayerNorm(feature_dim)
        self.search_query = nn.Linear(feature_dim, dim, bias=False)
        self.search_row = nn.Linear(feature_dim, dim, bias=False)
        self.auxiliary = nn.Sequential(
            nn.Linear(2 * feature_dim, dim), nn.GELU(), nn.Linear(dim, 1)
        )
        self.reader = _FoundAndNewest(config, interest.top_k)

    @property
    def output_dim(self) -> int:
        """See `Interest.output_dim`."""
        return self._dim

    def forward(self, query_BF: Tensor, history: History) -> InterestOutput:
        """See `Interest.forward`."""
        window = gather_window(history, self._num_rows, self.row_norm)
        q_BF = self.query_norm(query_BF)
        relevance_BW = self._relevance(q_BF, window)
        searched = relevance_BW.detach().masked_fill(~window.visible, MASKED)
        column_BK = searched.topk(min(self._top_k, searched.shape[1]), dim=1).indices
        visible_BW = window.visible.expand(len(query_BF), -1)
        found = window.take(column_BK, visible_BW.gather(1, column_BK))
        return InterestOutput(
            self.reader(query_BF, q_BF, window, found),
            auxiliary_BA=self._auxiliary_logit(q_BF, relevance_BW, window),
        )

    def _relevance(self, q_BF: Tensor, window: Window) -> Tensor:
        """r of every row, ``[B, W]``."""
        q_BF = self.search_query(q_BF) @ self.search_row.weight * self._dim**-0.5
        if len(window.keys) == 1:
            return q_BF @ window.keys[0].T
        return torch.bmm(window.keys, q_BF.unsqueeze(-1)).squeeze(-1)

    def _auxiliary_logit(self, q_BF: Tensor, relevance_BW: Tensor, window: Window) -> Tensor:
        """``[B, 1]``: a prediction of the first task from the sum of all rows by r."""
        weights_BW = relevance_BW * window.visible * self._num_rows**-0.5
        summed_BF = weighted_sums(weights_BW.unsqueeze(1), window.keys).squeeze(1)
        logit_B1: Tensor = self.auxiliary(torch.cat([summed_BF, q_BF], dim=-1))
        return logit_B1


class SimHard(Interest):
    """The search by category: the newest K rows with the tag of the target.

    A target without a tag finds nothing and reads its newest rows only.
    """

    def __init__(self, config: ModelConfig, interest: InterestConfig) -> None:
        super().__init__()
        _needs_a_target(config, "sim_hard")
        if "tag" not in config.features:
            raise ValueError(
                f"sim_hard searches rows by tag, got features {config.features}; add 'tag' to the "
                "features or use 'sim_soft'"
            )
        self._dim = config.attention_dim
        self._num_rows, self._top_k = config.history_length, interest.top_k
        self.row_norm = nn.LayerNorm(config.feature_dim)
        self.query_norm = nn.LayerNorm(config.feature_dim)
        self.reader = _FoundAndNewest(config, interest.top_k)

    @property
    def output_dim(self) -> int:
        """See `Interest.output_dim`."""
        return self._dim

    def forward(self, query_BF: Tensor, history: History) -> InterestOutput:
        """See `Interest.forward`."""
        window = gather_window(history, self._num_rows, self.row_norm)
        assert history.tags is not None, "a model with the feature 'tag' knows the tags"
        assert window.tag is not None
        target_B1 = history.tags.query_B.unsqueeze(1)
        same_BW = window.visible & (window.tag == target_B1) & (target_B1 != UNKNOWN_TAG)
        found = window.take(*first_columns(same_BW, self._top_k))
        q_BF = self.query_norm(query_BF)
        return InterestOutput(self.reader(query_BF, q_BF, window, found))


def _needs_a_target(config: ModelConfig, method: str) -> None:
    """Retrieval asks with a user. What its training knows of the target is the answer."""
    if config.stage == "retrieval":
        raise ValueError(
            f"{method} searches rows for a target item, which retrieval does not have; use another "
            "method for the retrieval model, such as 'marm' or 'twin'"
        )
