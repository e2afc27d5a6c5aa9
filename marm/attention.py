"""Target attention (Eq. 5) and its multi-layer form over memory (Eq. 6).

Shape legend: B queries, U users, N slab length, P block length, H heads, E head width, D = H*E,
C width of a key input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marm.sequence import NUM_DISTANCE_BUCKETS, NUM_GAP_BUCKETS

_MASKED = -1e9

FIRST_LAYER_DECAY = 0.25
"""Initial recency decay of every other head of layer 0, per quarter of a doubling of distance."""


@dataclass(frozen=True)
class Keys:
    """One set of keys and what each query sees of it.

    A slab has inputs ``[U, N, C]`` and ``user_row`` picks the user of each query; with one user,
    all queries share its keys and nothing is copied per query. A block has inputs ``[P, C]`` and
    ``user_row`` None. The leading dim of the view is B, or 1 when all queries see the same.
    """

    inputs: Tensor
    visible: Tensor  # bool [B or 1, N or P]
    bias: Tensor  # [B or 1, H, N or P] recency bias of this layer
    user_row: Tensor | None


class TargetAttention(nn.Module):
    """``Target-Attention`` of Eq. (5): every query attends to its history; ``[B, D]``.

    Pre-normalised multi-head attention with a recency bias, a null key that takes the weight when
    nothing matches (so an empty history is no special case), a residual connection and a
    feed-forward block.
    """

    def __init__(self, query_dim: int, key_dim: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.dim = num_heads, dim
        self.query_norm = nn.LayerNorm(query_dim)
        self.query = nn.Linear(query_dim, dim)
        self.key_value = nn.Linear(key_dim, 2 * dim, bias=False)
        self.output = nn.Linear(dim, dim)
        self.residual = nn.Identity() if query_dim == dim else nn.Linear(query_dim, dim)
        self.null_logit = nn.Parameter(torch.zeros(num_heads))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, query_input: Tensor, key_sets: list[Keys]) -> Tensor:
        """Attend ``query_input`` [B, query_dim] to all ``key_sets`` in one softmax."""
        batch, width = query_input.shape[0], self.dim // self.num_heads
        q_BHE = self.query(self.query_norm(query_input)).view(batch, self.num_heads, width)
        q_BHE = q_BHE * width**-0.5
        logits, values = [self.null_logit.expand(batch, -1).unsqueeze(-1)], []
        for keys in key_sets:
            k, v = self._project(keys.inputs)
            logits.append(self._logits(q_BHE, k, keys))
            values.append(v)
        weights = torch.softmax(torch.cat(logits, dim=-1), dim=-1)
        parts = torch.split(weights, [part.shape[-1] for part in logits], dim=-1)[1:]
        context = torch.zeros_like(q_BHE)
        for part, v, keys in zip(parts, values, key_sets, strict=True):
            context = context + _mix(part, v, keys.user_row)
        y_BD = self.residual(query_input) + self.output(context.reshape(batch, self.dim))
        return y_BD + self.feed_forward(y_BD)

    def _project(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.key_value(inputs).chunk(2, dim=-1)
        heads = (*inputs.shape[:-1], self.num_heads, self.dim // self.num_heads)
        return k.reshape(heads), v.reshape(heads)

    def _logits(self, q_BHE: Tensor, k: Tensor, keys: Keys) -> Tensor:
        if keys.user_row is None:
            content = torch.einsum("bhe,phe->bhp", q_BHE, k)
        elif k.shape[0] == 1:
            content = torch.einsum("bhe,nhe->bhn", q_BHE, k[0])
        else:
            content = torch.einsum("bhe,bnhe->bhn", q_BHE, _of_users(k, keys.user_row))
        return (content + keys.bias).masked_fill(~keys.visible.unsqueeze(1), _MASKED)


def _of_users(x_UNHE: Tensor, user_row_B: Tensor) -> Tensor:
    """The slab of each query's user, ``[B, N, H, E]``."""
    # An embedding look-up of whole slabs: its backward adds wide rows, which on a CPU is several
    # times faster than the scatter that index_select and advanced indexing use.
    wide = nn.functional.embedding(user_row_B, x_UNHE.flatten(1))
    return wide.view(len(user_row_B), *x_UNHE.shape[1:])


def _mix(weights_BHN: Tensor, v: Tensor, user_row: Tensor | None) -> Tensor:
    if user_row is None:
        return torch.einsum("bhp,phe->bhe", weights_BHN, v)
    if v.shape[0] == 1:
        return torch.einsum("bhn,nhe->bhe", weights_BHN, v[0])
    return torch.einsum("bhn,bnhe->bhe", weights_BHN, _of_users(v, user_row))


class RecencyBias(nn.Module):
    """Learned bias of every layer and head for the distance in events and in time.

    ``decay_slopes[l][h]`` is how much the bias of layer l, head h falls per distance bucket at the
    start of training. What ``recency`` leaves out keeps its initial bias.
    """

    def __init__(self, decay_slopes: list[list[float]], recency: tuple[str, ...]) -> None:
        super().__init__()
        self.num_layers, self.num_heads = len(decay_slopes), len(decay_slopes[0])
        slopes = torch.tensor(decay_slopes).flatten()
        buckets = torch.arange(NUM_DISTANCE_BUCKETS, dtype=torch.float32)
        self.distance = nn.Parameter(
            -buckets[:, None] * slopes, requires_grad="distance" in recency
        )
        self.gap = nn.Parameter(
            torch.zeros(NUM_GAP_BUCKETS, len(slopes)), requires_grad="gap" in recency
        )

    def forward(self, distance: Tensor, gap: Tensor) -> list[Tensor]:
        """Bias of each layer, ``[B, H, N]``, for distance and gap buckets ``[B, N]``."""
        # One look-up in the table of all (distance, gap) pairs serves all layers and heads.
        pairs = (self.distance[:, None] + self.gap[None, :]).flatten(0, 1)
        bias = nn.functional.embedding(distance * NUM_GAP_BUCKETS + gap, pairs)
        layers = bias.view(*distance.shape, self.num_layers, self.num_heads)
        return list(layers.permute(2, 0, 3, 1).unbind(0))


@dataclass(frozen=True)
class KeySource:
    """Live features of one set of keys, before a layer adds its cached vectors."""

    features: Tensor  # [U, N, F] or [P, F]
    visible: Tensor
    distance: Tensor  # int64, buckets
    gap: Tensor  # int64, buckets
    user_row: Tensor | None


class MultiLayerTargetAttention(nn.Module):
    """Eq. (5) and (6): y_1..y_{L+1} of every query, reading one stored layer above layer 0 each.

    A stored row enters layer i as its normalised cached vector beside the live embedding of its
    item and feedback: the vector was written before the feedback was known and by older weights.
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
    ) -> None:
        super().__init__()
        decaying = [FIRST_LAYER_DECAY if head % 2 == 0 else 0.0 for head in range(num_heads)]
        self.recency = RecencyBias([decaying] + [[0.0] * num_heads for _ in range(depth)], recency)
        self.first = TargetAttention(query_dim, feature_dim, dim, num_heads)
        self.feature_norms = nn.ModuleList(nn.LayerNorm(feature_dim) for _ in range(depth + 1))
        self.memory_norms = nn.ModuleList(nn.LayerNorm(memory_dim) for _ in range(depth))
        self.layers = nn.ModuleList(
            TargetAttention(dim, memory_dim + feature_dim, dim, num_heads) for _ in range(depth)
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
        block_bias = [] if block is None else self.recency(block.distance, block.gap)
        live = self.feature_norms[0]
        key_sets = [Keys(live(slab.features), slab.visible, slab_bias[0], slab.user_row)]
        if block is not None:
            key_sets.append(Keys(live(block.features), block.visible, block_bias[0], None))
        outputs = [self.first(query_input, key_sets)]
        for index, layer in enumerate(self.layers):
            y = outputs[-1]
            # Normalised apart: cached vectors are far larger than embeddings, which carry the
            # feedback and would vanish in a common normalisation.
            cached, live = self.memory_norms[index], self.feature_norms[index + 1]
            key_sets = []
            if index < memory_UNLD.shape[2]:
                formed = torch.cat([cached(memory_UNLD[:, :, index]), live(slab.features)], dim=-1)
                key_sets.append(Keys(formed, memorised_BN, slab_bias[index + 1], slab.user_row))
            if block is not None:
                own = y if block_memory_BLD is None else block_memory_BLD[:, index]
                formed = torch.cat([cached(own), live(block.features)], dim=-1)
                key_sets.append(Keys(formed, block.visible, block_bias[index + 1], None))
            outputs.append(layer(y, key_sets))
        return outputs
