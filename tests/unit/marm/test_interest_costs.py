"""Counted multiply-adds against those that torch counts in a forward pass."""

from __future__ import annotations

import numpy as np
import pytest
from sample_events import NOW_MS, make_events, replaced, small_config
from torch.utils.flop_counter import FlopCounterMode

from marm.config import MEMORY_METHODS, InterestConfig
from marm.interest import pair_tiles
from marm.interest.costs import CostShape, macs_per_event
from marm.memory import Namespace, UserRows
from marm.model_factory import build_model
from marm.ranker import Ranker
from marm.sequence import raw_rows


def measured_macs(method: str, shape: CostShape) -> float:
    """Per event, in training, with ``rows`` stored rows of every user."""
    depth = shape.layers if method in MEMORY_METHODS else 0
    namespace = Namespace(depth=depth, dim=shape.dim, dtype="float32")
    config = small_config(
        namespace=namespace,
        feature_dim=shape.dim,
        num_heads=shape.num_heads,
        history_length=shape.rows,
        interests=(InterestConfig(method=method, layers=shape.layers, top_k=shape.top_k),),
    )
    model = build_model(config)
    assert isinstance(model, Ranker)
    num_events, num_rows = shape.users * shape.events_per_user, shape.users * shape.rows
    batch = replaced(make_events(num_events), user_id=np.arange(num_events) % shape.users)
    past = replaced(
        make_events(num_rows), timestamp_ms=np.arange(num_rows) + NOW_MS - 1_000_000_000
    )
    rows = raw_rows(past, namespace.row_dtype)
    rows["written_step"] = 1
    offsets = np.arange(shape.users + 1) * shape.rows
    inputs = model.inputs.for_training(batch, UserRows(np.arange(shape.users), offsets, rows))
    embedded = model.embed(inputs)
    sequence = model.net.sequence
    history = sequence.history(embedded)
    counter = FlopCounterMode(display=False)
    with counter:
        sequence.methods[0](embedded.target_BF, history)
    return counter.get_total_flops() / 2 / num_events


SHAPES = [
    CostShape(rows=7, dim=8, layers=2, events_per_user=3, users=2, top_k=4),
    CostShape(rows=12, dim=8, layers=1, events_per_user=1, users=3, top_k=4),
    CostShape(rows=5, dim=16, layers=3, events_per_user=20, users=2, num_heads=4, top_k=3),
]


@pytest.mark.parametrize("method", ["marm", "marm_sim", "stca", "hstu", "decoder"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_what_torch_counts(
    method: str, shape: CostShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tile of several tokens holds some pairs above the diagonal; the formulas have none.
    monkeypatch.setattr(pair_tiles, "TILE_TOKENS", 1)
    assert measured_macs(method, shape) == pytest.approx(macs_per_event(method, shape), rel=1e-9)


@pytest.mark.parametrize("method", ["sum_pooling", "din", "sim_soft", "twin"])
def test_methods_of_raw_rows_are_near_what_torch_counts(method: str) -> None:
    for shape in SHAPES[:2]:
        expected = macs_per_event(method, shape)
        assert measured_macs(method, shape) == pytest.approx(expected, rel=0.25)


def test_depth_is_linear_in_n_with_a_memory_and_quadratic_without() -> None:
    def growth(method: str) -> float:
        short, long = (CostShape(rows=n, dim=64, layers=4, users=256) for n in (10_000, 20_000))
        return macs_per_event(method, long) / macs_per_event(method, short)

    assert growth("marm") == pytest.approx(2.0, abs=0.05)
    assert growth("stca") == pytest.approx(2.0, abs=0.05)
    assert growth("hstu") == pytest.approx(4.0, abs=0.3)
    assert growth("decoder") == pytest.approx(4.0, abs=0.3)


def test_what_cannot_be_counted_is_refused() -> None:
    shape = CostShape(rows=1, dim=1, layers=0)
    with pytest.raises(ValueError, match="interest method must be one of"):
        macs_per_event("rnn", shape)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        CostShape(rows=0, dim=1, layers=0)
    with pytest.raises(ValueError, match="layers must be at least 0, got -1"):
        CostShape(rows=1, dim=1, layers=-1)
