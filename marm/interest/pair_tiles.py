"""Pairs of a token and a row it may see, cut into tiles that fit a cache.

A tile is some users, a run of their tokens and the run of rows that any of these tokens sees: most
of the upper triangle, and of the padding of short users, is never touched. What is the same for all
layers, heads and both directions is computed once: the bucket of each pair.

Shape legend: V users, T tokens of a user, R rows of a user, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marm.attention import RecencyBias
from marm.interest.user_sequence import Places, UserSequence
from marm.sequence import NUM_DISTANCE_BUCKETS, NUM_GAP_BUCKETS, distance_bucket

TILE_TOKENS = 128
"""Tokens of one user in a tile: fewer waste less of the triangle, more make larger products."""

TILE_PAIRS = 1 << 19
"""Pairs in a tile, at most: its logits then stay in a core's cache."""

HIDDEN_LOGIT = -1e9

_MANTISSA_BITS, _EXPONENT_BIAS = 23, 127


@dataclass(frozen=True)
class Tile:
    """Tokens ``[users, tokens]`` of `Places` against rows ``[of_users, rows]``."""

    users: slice
    tokens: slice
    of_users: slice | Tensor
    rows: slice
    bucket: Tensor  # int32 [users, tokens, rows]: where in a bias table


def tiles_of(sequence: UserSequence, places: Places, device: torch.device) -> list[Tile]:
    """Tiles that hold every pair of a token and a row that it sees, each pair once.

    A token that sees nothing may be in no tile.
    """
    as_tensor = _Tensors(sequence, places, device)
    tiles = []
    num_tokens = places.shape[1]
    for start in range(0, num_tokens, TILE_TOKENS):
        tokens = slice(start, min(start + TILE_TOKENS, num_tokens))
        # Users are in the order of their lengths: those who have such tokens are a prefix.
        active = int(np.searchsorted(-places.length_V, -start))
        end_V = places.end_VT[:active, tokens].max(axis=1, initial=0)
        begin = 0
        while begin < active:
            widest = max(int(end_V[begin:].max(initial=0)), 1)
            size = max(1, TILE_PAIRS // (widest * (tokens.stop - start)))
            users = slice(begin, min(begin + size, active))
            rows = _rows_seen(places, users, tokens)
            if rows.stop > rows.start:
                tiles.append(as_tensor.tile(users, tokens, rows))
            begin = users.stop
    return tiles


def bias_table(recency: RecencyBias) -> Tensor:
    """Bias of every bucket of a pair, ``[layers, H, buckets]``; the last ones hide."""
    pairs = recency.pairs()
    hidden = pairs.new_full((1, NUM_GAP_BUCKETS, pairs.shape[2]), HIDDEN_LOGIT)
    table = torch.cat([pairs, hidden]).flatten(0, 1).t()
    return table.reshape(recency.num_layers, recency.num_heads, -1)


def _rows_seen(places: Places, users: slice, tokens: slice) -> slice:
    first, end = places.first_VT[users, tokens], places.end_VT[users, tokens]
    sees = end > first
    return slice(
        int(first.min(where=sees, initial=np.iinfo(np.int64).max)) if sees.any() else 0,
        int(end.max(where=sees, initial=0)),
    )


class _Tensors:
    """The arrays of a sequence on a device, and tiles cut from them."""

    def __init__(self, sequence: UserSequence, places: Places, device: torch.device) -> None:
        self._user_V = places.user_V
        self._before_VT = _tensor(places.before_VT, device)
        self._stamp_VT = _tensor(places.timestamp_ms_VT, device)
        self._ordinal_UR = _tensor(sequence.ordinal_UR, device)
        self._stamp_UR = _tensor(sequence.rows.timestamp_ms_VT, device)
        n = sequence.history_length
        buckets = distance_bucket(np.arange(n + 2)).astype(np.int32)
        # Distances below 1 (not earlier) and above n are hidden.
        buckets[[0, n + 1]] = NUM_DISTANCE_BUCKETS
        self._farthest = n + 1
        self._distance_bucket = _tensor(buckets, device)

    def tile(self, users: slice, tokens: slice, rows: slice) -> Tile:
        of_users: slice | Tensor
        chosen = self._user_V[users]
        if len(chosen) == 1 or np.array_equal(
            chosen, np.arange(chosen[0], chosen[0] + len(chosen))
        ):
            of_users = slice(int(chosen[0]), int(chosen[0]) + len(chosen))
        else:
            of_users = _tensor(chosen, self._ordinal_UR.device)
        before = self._before_VT[users, tokens].unsqueeze(2)
        distance = before - self._ordinal_UR[of_users, rows].unsqueeze(1)
        distance.clamp_(0, self._farthest)
        bucket = self._distance_bucket.index_select(0, distance.flatten()).view(distance.shape)
        stamps = self._stamp_VT[users, tokens].unsqueeze(2)
        gap = gap_bucket_of(stamps - self._stamp_UR[of_users, rows].unsqueeze(1))
        return Tile(users, tokens, of_users, rows, bucket.mul_(NUM_GAP_BUCKETS).add_(gap))


def gap_bucket_of(gap_ms: Tensor) -> Tensor:
    """`marm.sequence.gap_bucket` of a tensor, as int32, without its logarithm."""
    grown = gap_ms.clamp(min=0).float().div_(1000.0).add_(1.0)
    octave = grown.view(torch.int32).bitwise_right_shift(_MANTISSA_BITS).sub_(_EXPONENT_BIAS)
    octave.clamp_(max=NUM_GAP_BUCKETS - 1)
    edges = _tensor(_gap_edges(), gap_ms.device)
    next_octave = edges.index_select(0, octave.flatten()).view(octave.shape)
    return octave.add_(grown >= next_octave).clamp_(max=NUM_GAP_BUCKETS - 1)


@cache
def _gap_edges() -> NDArray[np.float32]:
    """The least number of every octave whose rounded logarithm is already in the next one."""
    exponent = np.arange(1, NUM_GAP_BUCKETS + 1, dtype=np.int32)
    bits = (exponent + _EXPONENT_BIAS) << _MANTISSA_BITS
    below = bits[:, None] - np.arange(64, -1, -1, dtype=np.int32)
    candidates = below.view(np.float32)
    rounded_up = np.floor(np.log2(candidates)) >= exponent[:, None]
    return candidates[np.arange(len(bits)), rounded_up.argmax(axis=1)]


def _tensor(array: NDArray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
