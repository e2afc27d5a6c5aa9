"""Attention of tokens to the rows of their users, tile by tile, forward and backward.

Nothing of the size of all pairs is kept but the bucket of each: the backward pass computes the
weights of a tile again, as fused kernels do, and adds to the gradients of rows in place. The slow
reference is `marm.attention.TargetAttention` (and, for `silu_attention`, the loop of its test).

Shape legend: V users, T tokens of a user, U users, R rows of a user, H heads, E head width,
K buckets of a bias table, J and I users and tokens of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from marm.interest.pair_tiles import Tile


def softmax_attention(
    q_VTHE: Tensor,
    k_URHE: Tensor,
    v_URHE: Tensor,
    bias_HK: Tensor,
    null_H: Tensor,
    tiles: list[Tile],
) -> Tensor:
    """``[V, T, H, E]``: softmax over the rows seen and a null key that has no value (Eq. 5)."""
    return _apply(_Softmax, q_VTHE, k_URHE, v_URHE, bias_HK, null_H, tiles)


def silu_attention(
    q_VTHE: Tensor, k_URHE: Tensor, v_URHE: Tensor, bias_HK: Tensor, tiles: list[Tile]
) -> Tensor:
    """``[V, T, H, E]``: the sum of values by SiLU of their logits, as HSTU has it."""
    return _apply(_Silu, q_VTHE, k_URHE, v_URHE, bias_HK, tiles)


def _apply(function: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    # Inside, products are in the precision of q, k and v and logits in float32: autocast has no say
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        mixed: Tensor = function.apply(*heads_first, *rest)
    return mixed.transpose(1, 2)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, null_H: Tensor, tiles: list[Tile]
    ) -> Tensor:
        bias, null_H, out = _wide(bias), _wide(null_H), torch.zeros_like(q)
        log_sum = null_H[:, None].repeat(q.shape[0], 1, q.shape[2])  # of tokens that see nothing
        for tile in tiles:
            logits = _logits(q, k, bias, tile)
            total = torch.logaddexp(torch.logsumexp(logits, dim=-1), null_H[:, None])
            weights = logits.sub_(total.unsqueeze(-1)).exp_().to(v.dtype)
            out[tile.users, :, tile.tokens] = weights @ v[tile.of_users, :, tile.rows]
            log_sum[tile.users, :, tile.tokens] = total
        ctx.save_for_backward(q, k, v, bias, null_H, out, log_sum)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = gradients
        q, k, v, bias, null_H, out, log_sum = ctx.saved_tensors
        sums = _Gradients(q, k, v, bias if ctx.needs_input_grad[3] else None)
        # The weight of the null key takes what all rows together lose, and its value is zero.
        mean = (_wide(d_out) * _wide(out)).sum(dim=-1)
        for tile in ctx.tiles:
            weights = _logits(q, k, bias, tile)
            weights.sub_(log_sum[tile.users, :, tile.tokens].unsqueeze(-1)).exp_()
            d_mixed = d_out[tile.users, :, tile.tokens]
            d_logits = _wide(d_mixed @ v[tile.of_users, :, tile.rows].transpose(-1, -2))
            d_logits.sub_(mean[tile.users, :, tile.tokens].unsqueeze(-1)).mul_(weights)
            sums.add(tile, weights, d_mixed, d_logits)
        null_weight = torch.exp(null_H[:, None] - log_sum)
        d_null = -(null_weight * mean).sum(dim=(0, 2))
        return *sums.of_inputs(), sums.of_bias(), d_null, None


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tiles: list[Tile]
    ) -> Tensor:
        bias, out = _wide(bias), torch.zeros_like(q)
        for tile in tiles:
            weights = torch.nn.functional.silu(_logits(q, k, bias, tile), inplace=True)
            mixed = weights.to(v.dtype) @ v[tile.of_users, :, tile.rows]
            out[tile.users, :, tile.tokens] = mixed
        ctx.save_for_backward(q, k, v, bias)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = gradients
        q, k, v, bias = ctx.saved_tensors
        sums = _Gradients(q, k, v, bias if ctx.needs_input_grad[3] else None)
        for tile in ctx.tiles:
            logits = _logits(q, k, bias, tile)
            gate = torch.sigmoid(logits)
            weights = logits.mul_(gate)  # SiLU; its slope is gate + weight * (1 - gate)
            d_mixed = d_out[tile.users, :, tile.tokens]
            d_logits = _wide(d_mixed @ v[tile.of_users, :, tile.rows].transpose(-1, -2))
            d_logits.mul_(torch.addcmul(weights, weights, gate, value=-1).add_(gate))
            sums.add(tile, weights, d_mixed, d_logits)
        return *sums.of_inputs(), sums.of_bias(), None


def _logits(q: Tensor, k: Tensor, bias_HK: Tensor, tile: Tile) -> Tensor:
    """Logits of a tile, ``[J, H, I, rows]`` in single precision."""
    keys = k[tile.of_users, :, tile.rows]
    logits = _wide(q[tile.users, :, tile.tokens] @ keys.transpose(-1, -2))
    bucket = tile.bucket.flatten()
    for head, of_head in enumerate(bias_HK):
        logits[:, head] += of_head.index_select(0, bucket).view(tile.bucket.shape)
    return logits


def _wide(x: Tensor) -> Tensor:
    """In single precision at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Gradients:
    """Gradients that the tiles add up to, in single precision."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        self._q, self._k = q, k
        self._dtypes = (q.dtype, k.dtype, v.dtype)
        self._d_q, self._d_k, self._d_v = (torch.zeros_like(_wide(x)) for x in (q, k, v))
        self._d_bias = None if bias is None else torch.zeros_like(bias)

    def add(self, tile: Tile, weights: Tensor, d_mixed: Tensor, d_logits: Tensor) -> None:
        """What one tile adds: every token is in one tile, a row in several."""
        queries = self._q[tile.users, :, tile.tokens]
        keys = self._k[tile.of_users, :, tile.rows]
        narrow = d_logits.to(queries.dtype)
        self._d_q[tile.users, :, tile.tokens] = _wide(narrow @ keys)
        self._d_k[tile.of_users, :, tile.rows] += narrow.transpose(-1, -2) @ queries
        weights = weights.to(d_mixed.dtype)
        self._d_v[tile.of_users, :, tile.rows] += weights.transpose(-1, -2) @ d_mixed
        if self._d_bias is not None:
            bucket = tile.bucket.flatten().long()
            for head, of_head in enumerate(self._d_bias):
                of_head.scatter_add_(0, bucket, d_logits[:, head].flatten())

    def of_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of queries, keys and values, as they came."""
        q, k, v = self._dtypes
        return self._d_q.to(q), self._d_k.to(k), self._d_v.to(v)

    def of_bias(self) -> Tensor | None:
        """Of the bias table."""
        return self._d_bias
