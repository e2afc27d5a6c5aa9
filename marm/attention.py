"""Target attention (Eq. 5) and its multi-layer form over memory (Eq. 6).

Shape legend: B queries, U users, N slab length, P block length, H heads, E head width, D = H*E,
C width of a key input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marm.batch_rows import KeySource, batch_rows
from marm.key_reading import Keys, RowPart, read_keys
from marm.search import AllRows, RowSearch
from marm.searched_keys import found_keys
from marm.sequence import NUM_DISTANCE_BUCKETS, NUM_GAP_BUCKETS

_MASKED = -1e9
_EVERY_ROW = AllRows()

FIRST_LAYER_DECAY = 0.25
"""Initial recency decay of every other head of layer 0, per quarter of a doubling of distance."""


_INITIAL_NOISE = 0.3
"""Of torch's own initial deviation, beside the identity."""


class TargetAttention(nn.Module):
    """``Target-Attention`` of Eq. (5): every query attends to its history; ``[B, D]``.

    Pre-normalised multi-head attention with a recency bias, a null key that takes the weight when
    nothing matches (so an empty history is no special case), a residual connection and a
    feed-forward block.
    """

    def __init__(
        self, query_dim: int, key_dim: int, dim: int, num_heads: int, live_dim: int | None = None
    ) -> None:
        """``live_dim`` of the last key inputs are live features (None: all); attention begins as
        their similarity to the query."""
        super().__init__()
        self.num_heads, self.dim = num_heads, dim
        self.query_norm = nn.LayerNorm(query_dim)
        self.query = nn.Linear(query_dim, dim)
        self.key_value = nn.Linear(key_dim, 2 * dim, bias=False)
        begin_as_similarity(self.query.weight, self.key_value.weight[:dim], live_dim or key_dim)
        self.output = nn.Linear(dim, dim)
        self.residual = nn.Identity() if query_dim == dim else nn.Linear(query_dim, dim)
        self.null_logit = nn.Parameter(torch.zeros(num_heads))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(
        self, query_input: Tensor, key_sets: list[Keys], search: RowSearch = _EVERY_ROW
    ) -> Tensor:
        """Attend ``query_input`` [B, query_dim] to the rows of all ``key_sets`` that ``search``
        finds, in one softmax (Eq. 9)."""
        batch = query_input.shape[0]
        q_BHE = self.queries(query_input)
        logits, readings = [self.null_logit.expand(batch, -1).unsqueeze(-1)], []
        for keys in found_keys(search, q_BHE, self.key_value, key_sets):
            reading = read_keys(q_BHE, keys.inputs, self.key_value, keys.user_row)
            biased = reading.content() + keys.bias
            logits.append(biased.masked_fill(~keys.visible.unsqueeze(1), _MASKED))
            readings.append(reading)
        weights = torch.softmax(torch.cat(logits, dim=-1), dim=-1)
        parts = torch.split(weights, [part.shape[-1] for part in logits], dim=-1)[1:]
        context = torch.zeros_like(q_BHE)
        for part, reading in zip(parts, readings, strict=True):
            context = context + reading.mix(part)
        return self.finish(query_input, context.reshape(batch, self.dim))

    def queries(self, query_input: Tensor) -> Tensor:
        """Scaled queries ``[B, H, E]`` of ``[B, query_dim]``."""
        width = self.dim // self.num_heads
        q_BD = self.query(self.query_norm(query_input))
        return q_BD.view(len(query_input), self.num_heads, width) * width**-0.5

    def finish(self, query_input: Tensor, context_BD: Tensor) -> Tensor:
        """What follows the mixing of values: residual connection and feed-forward, ``[B, D]``."""
        y_BD = self.residual(query_input) + self.output(context_BD)
        return y_BD + self.feed_forward(y_BD)

    def keys_values(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[..., H, E]`` of key inputs ``[..., C]``."""
        k, v = self.key_value(inputs).chunk(2, dim=-1)
        heads = (*inputs.shape[:-1], self.num_heads, self.dim // self.num_heads)
        return k.reshape(heads), v.reshape(heads)


@torch.no_grad()
def begin_as_similarity(query: Tensor, key: Tensor, live_dim: int) -> None:
    """Initial projections ``[D, query_dim]`` and ``[D, key_dim]`` under which a query attends to
    rows whose live features (the last ``live_dim`` inputs) resemble it.

    Items that agree have like embeddings long before a random projection has found that out.
    """
    dim, query_dim = query.shape
    query.mul_(_INITIAL_NOISE).add_(torch.eye(dim, query_dim))
    key.mul_(_INITIAL_NOISE)
    key[:, key.shape[1] - live_dim :].add_(torch.eye(dim, live_dim))


class RecencyBias(nn.Module):
    """Learned bias of every layer and head for the distance in events and in time.

    ``decay_slopes[l][h]`` is how much the bias of layer l, head h falls per distance bucket at the
    start of training. What ``recency`` leaves out (distances, or gaps) biases nothing.
    """

    def __init__(self, decay_slopes: list[list[float]], recency: tuple[str, ...]) -> None:
        super().__init__()
        self.num_layers, self.num_heads = len(decay_slopes), len(decay_slopes[0])
        slopes = torch.tensor(decay_slopes).flatten()
        buckets = torch.arange(NUM_DISTANCE_BUCKETS, dtype=torch.float32)
        falls = -buckets[:, None] * slopes
        by_distance = "distance" in recency
        self.distance = nn.Parameter(
            falls if by_distance else torch.zeros_like(falls), requires_grad=by_distance
        )
        self.gap = nn.Parameter(
            torch.zeros(NUM_GAP_BUCKETS, len(slopes)), requires_grad="gap" in recency
        )

    @staticmethod
    def of_layers(depth: int, num_heads: int, recency: tuple[str, ...]) -> RecencyBias:
        """The bias of ``depth`` layers above layer 0, in which every other head decays at first."""
        decaying = [FIRST_LAYER_DECAY if head % 2 == 0 else 0.0 for head in range(num_heads)]
        return RecencyBias([decaying] + [[0.0] * num_heads for _ in range(depth)], recency)

    def pairs(self) -> Tensor:
        """Bias of every distance and gap bucket, ``[distances, gaps, layers * H]``."""
        return self.distance[:, None] + self.gap[None, :]

    def forward(self, distance: Tensor, gap: Tensor) -> list[Tensor]:
        """Bias of each layer, ``[B, H, N]``, for distance and gap buckets ``[B, N]``."""
        # One look-up in the table of all (distance, gap) pairs serves all layers and heads.
        bias = nn.functional.embedding(distance * NUM_GAP_BUCKETS + gap, self.pairs().flatten(0, 1))
        layers = bias.view(*distance.shape, self.num_layers, self.num_heads)
        return list(layers.permute(2, 0, 3, 1).unbind(0))


class MultiLayerTargetAttention(nn.Module):
    """Eq. (5) and (6): y_1..y_{L+1} of every query, reading one stored layer above layer 0 each.

    A stored row enters layer i as its normalised cached vector beside the live embedding of its
    item and feedback: the vector was written before the feedback was known and by older weights.
    With a search, each layer attends to the rows it finds by its own logits (Eq. 9).
    """

    def __init__(
        self,
        query_dim: int,
        feature_dim: int,
        dim: int,
        memory_dim: int,
        depth: int,
        num_heads: int,
        recency: tuple[str, ...],
        search: RowSearch = _EVERY_ROW,
    ) -> None:
        super().__init__()
        self.search = search
        self.recency = RecencyBias.of_layers(depth, num_heads, recency)
        self.first = TargetAttention(query_dim, feature_dim, dim, num_heads)
        self.feature_norms = nn.ModuleList(nn.LayerNorm(feature_dim) for _ in range(depth + 1))
        self.memory_norms = nn.ModuleList(nn.LayerNorm(memory_dim) for _ in range(depth))
        self.layers = nn.ModuleList(
            TargetAttention(dim, memory_dim + feature_dim, dim, num_heads, feature_dim)
            for _ in range(depth)
        )

    def forward(
        self,
        query_input: Tensor,
        slab: KeySource,
        memory_UNLD: Tensor,
        memorised_BN: Tensor,
        block: KeySource | None = None,
        block_memory_BLD: Tensor | None = None,
    ) -> list[Tensor]:
        """``[y_1, ..., y_{L+1}]``, each ``[B, D]``; the first L are the rows to save (Eq. 7, 8).

        Args:
            query_input: layer-0 queries ``[B, query_dim]``.
            slab: stored rows with their live features.
            memory_UNLD: their cached vectors, of all layers or of the first few only. A layer whose
                vectors were not given has no keys, which equals a slab of which no row has one.
            memorised_BN: visible rows that have a cached vector (``[B or 1, N]``).
            block: the batch's own events (training); None when nothing in the batch is history of
                anything else.
            block_memory_BLD: cached vectors of the block's events. None for the model that writes
                the memory: its own outputs of this very pass are what will be stored.
        """
        slab_bias = self.recency(slab.distance, slab.gap)
        # Normalised once; the layers differ in gain and shift alone.
        slab_live = RowPart.normalised(slab.features, self.feature_norms[0])
        key_sets = [Keys((slab_live,), slab.visible, slab_bias[0], slab.user_row)]
        own = None if block is None else batch_rows(block, slab.user_row)
        if own is not None:
            seen = own.source
            own_bias = self.recency(seen.distance, seen.gap)
            own_live = RowPart.normalised(seen.features, self.feature_norms[0])
            key_sets.append(Keys((own_live,), seen.visible, own_bias[0], seen.user_row))
        outputs = [self.first(query_input, key_sets, self.search)]
        for index, layer in enumerate(self.layers):
            y = outputs[-1]
            # Normalised apart: cached vectors are far larger than embeddings, which carry the
            # feedback and would vanish in a common normalisation.
            cached, live = self.memory_norms[index], self.feature_norms[index + 1]
            key_sets = []
            if index < memory_UNLD.shape[2]:
                stored = RowPart.normalised(memory_UNLD[:, :, index], cached)
                formed = (stored, slab_live.under(live))
                key_sets.append(Keys(formed, memorised_BN, slab_bias[index + 1], slab.user_row))
            if own is not None:
                written = y if block_memory_BLD is None else block_memory_BLD[:, index]
                formed = (RowPart.normalised(own.rows(written), cached), own_live.under(live))
                key_sets.append(Keys(formed, seen.visible, own_bias[index + 1], seen.user_row))
            outputs.append(layer(y, key_sets, self.search))
        return outputs
