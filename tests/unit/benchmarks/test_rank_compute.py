"""What the ranking benchmark compares really computes what it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.perf.rank_compute import RankComputeSettings, measure_rank_compute
from benchmarks.perf.rank_compute_case import RankingCase, Shape
from benchmarks.perf.rank_compute_decoder import FullDecoder
from marm.precision import FullPrecision

SHAPE = Shape(depth=2, dim=16, num_heads=2, feature_dim=8)


pytestmark = pytest.mark.usefixtures("one_thread")


@torch.inference_mode()
def test_one_by_one_gives_what_all_at_once_gives() -> None:
    case = RankingCase(SHAPE, num_rows=30, num_candidates=5, seed=0)
    at_once = case.frozen(FullPrecision()).outputs(case.query_MF, case.history)[-1]
    torch.testing.assert_close(case.one_by_one(5), at_once, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_decoder_reads_all_rows_and_nobody_its_last_layer() -> None:
    case = RankingCase(SHAPE, num_rows=30, num_candidates=5, seed=0)
    live_NF = case.history.live_NF
    whole = FullDecoder(case.weights, SHAPE.depth + 1).candidates(case.query_MF, live_NF)
    lean = FullDecoder(case.weights, SHAPE.depth).candidates(case.query_MF, live_NF)
    torch.testing.assert_close(whole, lean)  # nobody reads the history's last outputs
    assert whole.shape == (5, SHAPE.dim)
    fewer = FullDecoder(case.weights, SHAPE.depth + 1).candidates(case.query_MF, live_NF[:-1])
    assert not torch.allclose(whole, fewer)


def test_work_is_counted_by_hand_for_one_layer() -> None:
    rows, candidates, dim = 7, 3, 16
    shape = Shape(depth=0, dim=dim, num_heads=2, feature_dim=dim)
    by_row = 2 * dim * 2 * dim  # keys and values
    by_pair = 2 * 2 * dim  # logits, mixing
    by_candidate = 2 * (dim * dim + dim * dim + 4 * dim * dim)  # query, output, feed-forward
    expected = rows * by_row + rows * candidates * by_pair + candidates * by_candidate
    assert shape.gflop(rows, candidates) == pytest.approx(expected * 1e-9)


def test_every_figure_is_there() -> None:
    measured = measure_rank_compute(RankComputeSettings.quick())
    keys = {figure.key for part in measured for figure in part.figures}
    assert keys >= {
        "rank_over_full_sa_40",
        "rank_over_full_sa_80",
        "rank_over_full_sa_80_few",
        "rank_over_naive_80",
        "gemm_fraction_80",
        "gsu_over_dense",
        "rank_exponent",
    }
    assert all(figure.ratio.value != 0 for part in measured for figure in part.figures)
