"""What every method costs in training: multiply-adds per event.

Arithmetic only, for the comparison of RQ4. Counted are the multiply-adds of matrix products in a
forward pass of the method alone (no embeddings, no heads); a backward pass takes twice as many.
Sums, norms and softmaxes are left out: they grow as the products do. Features are as wide as the
output, F = D = d.

Symbols: n rows of a user, d width, L layers, H heads, k events of each user in a batch, B = k users
events in all, K rows found by a search, S clusters.

The work of a method is per event or per user and batch. What is done once per user and batch (a
row's keys, a row's state in a decoder) is divided by k, so a comparison of methods depends on k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from marm.config import METHODS
from marm.interest.din import ACTIVATION_WIDTH
from marm.searched_keys import COPY_COST

_FEED_FORWARD = 4
"""d -> 2d -> d, in units of d^2."""


@dataclass(frozen=True, kw_only=True)
class CostShape:
    """Sizes that decide the cost.

    Attributes:
        rows: n, stored rows of every user, all visible; the history length.
        dim: d.
        layers: L: cached layers of ``marm`` and ``marm_sim``, layers above the first one of
            ``stca`` and ``decoder``, blocks of ``hstu``. Other methods have none.
        events_per_user: k, events of each user in a batch, at different times.
        users: users in a batch.
        num_heads: H.
        top_k: K of ``marm_sim``, ``sim_soft``, ``sim_hard``, ``twin`` and ``twin_v2``.
        cluster_size: of ``twin_v2``.
    """

    rows: int
    dim: int
    layers: int
    events_per_user: int = 1
    users: int = 1
    num_heads: int = 2
    top_k: int = 20
    cluster_size: int = 5

    def __post_init__(self) -> None:
        for name in ("rows", "dim", "events_per_user", "users", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.layers < 0:
            raise ValueError(f"layers must be at least 0, got {self.layers}")

    @property
    def found(self) -> int:
        """Rows that a search keeps."""
        return min(self.top_k, self.rows)


def macs_per_event(method: str, shape: CostShape) -> float:
    """Multiply-adds of one event in training, forward.

    Raises:
        ValueError: when the method is none of `marm.config.METHODS`.
    """
    if method not in _MACS:
        raise ValueError(f"interest method must be one of {METHODS}, got {method!r}")
    return _MACS[method](shape)


def _sum_pooling(shape: CostShape) -> float:
    """H n d for the means, H d^2 + 4 d^2 to read them out."""
    pooling = shape.num_heads * shape.rows * shape.dim
    return pooling + _readout(shape, shape.num_heads * shape.dim)


def _din(shape: CostShape) -> float:
    """n (d + H) A for the activation unit of width A, and its query; then as sum pooling."""
    unit = shape.rows * (shape.dim + shape.num_heads) + shape.dim
    return unit * ACTIVATION_WIDTH + _sum_pooling(shape)


def _sim_soft(shape: CostShape) -> float:
    """2 d^2 + n d for the search, n d + 2 d^2 + d for its auxiliary prediction; then as hard."""
    search = 2 * shape.dim**2 + shape.rows * shape.dim
    auxiliary = shape.rows * shape.dim + 2 * shape.dim**2 + shape.dim
    return search + auxiliary + _sim_hard(shape)


def _sim_hard(shape: CostShape) -> float:
    """Attention to K rows found and to the newest K; the search compares tags."""
    return 2 * _window_attention(shape, shape.found) + _readout(shape, 2 * shape.dim)


def _twin(shape: CostShape) -> float:
    """Logits of n rows, H n d, and a mixture of K of them, H K d."""
    return _twin_of(shape, shape.rows)


def _twin_v2(shape: CostShape) -> float:
    """As TWIN with S clusters for rows, which take 3 n d per halving to find."""
    clusters = 1
    while clusters * shape.cluster_size < shape.rows:
        clusters *= 2
    return _twin_of(shape, clusters) + 3 * shape.rows * shape.dim * math.log2(clusters)


def _twin_of(shape: CostShape, candidates: int) -> float:
    attended = candidates + min(shape.top_k, candidates)
    projections = 3 * shape.dim**2
    return projections + shape.num_heads * shape.dim * attended + _readout(shape, shape.dim)


def _window_attention(shape: CostShape, rows: int) -> float:
    """Attention with the projections in the query: 3 d^2 + 2 H K d."""
    return 3 * shape.dim**2 + 2 * shape.num_heads * rows * shape.dim


def _readout(shape: CostShape, pooled_dim: int) -> float:
    return pooled_dim * shape.dim + _FEED_FORWARD * shape.dim**2


def _stca(shape: CostShape) -> float:
    """L + 1 target attentions with keys of width d."""
    return (shape.layers + 1) * _target_attention(shape, shape.dim)


def _marm(shape: CostShape) -> float:
    """One target attention with keys of width d, L with the cached vector beside, 2 d."""
    above = shape.layers * _target_attention(shape, 2 * shape.dim)
    return _target_attention(shape, shape.dim) + above


def _target_attention(shape: CostShape, key_dim: int) -> float:
    """Queries to the slab and to the block of the whole batch, for keys of width C.

    Slab: 2 C d n / k to project the rows of a user once and 2 n d to attend, or 2 C d + 2 H C n
    with the projections in the query, as `marm.key_reading.read_keys` chooses. Block: 2 C d to
    project an event and 2 B d to attend, as each event is held against all B.
    """
    n, d, k = shape.rows, shape.dim, shape.events_per_user
    if _absorbs(shape, key_dim, k, shape.num_heads):
        slab = 2.0 * key_dim * d + 2 * shape.num_heads * key_dim * n
    else:
        slab = 2 * key_dim * d * n / k + 2 * n * d
    return slab + _block_attention(shape, key_dim) + _around_attention(d)


def _marm_sim(shape: CostShape) -> float:
    """As MARM, and a search in every layer unless it takes all."""
    if shape.rows + shape.events_per_user * shape.users <= shape.top_k:
        return _marm(shape)
    above = shape.layers * _searched_attention(shape, 2 * shape.dim)
    return _searched_attention(shape, shape.dim) + above


def _searched_attention(shape: CostShape, key_dim: int) -> float:
    """Scores of all rows, as one head's products; attention to K copied rows, 2 C d + 2 H C K, or
    where these are too many to copy, to all (`marm.searched_keys`)."""
    n, d, k = shape.rows, shape.dim, shape.events_per_user
    if _absorbs(shape, key_dim, k, 1):
        scores = float(key_dim * d + key_dim * n)
    else:
        scores = 2 * key_dim * d * n / k + n * d
    scores += 2 * key_dim * d + k * shape.users * d
    if shape.users < 2 or COPY_COST * shape.top_k > n:
        return scores + _target_attention(shape, key_dim)
    found = 2 * key_dim * d + 2 * shape.num_heads * key_dim * shape.top_k
    return scores + found + _block_attention(shape, key_dim) + _around_attention(d)


def _absorbs(shape: CostShape, key_dim: int, queries: int, num_heads: int) -> bool:
    """Whether queries take the projection of the rows, see `marm.key_reading.read_keys`."""
    absorbed = queries * num_heads * key_dim
    return shape.users > 1 and absorbed < key_dim * shape.dim + queries * shape.dim


def _block_attention(shape: CostShape, key_dim: int) -> float:
    return 2 * key_dim * shape.dim + 2 * shape.events_per_user * shape.users * shape.dim


def _around_attention(dim: int) -> float:
    """Query, output and feed-forward of one token: 6 d^2."""
    return (2 + _FEED_FORWARD) * dim**2


def _decoder(shape: CostShape) -> float:
    """Per user: keys of n + k - 1 rows in L + 1 layers, their states in L of them, and his queries.

    A row before which are p others attends to min(p, n) of them: n^2 / 2 in all, and n more for
    each event of the batch that another one sees.
    """
    n, d, k = shape.rows, shape.dim, shape.events_per_user
    rows, row_pairs = _rows_and_pairs(shape)
    keys = 2 * d * d * rows * (1 + 2 * shape.layers)  # width d in the first layer, 2 d above
    states = shape.layers * (2 * d * row_pairs + _around_attention(d) * rows)
    queries = (shape.layers + 1) * k * (2 * d * n + _around_attention(d))
    return (keys + states + queries) / k


def _hstu(shape: CostShape) -> float:
    """Per user: K and V of n + k - 1 rows in all blocks, their states in all but the last, and his
    queries; d^2 more to make a token.

    A token takes 4 d^2 for U, V, Q, K, d^2 for W2 and 2 d per pair. A pair of a token and itself is
    no matrix product and not counted.
    """
    n, d, k, blocks = shape.rows, shape.dim, shape.events_per_user, shape.layers
    rows, row_pairs = _rows_and_pairs(shape)
    keys = 2 * d * d * rows * blocks
    states = max(blocks - 1, 0) * (2 * d * row_pairs + 3 * d * d * rows)
    queries = blocks * k * (2 * d * n + 5 * d * d)
    tokens = d * d * (rows + k)
    return (keys + states + queries + tokens) / k


def _rows_and_pairs(shape: CostShape) -> tuple[int, int]:
    """Rows of one user that any query sees, and pairs of a row and an earlier one it sees."""
    n, of_batch = shape.rows, shape.events_per_user - 1
    return n + of_batch, n * (n - 1) // 2 + of_batch * n


_MACS: dict[str, Callable[[CostShape], float]] = {
    "marm": _marm,
    "marm_sim": _marm_sim,
    "sum_pooling": _sum_pooling,
    "din": _din,
    "sim_soft": _sim_soft,
    "sim_hard": _sim_hard,
    "twin": _twin,
    "twin_v2": _twin_v2,
    "stca": _stca,
    "hstu": _hstu,
    "decoder": _decoder,
}
