"""Stacked target attention over raw rows: what MARM is without its memory.

The ablation that says what cached rows are worth. It is the idea of STCA (arXiv 2511.06077), built
from MARM's own layers, so that nothing else differs.
"""

from __future__ import annotations

from torch import Tensor, nn

from marm.attention import RecencyBias, TargetAttention
from marm.batch_rows import batch_rows
from marm.config import InterestConfig, ModelConfig
from marm.interest.interface import History, Interest, InterestOutput
from marm.key_reading import Keys, RowPart


class StackedTargetAttention(Interest):
    """`marm.attention.MultiLayerTargetAttention` whose layer l >= 1 sees live rows only.

    A key of such a layer is the normalised live embedding of a row's item and feedback; MARM has
    the normalised cached vector beside it. Every layer sees all visible rows, as none can lack a
    cached vector. Recency enters as in MARM.
    """

    def __init__(self, config: ModelConfig, interest: InterestConfig) -> None:
        super().__init__()
        feature_dim, dim, heads = config.feature_dim, config.attention_dim, config.num_heads
        self._dim = dim
        self.recency = RecencyBias.of_layers(interest.layers, heads, config.recency)
        self.first = TargetAttention(feature_dim, feature_dim, dim, heads)
        self.feature_norms = nn.ModuleList(
            nn.LayerNorm(feature_dim) for _ in range(interest.layers + 1)
        )
        self.layers = nn.ModuleList(
            TargetAttention(dim, feature_dim, dim, heads) for _ in range(interest.layers)
        )

    @property
    def output_dim(self) -> int:
        """See `Interest.output_dim`."""
        return self._dim

    def forward(self, query_BF: Tensor, history: History) -> InterestOutput:
        """See `Interest.forward`."""
        sources = [history.slab]
        if history.block is not None:
            sources.append(batch_rows(history.block, history.slab.user_row).source)
        biases = [self.recency(source.distance, source.gap) for source in sources]
        # As in MARM: normalised once, the layers differ in gain and shift alone.
        first = self.feature_norms[0]
        lives = [RowPart.normalised(source.features, first) for source in sources]
        y = query_BF
        for index, layer in enumerate([self.first, *self.layers]):
            norm = self.feature_norms[index]
            y = layer(
                y,
                [
                    Keys((live.under(norm),), source.visible, bias[index], source.user_row)
                    for live, source, bias in zip(lives, sources, biases, strict=True)
                ],
            )
        return InterestOutput(y)
