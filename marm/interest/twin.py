"""TWIN: two-stage interest network with one relevance in both stages (Chang et al., KDD 2023).

Shape legend: B queries, W columns of a window, K rows found, H heads, F feature dim, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from marm.config import InterestConfig, ModelConfig
from marm.interest.interface import History, Interest, InterestOutput
from marm.interest.pooling import Readout, WindowAttention, recency_of_heads
from marm.interest.window import Window, gather_window


class Twin(Interest):
    """Search (GSU) and attention (ESU) share one set of projections and so their logits:
    ``a = (K W_k)(q W_q)^T / sqrt(E) + b``, of which the softmax over the best K rows mixes K W_v.

    A row's score in the search is the mean of its logits over heads, as in `marm.search`. The bias
    b of the paper is linear in features that user and item share (when and how often they met);
    here it is the learned bias per head for distance and gap, and this is where recency enters.
    Differences to the paper: rows and queries are normalised, and a null key takes the weight when
    nothing matches.
    """

    def __init__(self, config: ModelConfig, interest: InterestConfig) -> None:
        super().__init__()
        feature_dim, dim = config.feature_dim, config.attention_dim
        self._dim, self._num_rows, self._top_k = dim, config.history_length, interest.top_k
        self.row_norm = nn.LayerNorm(feature_dim)
        self.query_norm = nn.LayerNorm(feature_dim)
        self.recency = recency_of_heads(config)
        self.attention = WindowAttention(feature_dim, feature_dim, dim, config.num_heads)
        self.readout = Readout(feature_dim, dim, dim)

    @property
    def output_dim(self) -> int:
        """See `Interest.output_dim`."""
        return self._dim

    def forward(self, query_BF: Tensor, history: History) -> InterestOutput:
        """See `Interest.forward`."""
        window = gather_window(history, self._num_rows, self.row_norm)
        (bias_BHW,) = self.recency(window.distance, window.gap)
        window, bias_BHW = self._searched(window, bias_BHW)
        logits_BHW = self.attention.logits(self.query_norm(query_BF), window, bias_BHW)
        pooled_BD = attend_to_best(self.attention, logits_BHW, window, self._top_k)
        return InterestOutput(self.readout(query_BF, pooled_BD))

    def _searched(self, window: Window, bias_BHW: Tensor) -> tuple[Window, Tensor]:
        """What is searched, and its bias ``[B or 1, H, columns]``: here the rows themselves."""
        return window, bias_BHW


def attend_to_best(
    attention: WindowAttention, logits_BHW: Tensor, window: Window, top_k: int
) -> Tensor:
    """``[B, D]``: the softmax over the K rows whose logits, averaged over heads, are highest.

    The logits of hidden rows give them no weight, should there be fewer than K others.
    """
    if top_k >= logits_BHW.shape[-1]:
        return attention.mix(logits_BHW, window)
    column_BK = logits_BHW.detach().mean(dim=1).topk(top_k, dim=1).indices
    found_BHK = logits_BHW.gather(2, column_BK.unsqueeze(1).expand(-1, logits_BHW.shape[1], -1))
    visible_BK = window.visible.expand(len(column_BK), -1).gather(1, column_BK)
    return attention.mix(found_BHK, window.take(column_BK, visible_BK))
