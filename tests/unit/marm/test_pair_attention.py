"""Tiled attention against a dense one, forward and backward, whatever the tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deep_histories import deep_case
from torch import Tensor

from marm.interest import pair_tiles
from marm.interest.pair_attention import silu_attention, softmax_attention
from marm.interest.pair_tiles import bias_table, gap_bucket_of, tiles_of
from marm.interest.user_sequence import Places, UserSequence
from marm.sequence import NUM_GAP_BUCKETS, gap_bucket

HEADS, WIDTH = 2, 3


def dense_bucket(sequence: UserSequence, places: Places) -> Tensor:
    """Bucket of every pair ``[V, T, R]``; -1 where the token does not see the row."""
    distance = places.before_VT[:, :, None] - sequence.ordinal_UR[places.user_V][:, None]
    stamps = sequence.rows.timestamp_ms_VT[places.user_V][:, None]
    gap = gap_bucket(places.timestamp_ms_VT[:, :, None] - stamps)
    column = np.arange(sequence.ordinal_UR.shape[1])
    seen = (column >= places.first_VT[..., None]) & (column < places.end_VT[..., None])
    octave = np.floor(4 * np.log2(np.maximum(distance, 1).astype(np.float32))).astype(np.int64)
    return torch.from_numpy(np.where(seen, octave * NUM_GAP_BUCKETS + gap, -1))


def dense(kind: str, tensors: list[Tensor], sequence: UserSequence, places: Places) -> Tensor:
    q, k, v, bias_HK, null_H = tensors
    users = torch.from_numpy(places.user_V)
    bucket = dense_bucket(sequence, places)
    content = torch.einsum("vthe,vrhe->vhtr", q, k[users])
    logits = content + bias_HK[:, bucket.clamp(min=0)].transpose(0, 1)
    hidden = (bucket < 0).unsqueeze(1)
    if kind == "silu":
        weights = torch.nn.functional.silu(logits).masked_fill(hidden, 0.0)
    else:
        null = null_H[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = logits.masked_fill(hidden, -torch.inf)
        weights = torch.softmax(torch.cat([null, logits], dim=-1), dim=-1)[..., 1:]
    return torch.einsum("vhtr,vrhe->vthe", weights, v[users])


@pytest.mark.parametrize("kind", ["softmax", "silu"])
@pytest.mark.parametrize("side", ["rows", "queries"])
@pytest.mark.parametrize(("tokens", "pairs"), [(128, 1 << 19), (3, 20), (1, 1)])
@pytest.mark.parametrize("situation", ["training", "reading", "request"])
def test_equals_dense_attention(
    kind: str,
    side: str,
    tokens: int,
    pairs: int,
    situation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pair_tiles, "TILE_TOKENS", tokens)
    monkeypatch.setattr(pair_tiles, "TILE_PAIRS", pairs)
    case = deep_case(situation, 6, method="hstu", layers=1)
    sequence = case.history.sequence
    assert sequence is not None
    places: Places = getattr(sequence, side).shared_by(len(getattr(sequence, side).place))
    table = bias_table(case.method.recency)[0].detach().double()
    table[:, :-NUM_GAP_BUCKETS] += torch.randn_like(table[:, :-NUM_GAP_BUCKETS])
    shapes = [places.shape, sequence.ordinal_UR.shape, sequence.ordinal_UR.shape]
    tensors = [torch.randn(*shape, HEADS, WIDTH, dtype=torch.float64) for shape in shapes]
    tensors += [table, torch.randn(HEADS, dtype=torch.float64)]
    used = [tensor.requires_grad_() for tensor in tensors][: 5 if kind == "softmax" else 4]
    tiles = tiles_of(sequence, places, torch.device("cpu"))
    attention = softmax_attention if kind == "softmax" else silu_attention
    actual = attention(*used, tiles)
    expected = dense(kind, tensors, sequence, places)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(actual)
    for one, other in zip(
        torch.autograd.grad((actual * weights).sum(), used),
        torch.autograd.grad((expected * weights).sum(), used),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_a_bias_that_does_not_learn_gets_no_gradient() -> None:
    case = deep_case("training", 6, method="hstu", layers=1)
    sequence = case.history.sequence
    assert sequence is not None
    tiles = tiles_of(sequence, sequence.rows, torch.device("cpu"))
    q, k, v = (torch.randn(*sequence.rows.shape, 2, 4, requires_grad=True) for _ in range(3))
    table = bias_table(case.method.recency)[0].detach()
    softmax_attention(q, k, v, table, torch.zeros(2), tiles).sum().backward()
    assert table.grad is None
    assert q.grad is not None
    assert q.grad.any()


def test_half_precision_products_stay_close() -> None:
    case = deep_case("training", 6, method="hstu", layers=1)
    sequence = case.history.sequence
    assert sequence is not None
    tiles = tiles_of(sequence, sequence.rows, torch.device("cpu"))
    table = bias_table(case.method.recency)[0].detach()
    exact = [torch.randn(*sequence.rows.shape, 2, 4) for _ in range(3)]
    half = [tensor.bfloat16().requires_grad_() for tensor in exact]
    expected = silu_attention(*exact, table, tiles)
    actual = silu_attention(*half, table, tiles)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.1)
    actual.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.bfloat16 for tensor in half)


def test_gap_buckets_of_tensors_are_those_of_arrays() -> None:
    exponents = np.arange(0, 62)
    around = (1 << exponents)[:, None] * 1000 - 1000 + np.arange(-40, 41)
    most = np.iinfo(np.int64)
    gaps = np.concatenate([around.ravel() % (1 << 62), [most.min, -1, 0, 1, 999, 1000, most.max]])
    gaps = np.concatenate([gaps, np.random.default_rng(0).integers(0, 1 << 45, 2_000)])
    got = gap_bucket_of(torch.from_numpy(gaps)).numpy()
    np.testing.assert_array_equal(got, gap_bucket(gaps))


def test_tiles_hold_every_pair_once_and_little_else() -> None:
    case = deep_case("reading", 40, method="hstu", layers=1)
    sequence = case.history.sequence
    assert sequence is not None
    for places in (sequence.rows, sequence.queries):
        count = np.zeros((*places.shape, sequence.ordinal_UR.shape[1]), np.int64)
        hidden = 64 * NUM_GAP_BUCKETS
        for tile in tiles_of(sequence, places, torch.device("cpu")):
            seen = (tile.bucket < hidden).numpy()
            count[tile.users, tile.tokens, tile.rows] += seen
        expected = (dense_bucket(sequence, places) >= 0).numpy()
        np.testing.assert_array_equal(count, expected)
