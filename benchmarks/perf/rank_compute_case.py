"""What the ranking computations are timed on: one user's rows and candidates, at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marm.amortised import AmortisedAttention, UserHistory
from marm.attention import MultiLayerTargetAttention
from marm.batch_rows import KeySource
from marm.precision import Precision
from marm.search import RowSearch
from marm.sequence import NUM_DISTANCE_BUCKETS, NUM_GAP_BUCKETS


@dataclass(frozen=True)
class Shape:
    """Sizes of the model: L, D, heads and F. Key inputs are D + F wide, F in layer 0."""

    depth: int = 4
    dim: int = 128
    num_heads: int = 4
    feature_dim: int = 64

    def attention(self, seed: int) -> MultiLayerTargetAttention:
        """Weights of these sizes, with biases that are not zero."""
        torch.manual_seed(seed)
        attention = MultiLayerTargetAttention(
            self.feature_dim,
            self.feature_dim,
            self.dim,
            self.dim,
            self.depth,
            self.num_heads,
            ("distance", "gap"),
        )
        for parameter in attention.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        return attention.requires_grad_(False).eval()

    def gflop(self, num_rows: int, num_candidates: int) -> float:
        """Products and sums that scoring needs at the least: projections of rows, attention, and
        query, output and feed-forward of candidates. No norm, no softmax, no look-up."""
        layers, dim = self.depth + 1, self.dim
        key_widths = layers * self.feature_dim + self.depth * dim
        rows = 4.0 * key_widths * dim * num_rows
        attention = 4.0 * layers * dim * num_rows * num_candidates
        first = 2 * self.feature_dim * dim - dim * dim if self.feature_dim != dim else 0
        per_candidate = 6 * layers * dim * dim + first  # F wide queries and residual in layer 0
        candidates = 2.0 * per_candidate * num_candidates
        return (rows + attention + candidates) * 1e-9


class RankingCase:
    """Rows of one user and candidates, and the ways to score them."""

    def __init__(self, shape: Shape, num_rows: int, num_candidates: int, seed: int) -> None:
        self.shape = shape
        self.weights = shape.attention(seed)
        torch.manual_seed(seed + 1)
        self.query_MF = torch.randn(num_candidates, shape.feature_dim)
        every = torch.ones(num_rows, dtype=torch.bool)
        self.history = UserHistory(
            torch.randn(num_rows, shape.feature_dim),
            torch.randn(num_rows, shape.depth, shape.dim),
            every,
            every,
            torch.arange(num_rows).clamp(max=NUM_DISTANCE_BUCKETS - 1),
            torch.arange(num_rows).clamp(max=NUM_GAP_BUCKETS - 1),
        )

    def amortised(self, precision: Precision, search: RowSearch | None = None) -> Tensor:
        """The last outputs of the fast path; checked against the plain one by the tests."""
        return self.frozen(precision, search).outputs(self.query_MF, self.history)[-1]

    def frozen(self, precision: Precision, search: RowSearch | None = None) -> AmortisedAttention:
        """The fast path, made once per loaded model."""
        return AmortisedAttention(self.weights, precision, search)

    def one_by_one(self, num_candidates: int) -> Tensor:
        """The first candidates, each in a pass of its own by the plain path."""
        history = self.history
        slab = KeySource(
            history.live_NF[None],
            history.visible_N[None],
            history.distance_N[None],
            history.gap_N[None],
            torch.zeros(1, dtype=torch.int64),
        )
        outputs = [
            self.weights(query_F[None], slab, history.memory_NLD[None], history.memorised_N[None])[
                -1
            ]
            for query_F in self.query_MF[:num_candidates]
        ]
        return torch.cat(outputs)
