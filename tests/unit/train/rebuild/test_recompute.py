"""With frozen weights, rebuilt rows are what streaming writes and what the reference computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rebuild_samples import STEP, frozen_weights, namespace, sample_history, streamed
from sample_events import make_events, replaced

from marm.events import EventBatch
from marm.reference import decode_history
from train.rebuild.histories import Histories, gather_histories
from train.rebuild.recompute import RowComputer, cut_blocks
from train.rebuild.weights import RankingWeights

TOLERANCE = 1e-5


def recomputed(
    weights: RankingWeights, histories: Histories, block_events: int
) -> NDArray[np.void]:
    computer = RowComputer(weights.build(), STEP, 77, block_events)
    return np.concatenate([rows for _, rows in computer.rows(histories)])


def histories_of(events: EventBatch, sequence: str = "all") -> Histories:
    return gather_histories([events], np.unique(events.user_id), sequence)


@pytest.mark.parametrize("block_events", [1, 9, 64, 4096])
@pytest.mark.parametrize(
    ("depth", "sequence", "error_layers"),
    [(2, "all", 0), (3, "long_view", 0), (0, "all", 0), (3, "all", 2), (2, "long_view", 2)],
)
def test_rebuilt_rows_are_what_streaming_writes(
    tmp_path: Path, depth: int, sequence: str, error_layers: int, block_events: int
) -> None:
    events = sample_history()
    weights = frozen_weights(
        namespace=namespace(depth=depth, sequence=sequence),
        history_length=6,
        error_layers=error_layers,
    )
    memory = streamed(tmp_path, weights, events).memory
    histories = histories_of(events, sequence)
    rows = recomputed(weights, histories, block_events)
    stored = memory.fetch(histories.user_ids, 10_000)
    assert stored.offsets.tolist() == histories.offsets.tolist()
    for name in ("event_key", "item_id", "timestamp_ms", "author_id", "context_id", "feedback"):
        np.testing.assert_array_equal(rows[name], stored.rows[name], err_msg=name)
    tolerance = 10 * TOLERANCE if error_layers else TOLERANCE  # errors add up over all of life
    np.testing.assert_allclose(
        rows["memory"], stored.rows["memory"], rtol=tolerance, atol=tolerance
    )
    assert (rows["written_step"] == STEP).all()
    assert (rows["written_s"] == 77).all()


def test_rebuilt_rows_are_what_the_reference_computes() -> None:
    events = sample_history(120)
    weights = frozen_weights(history_length=5)
    histories = histories_of(events)
    rows = recomputed(weights, histories, 16)
    for index in range(len(histories.user_ids)):
        own = slice(int(histories.offsets[index]), int(histories.offsets[index + 1]))
        expected = decode_history(weights.build(), histories.events.take(own)).rows_PLD
        np.testing.assert_allclose(
            rows["memory"][own], expected.numpy(), rtol=TOLERANCE, atol=TOLERANCE
        )


def test_simultaneous_events_see_the_same_history_wherever_blocks_are_cut() -> None:
    events = make_events(60, 1)
    events = replaced(events, timestamp_ms=events.timestamp_ms[0] + np.arange(60) // 3 * 1000)
    weights = frozen_weights(history_length=7)
    histories = histories_of(events)
    whole = recomputed(weights, histories, 1000)
    for block_events in (1, 2, 4, 10, 59):
        rows = recomputed(weights, histories, block_events)
        np.testing.assert_allclose(rows["memory"], whole["memory"], rtol=TOLERANCE, atol=TOLERANCE)


def test_blocks_hold_whole_users_or_a_piece_of_one() -> None:
    histories = histories_of(sample_history(500, 9))
    blocks = list(cut_blocks(histories, 50))
    assert [block.start for block in blocks] == [0, *(block.end for block in blocks[:-1])]
    assert blocks[-1].end == 500
    user = histories.user_row
    assert max(block.end - block.start for block in blocks) <= 50
    for block in blocks:
        owners = np.unique(user[block.start : block.end])
        begins = block.start in histories.offsets
        ends = block.end in histories.offsets
        assert block.continues == (not begins)
        assert len(owners) == 1 or (begins and ends)


def test_no_users_make_no_blocks() -> None:
    histories = gather_histories([make_events(5)], np.empty(0, np.int64), "all")
    assert list(cut_blocks(histories, 8)) == []
